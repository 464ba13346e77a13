#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "base/bench_row.h"

namespace tidepool {

struct KvBenchOptions {
  size_t block_bytes = size_t{1} << 20;  // of the suites that move bytes
  size_t bytes = size_t{256} << 20;      // distinct ones in each pass: more than any cache holds
  int rounds = 5;                        // medians of so many
  uint32_t index_blocks = 10'000'000;
  std::string disk_path;  // a directory on the disk to measure; empty: the temporary directory
  std::string model;      // of the suites that compute
  std::string trace;      // Mooncake's JSONL
};

// What `tidepool bench kv` can measure, one path of KV each.
struct KvBenchSuite {
  std::string_view name;
  std::string_view help;
  // What it needs beyond the machine: it runs by default only where that was given.
  bool (*ready)(const KvBenchOptions&);
  absl::StatusOr<std::vector<BenchRow>> (*run)(const KvBenchOptions&);
};
const std::vector<KvBenchSuite>& KvBenchSuites();

// Runs the suites named (empty: all that are ready) in their order. `progress` is told the name of each as it
// begins. InvalidArgument: no such suite; else the first error of a suite, with its name.
absl::StatusOr<std::vector<BenchRow>> RunKvBench(const std::vector<std::string>& names,
                                                 const KvBenchOptions& options,
                                                 const std::function<void(std::string_view)>& progress);

}  // namespace tidepool
