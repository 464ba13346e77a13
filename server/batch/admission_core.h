#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"

namespace tidepool {

// What online traffic looks like now.
struct OnlineLoad {
  size_t inflight = 0;         // requests without an outcome
  size_t waiting = 0;          // of them: those without a first token
  absl::Duration oldest_wait;  // of the waiting ones
  bool slo_short = false;      // answers come, or nearly, later than their SLO says
};

// AdmissionCore: how many batch lines may run (Core; pure). Batch work takes what online traffic leaves:
//
//   room(load) = inflight_max - load.inflight, nothing while an online request waits for its first token or
//                answers are late
//   window     = additive increase, multiplicative decrease on refusals (429, 503), as TCP's
//   allowed    = min(room, window), and nothing during a refusal's Retry-After
//
// Running lines are left to finish, and not replaced; where an online request waits longer than yield_after,
// some are given back to be run again later.
class AdmissionCore {
 public:
  struct Options {
    size_t inflight_max = 32;
    absl::Duration yield_after = absl::Seconds(2);
    absl::Duration yield_pause = absl::Seconds(1);  // between two times of giving back
    // Admissions stop for so long after an online request waited: the next one is seldom far.
    absl::Duration calm = absl::Milliseconds(200);
  };
  explicit AdmissionCore(Options options)
      : options_(options), window_(static_cast<double>(options.inflight_max)) {}

  // In flight at most. Running ones above it go on.
  size_t Allowed(const OnlineLoad& load, absl::Time now);
  // How many of `running` to stop and run again later.
  size_t GiveBack(const OnlineLoad& load, size_t running, absl::Time now);
  // A line ended with an answer.
  void Answered();
  // A line that started at `started` was refused; `retry_after`: as the server said, zero where it did not.
  void Refused(absl::Time started, absl::Duration retry_after, absl::Time now);
  // When Allowed may be more without anything being reported.
  absl::Time paused_until() const { return paused_until_; }

 private:
  const Options options_;
  double window_;
  absl::Time cut_at_ = absl::InfinitePast();
  absl::Time paused_until_ = absl::InfinitePast();
  absl::Time waited_at_ = absl::InfinitePast();
  absl::Time gave_back_at_ = absl::InfinitePast();
};

}  // namespace tidepool
