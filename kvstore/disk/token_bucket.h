#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/time/time.h"

namespace tidepool {

// TokenBucket: so many bytes a second, and no more than a quarter of a second's worth (or one record) at
// once. Core; not thread-safe. A rate of 0 is no limit.
class TokenBucket {
 public:
  // `largest`: bytes of the largest thing that is ever asked for.
  TokenBucket(uint64_t bytes_per_second, uint64_t largest, absl::Time now)
      : rate_(static_cast<double>(bytes_per_second)),
        size_(std::max(rate_ / 4, static_cast<double>(largest))),
        tokens_(size_),
        refilled_(now) {}

  // How long until so many bytes may go; zero: now.
  absl::Duration Wait(uint64_t bytes, absl::Time now) {
    if (rate_ == 0) return absl::ZeroDuration();
    tokens_ = std::min(tokens_ + std::max(0.0, absl::ToDoubleSeconds(now - refilled_)) * rate_, size_);
    refilled_ = now;
    const auto wanted = static_cast<double>(bytes);
    return tokens_ >= wanted ? absl::ZeroDuration() : absl::Seconds((wanted - tokens_) / rate_);
  }
  // They go.
  void Take(uint64_t bytes) {
    if (rate_ != 0) tokens_ -= static_cast<double>(bytes);
  }

 private:
  double rate_, size_, tokens_;
  absl::Time refilled_;
};

}  // namespace tidepool
