#pragma once

#include <chrono>
#include <mutex>

#include "absl/time/time.h"

namespace tidepool {

// Clock: where "now" comes from. Values are on a monotonic clock's own epoch (never wall time), so they
// are only compared with values of the same process. Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;

  // The process's CLOCK_MONOTONIC.
  static const Clock& Real();
};

// FakeClock: moves only when told to.
class FakeClock final : public Clock {
 public:
  absl::Time Now() const override {
    std::lock_guard lock(mu_);
    return now_;
  }
  void Advance(absl::Duration d) {
    std::lock_guard lock(mu_);
    now_ += d;
  }

 private:
  mutable std::mutex mu_;
  absl::Time now_ = absl::UnixEpoch() + absl::Hours(1);
};

inline const Clock& Clock::Real() {
  class Monotonic final : public Clock {
    absl::Time Now() const override {
      return absl::UnixEpoch() + absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
    }
  };
  static const Monotonic clock;
  return clock;
}

}  // namespace tidepool
