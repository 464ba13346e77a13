#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/time/time.h"

namespace tidepool {

// FetchWindow: how many bytes a receiver lets be on their way to it over one connection. Core. Enough to keep
// the link busy, little enough that a small fetch that comes next does not wait behind it for long: the
// bytes that arrive within `target` at the speed last seen (as BBR paces by bandwidth times delay,
// Cardwell et al. 2016, with a target in place of the measured delay, because the queue to be kept short is
// the sender's). A window that is too small for the link is filled faster than `target` and grows by that
// ratio each time.
class FetchWindow {
 public:
  struct Options {
    uint64_t min = 1 << 20;
    uint64_t max = 32 << 20;
    uint64_t start = 4 << 20;
    absl::Duration target = absl::Milliseconds(10);
  };

  explicit FetchWindow(const Options& options)
      : options_(options), bytes_(std::clamp(options.start, options.min, options.max)) {}

  uint64_t bytes() const { return bytes_; }

  // The link was idle until now.
  void Restart(absl::Time now) {
    since_ = now;
    arrived_ = 0;
  }
  void OnArrived(uint64_t bytes, absl::Time now) {
    arrived_ += bytes;
    const absl::Duration took = now - since_;
    // A measure over much less than a window is of the burst at its start.
    if (arrived_ < bytes_ || took <= absl::ZeroDuration()) return;
    const double speed = static_cast<double>(arrived_) / absl::ToDoubleSeconds(took);
    // Up at once, down slowly: a sender that had nothing to send looks like a slow link.
    speed_ = speed > speed_ ? speed : speed_ + (speed - speed_) / 4;
    const double want = speed_ * absl::ToDoubleSeconds(options_.target);
    bytes_ = want >= static_cast<double>(options_.max) ? options_.max
                                                       : std::max(options_.min, static_cast<uint64_t>(want));
    Restart(now);
  }

 private:
  const Options options_;
  uint64_t bytes_;
  double speed_ = 0;  // bytes a second
  absl::Time since_ = absl::InfinitePast();
  uint64_t arrived_ = 0;
};

}  // namespace tidepool
