#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/bench_row.h"
#include "transport/factory.h"

namespace tidepool {

struct TransportBenchOptions {
  size_t block_bytes = 2 << 20;
  size_t pass_bytes = 256 << 20;  // distinct blocks, each touched once: no cache flatters anybody
  int rounds = 5;                 // each measures everything once, in turns; medians are reported
  size_t in_flight = 16;          // blocks handed to the transport at once
  // The transports to measure; each by the name of its row. Where the list is empty: `shm` from shared and
  // from private memory and UCX's FIFO (`posix`), against memcpy; TCP on loopback, against UCX's own tag
  // messages.
  struct Subject {
    std::string name;
    TransportOptions transport;
    // Blocks are sent from memory that the transport may let its peer map, as a pool's is; else from private.
    bool from_shared_memory = false;
    bool against_memcpy = false;  // else against UCX tag messages over `reference_tls`
    std::string reference_tls = "tcp";
  };
  std::vector<Subject> subjects;
  absl::Duration timeout = absl::Minutes(5);  // of the whole run
};

// Bulk bandwidth between two processes, which it forks (so: call it before this process starts threads that
// hold locks, and without a UCX context of its own). Memory: 3 * pass_bytes. Errors: InvalidArgument
// (options), those of CreateTransport, DeadlineExceeded.
absl::StatusOr<std::vector<BenchRow>> RunTransportBench(const TransportBenchOptions& options);

}  // namespace tidepool
