#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "base/block_layout.h"

namespace tidepool {

// WorkerProfile: what one simulated worker is: how long an engine step takes, what its memory holds, how fast
// its link is. A roofline of one step over prefills i (n_i new tokens after c_i) and a decode batch of B
// sequences with C tokens of context in all:
//
//   step = overhead + max(weights, token * sum n_i + sequence * B)    matrices: read once, or computed
//        + pair * sum n_i * (c_i + n_i / 2)                           attention of the prefills
//        + context * C                                                KV that the decodes read
//
// The same step serves prefill workers (B = 0), decode workers (no n_i) and both. What the scheduler's
// LatencyModel fits has no max() in it: its predictions are as wrong here as they are there.
struct WorkerProfile {
  std::string name;
  std::string about;
  BlockLayout layout;
  uint32_t max_model_len = 0;
  uint32_t pool_blocks = 0;  // of the host tier (device memory counts as part of it)
  uint32_t max_batch = 0;
  uint32_t max_step_tokens = 0;
  uint32_t max_waiting = 256;

  double overhead_seconds = 0;
  double weights_seconds = 0;
  double token_seconds = 0;
  double sequence_seconds = 0;
  double pair_seconds = 0;
  double context_seconds = 0;

  double link_bytes_per_second = 0;  // each direction, shared fairly by the transfers that use it
  double link_latency_seconds = 0;
  double control_seconds = 0;  // a message between processes
  double jitter = 0;           // standard deviation of the logarithm of a step's time

  double slo_ttft_seconds = 0;
  double slo_itl_seconds = 0;

  // What an idle worker takes for a prompt of `new_tokens` after `cached`, in steps of max_step_tokens.
  double PrefillSeconds(uint64_t new_tokens, uint64_t cached) const;
  double DecodeStepSeconds(uint64_t batch, uint64_t context_tokens) const;
};

// Reads a profile. `name`: a path (with a '/' or ending in .yaml), or the name of a file in config/profiles,
// looked for in the working directory and then below `source_dir`. Errors: NotFound lists the profiles there
// are; InvalidArgument names the file, the field, its limit and what to do.
absl::StatusOr<WorkerProfile> LoadProfile(std::string_view name, std::string_view source_dir);
absl::StatusOr<WorkerProfile> ParseProfile(const std::string& text, const std::string& file);

}  // namespace tidepool
