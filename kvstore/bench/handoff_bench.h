#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/bench_row.h"
#include "kvstore/fetch_types.h"

namespace tidepool {

struct HandoffBenchOptions {
  size_t block_bytes = size_t{2} << 20;  // a multiple of 64 KiB
  size_t pass_bytes =
      size_t{256} << 20;  // distinct blocks, each fetched once a pass: no cache flatters anybody
  int rounds = 5;         // each measures everything once, in turns; medians are reported
  size_t lanes = 1;       // connections between the two
  std::string only;       // rows whose name contains it
  FetchFlow flow;
  absl::Duration timeout = absl::Minutes(5);  // of the whole run
};

// FetchNode between two processes, which it forks (so: call it before this process starts threads that hold
// locks, and without a UCX context of its own): one fetch of all blocks, HELLO to COMMIT_ACK with both sides'
// checksums, over UCX on TCP (beside UCX's own tag messages over TCP, which check nothing) and over shared
// memory, as `shm` chooses, in chunks (`posix`) and by reads across processes (`posix,cma`), beside memcpy of
// one thread. `first` rows are of blocks that were never sent before, `fetch` rows of blocks whose checksums
// the holder has kept. Memory: 4 * pass_bytes. Errors: InvalidArgument (options), those of CreateTransport
// and of the fetches, Unavailable.
absl::StatusOr<std::vector<BenchRow>> RunHandoffBench(const HandoffBenchOptions& options);

}  // namespace tidepool
