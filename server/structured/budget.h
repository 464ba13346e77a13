#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/status/status.h"
#include "server/structured/limits.h"

namespace tidepool::structured {

// Budget: what one compilation has used of its limits. Every loop whose length a client chooses calls Work.
// Owned by one thread.
class Budget {
 public:
  explicit Budget(const CompileLimits& limits);

  const CompileLimits& limits() const { return limits_; }

  // `steps` elementary steps were done. ResourceExhausted once the CPU time is used up; the clock is looked
  // at every kStepsPerLook steps only.
  absl::Status Work(size_t steps = 1) {
    steps_ += steps;
    return steps_ < next_look_ ? absl::OkStatus() : Look();
  }
  // The same, looking at the clock now.
  absl::Status LookNow() { return Look(); }
  // `states` more states exist (of any automaton, also such that are thrown away later). ResourceExhausted.
  absl::Status AddStates(size_t states);
  // A nondeterministic automaton, of which there is one at a time, has this many states. ResourceExhausted.
  absl::Status CheckNfa(size_t states) const;
  // The states of a temporary automaton are gone.
  void DropStates(size_t states) { states_ -= states < states_ ? states : states_; }

 private:
  static constexpr size_t kStepsPerLook = 2048;
  absl::Status Look();
  absl::Status TooManyStates() const;

  const CompileLimits limits_;
  const int64_t start_ns_;
  size_t steps_ = 0, next_look_ = kStepsPerLook, states_ = 0;
};

}  // namespace tidepool::structured
