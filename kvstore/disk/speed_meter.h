#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "kvstore/block_tier.h"

namespace tidepool {

// SpeedMeter: TierSpeed of one direction. Core; not thread-safe.
class SpeedMeter {
 public:
  void OnStart(absl::Time now) {
    if (under_way_++ == 0) mark_ = now;
  }
  void OnEnd(uint64_t bytes, absl::Duration latency, absl::Time now) {
    window_seconds_ += absl::ToDoubleSeconds(now - mark_);
    mark_ = now;
    --under_way_;
    if (bytes == 0) return;  // it failed: no measure of speed
    const double seconds = absl::ToDoubleSeconds(latency);
    speed_.latency_seconds +=
        (speed_.latency_seconds == 0 ? 1 : kLatencyWeight) * (seconds - speed_.latency_seconds);
    window_bytes_ += static_cast<double>(bytes);
    if (window_seconds_ <= 0) return;
    const double rate = window_bytes_ / window_seconds_;
    if (window_seconds_ >= kWindowSeconds) {
      settled_ += (settled_ == 0 ? 1 : kRateWeight) * (rate - settled_);
      window_bytes_ = window_seconds_ = 0;
      speed_.bytes_per_second = settled_;
    } else if (settled_ == 0) {
      speed_.bytes_per_second = rate;  // better than nothing
    }
  }
  const TierSpeed& speed() const { return speed_; }

 private:
  // One in ten operations, and two or three windows, carry most of the weight: a disk that slows down shows
  // within a tenth of a second of work.
  static constexpr double kLatencyWeight = 0.1, kRateWeight = 0.4, kWindowSeconds = 0.02;

  uint32_t under_way_ = 0;
  absl::Time mark_;
  double window_seconds_ = 0, window_bytes_ = 0;  // of time with something under way
  double settled_ = 0;
  TierSpeed speed_;
};

}  // namespace tidepool
