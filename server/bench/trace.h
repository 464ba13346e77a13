#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/bench/session.h"

namespace tidepool {

struct TraceEntry {
  absl::Duration at;  // from the trace's first entry
  uint32_t input_tokens = 0, output_tokens = 0;
  // The prompt's blocks in order; equal ids stand for equal content under equal predecessors. Empty: the
  // prompt shares nothing.
  std::vector<uint64_t> blocks;
};

struct Trace {
  std::string format;               // mooncake, burstgpt, azure
  std::vector<TraceEntry> entries;  // ascending
  size_t left_out = 0;              // entries without input or output tokens (BurstGPT's failures)
};

// Reads a trace of any of these formats, found by its first line:
//   Mooncake JSONL  {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [n, ...]}
//   BurstGPT CSV    a header with Timestamp (seconds), "Request tokens", "Response tokens"
//   Azure CSV       a header with TIMESTAMP (date and time), ContextTokens, GeneratedTokens
// Errors: NotFound, or InvalidArgument as "FILE:LINE: what", also where entries go back in time by more than
// what the format's own rounding explains (they are put in order up to a second).
absl::StatusOr<Trace> ReadTrace(const std::string& path);
// The same from memory; `name` stands for the path in messages.
absl::StatusOr<Trace> ParseTrace(std::string_view text, const std::string& name);

struct TraceReplay {
  double speed = 1;             // 2: twice as fast
  double length_scale = 1;      // of all token counts, the blocks' size too
  uint32_t block_tokens = 512;  // Mooncake's
  // 0: none. Longer prompts lose their end, so that what prompts share stays shared; answers are cut.
  uint32_t input_tokens_max = 0, output_tokens_max = 0;
};

// Plays `trace` once. Blocks of equal id have equal content, whatever the seed's other uses.
std::unique_ptr<SessionSource> MakeSource(std::shared_ptr<const Trace> trace, const TraceReplay& replay,
                                          uint64_t seed);

}  // namespace tidepool
