#include "server/worker/prefill_times.h"

namespace tidepool {

void PrefillTimes::Observe(std::span<const PrefillObservation> seen) {
  std::lock_guard lock(mu_);
  for (const PrefillObservation& p : seen) {
    model_.Observe(
        PrefillSample{.new_tokens = p.new_tokens, .cached_tokens = p.cached_tokens, .seconds = p.seconds});
  }
}

double PrefillTimes::Seconds(uint64_t new_tokens, uint64_t cached_tokens) const {
  std::lock_guard lock(mu_);
  return model_.PrefillSeconds(new_tokens, cached_tokens);
}

}  // namespace tidepool
