#pragma once

#include <mutex>
#include <span>

#include "scheduler/latency_model.h"
#include "server/engine/types.h"

namespace tidepool {

// PrefillTimes: what prefills take on this worker: a LatencyModel that any thread may ask.
class PrefillTimes {
 public:
  void Observe(std::span<const PrefillObservation> seen);
  // Seconds of computing `new_tokens` after `cached_tokens`.
  double Seconds(uint64_t new_tokens, uint64_t cached_tokens) const;

 private:
  mutable std::mutex mu_;
  LatencyModel model_;
};

}  // namespace tidepool
