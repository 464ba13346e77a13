#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/bench_row.h"

namespace tidepool {

// What `tidepool bench kv` measures of whole workers: real ones, in this process, with a model of random
// weights that is made for it, over links and disks of a given speed.
struct WorkerBenchOptions {
  uint64_t link_bytes_per_second = 125'000'000;  // 1 Gbit/s
  uint32_t prompt_tokens = 1024;                 // one chunk
  int rounds = 5;                                // medians of so many
  std::string folder;                            // for models and disk tiers; empty: the temporary directory
};

// Time to the first token of a prompt of one chunk that one worker prefills and another decodes, over the
// link: with its KV sent layer by layer while it is computed, against after it. The model is one whose KV
// takes about as long to send as to compute, on this machine.
absl::StatusOr<std::vector<BenchRow>> BenchLayerStreaming(const WorkerBenchOptions& options);

// Time to the first token of a prompt whose blocks lie with a peer, over links of several speeds, against
// computing it: loading is never slower than that by more than 5 %, and faster where it can be.
absl::StatusOr<std::vector<BenchRow>> BenchLoadOrRecompute(const WorkerBenchOptions& options);

}  // namespace tidepool
