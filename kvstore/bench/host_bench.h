#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "base/bench_row.h"

namespace tidepool {

struct HostBenchOptions {
  size_t block_bytes = size_t{1} << 20;  // a multiple of 16 KiB
  size_t blocks = 256;                   // distinct ones, so that no cache flatters anybody
  int rounds = 5;                        // medians of so many; pool and memcpy take turns
};

// The host tier beside memcpy between the same amounts of memory: put (reserve, copy in, publish) and get
// (lease a prefix, copy out, drop).
absl::StatusOr<std::vector<BenchRow>> RunHostBench(const HostBenchOptions& options);

struct IndexBenchOptions {
  uint32_t blocks = 10'000'000;  // published; about 300 bytes of memory each
  size_t prefix = 1000;          // blocks of one lookup
  int lookups = 501;             // median of so many, each of another prefix
};

// Lookup and lease of a long prefix in a full pool, beside the same many dependent reads of memory that no
// cache holds; and the memory that a pool takes for each block besides its bytes.
absl::StatusOr<std::vector<BenchRow>> RunIndexBench(const IndexBenchOptions& options);

}  // namespace tidepool
