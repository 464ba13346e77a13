#pragma once

#include <string>
#include <utility>

#include "absl/time/time.h"
#include "kvstore/block_tier.h"

namespace tidepool {

// TierBreaker: whether a tier is on, and when to look at one that is off. Core. Pauses double with each
// failure, those included that come soon after it was switched on again, so that a disk that comes and goes
// is not hammered.
class TierBreaker {
 public:
  struct Options {
    absl::Duration probe_after = absl::Milliseconds(500);
    absl::Duration probe_after_max = absl::Seconds(15);
    // On for so long: sound again, the next pause is the first one.
    absl::Duration sound_after = absl::Seconds(60);
  };

  explicit TierBreaker(const Options& options) : options_(options), pause_(options.probe_after) {}

  const TierHealth& health() const { return health_; }
  bool on() const { return health_.state == TierState::kOn; }

  // Switches off. While it is off already, the first reason stays unless a probe found another.
  void Fail(std::string reason, absl::Time now) {
    if (on() && now - on_since_ >= options_.sound_after) pause_ = options_.probe_after;
    health_ = {TierState::kOff, std::move(reason)};
    next_probe_ = now + pause_;
    pause_ = std::min(2 * pause_, options_.probe_after_max);
  }
  void Recover(absl::Time now) {
    if (health_.state == TierState::kOpening) pause_ = options_.probe_after;
    health_ = {TierState::kOn, ""};
    on_since_ = now;
  }
  // When to look; only while it is off.
  absl::Time next_probe() const { return next_probe_; }

 private:
  const Options options_;
  TierHealth health_{TierState::kOpening, ""};
  absl::Duration pause_;
  absl::Time next_probe_ = absl::InfinitePast();
  absl::Time on_since_ = absl::InfinitePast();
};

}  // namespace tidepool
