#include "server/batch/admission_core.h"

#include <algorithm>
#include <cmath>

namespace tidepool {
namespace {

// Of a refusal that does not say when to come back; and at most, whatever it says.
constexpr absl::Duration kPause = absl::Milliseconds(250);
constexpr absl::Duration kPauseMax = absl::Minutes(1);

}  // namespace

size_t AdmissionCore::Allowed(const OnlineLoad& load, absl::Time now) {
  if (load.waiting > 0) waited_at_ = now;
  if (load.slo_short || now < waited_at_ + options_.calm || now < paused_until_) return 0;
  const size_t room = options_.inflight_max - std::min(options_.inflight_max, load.inflight);
  return std::min(room, static_cast<size_t>(std::max(1.0, std::floor(window_))));
}

size_t AdmissionCore::GiveBack(const OnlineLoad& load, size_t running, absl::Time now) {
  if (running == 0 || load.waiting == 0 || load.oldest_wait < options_.yield_after) return 0;
  if (now < gave_back_at_ + options_.yield_pause) return 0;
  gave_back_at_ = now;
  return (running + 3) / 4;
}

void AdmissionCore::Answered() {
  window_ = std::min(static_cast<double>(options_.inflight_max), window_ + 1.0 / std::max(1.0, window_));
}

void AdmissionCore::Refused(absl::Time started, absl::Duration retry_after, absl::Time now) {
  paused_until_ = std::max(paused_until_, now + std::clamp(retry_after, kPause, kPauseMax));
  // What was under way when the window was cut last says nothing new.
  if (started < cut_at_) return;
  cut_at_ = now;
  window_ = std::max(1.0, window_ / 2);
}

}  // namespace tidepool
