#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tidepool {

// One request of a trace: which blocks its prompt is made of, as numbers that stand for chained hashes (equal
// numbers: equal block after equal blocks), and whose turn it is.
struct TraceRequest {
  uint64_t at_ms = 0;
  uint32_t input_tokens = 0;
  uint32_t output_tokens = 0;
  std::vector<uint32_t> blocks;
  uint64_t session = 0;  // 0: the trace does not say, and none was recognised
  uint32_t turn = 0;
};

struct BlockTrace {
  std::vector<TraceRequest> requests;  // in the order of arrival
  uint64_t blocks = 0;                 // of all requests
  uint32_t distinct_blocks = 0;        // ids are below this
};

// Mooncake's format: a line of JSON per request, {"timestamp": ms, "input_length", "output_length",
// "hash_ids"}. Blocks are of 512 tokens; the last one of a prompt may be partial and has an id all
// the same. InvalidArgument names the line and what is wrong with it.
inline constexpr uint32_t kMooncakeBlockTokens = 512;
absl::StatusOr<BlockTrace> ParseMooncakeTrace(std::string_view text);
absl::StatusOr<BlockTrace> ReadMooncakeTrace(const std::string& path);

// Fills in sessions and turns of a trace that does not name them: a request of which at least `shared` blocks
// were seen before carries on the conversation of the request that used the last of those last. With 2, the
// first block (which all share) does not count, and the measures of ALGORITHMS.md section 2 come out.
void RecogniseSessions(BlockTrace& trace, size_t shared = 2);

// How a request meets the pool. Published simulations differ in this, and their figures with it.
enum class ReplayMode : uint8_t {
  kRequests,  // it leases the prefix that is there, publishes the rest and lets go of all of it, as requests
              // do
  kBlocks,  // it lets go of each block before the next is placed, which may take the place of the one before
  kUnlinked,  // as kBlocks, and the pool is not told that blocks form chains: no block is kept for its
              // children
};

struct ReplayOptions {
  uint32_t slots = 0;  // 0: as many as the trace has distinct blocks
  std::string policy = "lru";
  uint64_t turn_bonus = 0;  // of turn-aware; 0: measured
  // False: the last block of a prompt is left out unless it is full, as a pool does that holds sealed blocks
  // only.
  bool partial_blocks = true;
  ReplayMode mode = ReplayMode::kRequests;
};

struct ReplayResult {
  uint64_t blocks = 0;  // looked up, partial ones too
  uint64_t hits = 0;    // found: prefixes only, a hit after a miss is none
  uint64_t evictions = 0;
  uint64_t session_turns = 0;  // requests that the pool took for a further turn
  double seconds = 0;          // what the replay took

  double hit_rate() const {
    return blocks == 0 ? 0 : static_cast<double>(hits) / static_cast<double>(blocks);
  }
};

// Runs the trace through a BlockPool (the real one; its blocks are of a few bytes): each request leases the
// prefix that is there, publishes the rest and lets go of both before the next comes. What does not fit
// beside it is not kept.
absl::StatusOr<ReplayResult> ReplayTrace(const BlockTrace& trace, const ReplayOptions& options);

// A hit rate of Mooncake's conversation trace that an independent replay found (ALGORITHMS.md), and how it is
// reproduced: to the last of its digits.
//
// Two simulators made those figures. The table of section 1.1 lets go of each block at once, so its oracle
// may decline to keep a block at all, and its LRU knows no chains; that of section 2 holds what a request
// uses until it ends and evicts chains from their tails, as the pool does. Where both have LRU at 10,000
// blocks they say .211 and 21.2%.
struct PublishedHitRate {
  ReplayOptions options;
  bool sessions = false;  // RecogniseSessions comes first
  double rate = 0;
  int digits = 3;  // of the rate, after the point
};
const std::vector<PublishedHitRate>& PublishedHitRates();

}  // namespace tidepool
