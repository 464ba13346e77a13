#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/simulate/profile.h"
#include "tools/simulate/result.h"
#include "tools/simulate/simulation.h"
#include "tools/simulate/workload.h"

namespace tidepool {

// Everything that makes a run.
struct SimPlan {
  SimOptions sim;
  WorkerProfile profile;
  std::string trace;  // a file; empty: `synthetic`
  TraceOptions replay;
  SyntheticOptions synthetic;
};

// Sets what `key` names: the flags' names without dashes, and pd (P:D). InvalidArgument: no such key, or a
// value that it does not take; the message lists what there is.
absl::Status Set(SimPlan& plan, std::string_view key, std::string_view value);
std::vector<std::string> SweepKeys();

struct SweepKey {
  std::string key;
  std::vector<std::string> values;
};
// "KEY=a,b,c".
absl::StatusOr<SweepKey> ParseSweepKey(std::string_view text);

// `done` of `runs` have ended, and of those that run this share, on average.
using SweepProgress = std::function<void(size_t done, size_t runs, double share)>;

// Runs the plan with every combination of the keys' values, the last key varying fastest, `jobs` at a time
// (each by itself on one thread: results do not depend on `jobs`). No keys: one run. The first error ends it.
absl::StatusOr<std::vector<SimResult>> RunSweep(const SimPlan& plan, const std::vector<SweepKey>& keys,
                                                unsigned jobs, const SweepProgress& progress = {});

}  // namespace tidepool
