#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/bench_row.h"

namespace tidepool {

struct DiskBenchOptions {
  std::string path;                      // a directory on the disk to measure; what is made there is removed
  size_t block_bytes = size_t{2} << 20;  // a multiple of 4096
  size_t blocks = 512;                   // of each pass
  size_t read_depth = 16;
  size_t write_depth = 8;
  int rounds = 3;          // medians of so many; reference and tier take turns
  bool blob_db = true;     // RocksDB's blob files beside it
  bool open_large = true;  // the time to open an index of 100 GB
};

// Measures the disk tier against the disk: loads and stores beside fio at the same block size, depth and
// engine (where fio is not installed, a loop of direct I/O without checksums or copies, and the rows say so),
// loads while stores go on, the same with blocks that lie encoded
// without loss (of drawn numbers), RocksDB's BlobDB. Takes half a minute and 4 * blocks * block_bytes of
// disk. Errors name what failed.
absl::StatusOr<std::vector<BenchRow>> RunDiskBench(const DiskBenchOptions& options);

}  // namespace tidepool
