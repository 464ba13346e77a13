#include "server/structured/budget.h"

#include <time.h>

#include "absl/strings/str_cat.h"

namespace tidepool::structured {
namespace {

int64_t ThreadCpuNs() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

Budget::Budget(const CompileLimits& limits) : limits_(limits), start_ns_(ThreadCpuNs()) {}

absl::Status Budget::Look() {
  next_look_ = steps_ + kStepsPerLook;
  if (ThreadCpuNs() - start_ns_ <= absl::ToInt64Nanoseconds(limits_.cpu_time_max)) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("compiling it takes longer than the limit of ",
                                                   absl::ToInt64Milliseconds(limits_.cpu_time_max),
                                                   " ms; simplify it"));
}

absl::Status Budget::TooManyStates() const {
  return absl::ResourceExhaustedError(
      absl::StrCat("it needs more than the limit of ", limits_.states_max, " automaton states; simplify it"));
}

absl::Status Budget::AddStates(size_t states) {
  states_ += states;
  return states_ > limits_.states_max ? TooManyStates() : Work(states);
}

absl::Status Budget::CheckNfa(size_t states) const {
  // Each is a multiple of a deterministic state in memory and in time.
  return states > limits_.states_max / 4 ? TooManyStates() : absl::OkStatus();
}

}  // namespace tidepool::structured
