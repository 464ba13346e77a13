#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/bench_row.h"

namespace tidepool {

struct ArenaBenchOptions {
  int rounds = 200;                            // medians of so many
  absl::Duration timeout = absl::Seconds(10);  // of one round
};

// What taking 1, 10, 100 and 1,000 blocks from another process of this host costs, in place: from Fetch to
// its answer, with both processes asleep before; and what letting go of them costs the one that read them
// (one message; the owner's own work is not in it). Beside both what waking a sleeping process and being
// woken costs alone, which any handoff by message pays. Forks: call it before this process starts threads
// that hold locks. Errors: Unavailable (no second process), those of the fetches.
absl::StatusOr<std::vector<BenchRow>> RunArenaBench(const ArenaBenchOptions& options);

}  // namespace tidepool
