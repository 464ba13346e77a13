#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kvstore/types.h"
#include "scheduler/types.h"
#include "server/bench/random.h"
#include "server/bench/trace.h"

namespace tidepool {

// Nanoseconds since the start of a run: whole numbers, so that equal runs are equal to the last event.
using SimTime = int64_t;
constexpr SimTime kSimSecond = 1'000'000'000;
constexpr SimTime FromSeconds(double s) { return static_cast<SimTime>(s * 1e9 + 0.5); }
constexpr double ToSeconds(SimTime t) { return static_cast<double>(t) * 1e-9; }

struct SimRequest {
  SimTime at = 0;
  uint32_t prompt_tokens = 0;
  uint32_t output_tokens = 0;  // >= 1
  uint32_t tenant = 0;         // index into Workload::tenants
  SloClass slo_class = SloClass::kStandard;
  // Content of the prompt, and of the answer as far as it is known: Workload::ids [first, first + count).
  uint32_t count = 0;
  uint64_t first = 0;
};

// Workload: requests in the order of arrival, and what their prompts are made of. An id stands for a stretch
// of `stretch_tokens` tokens after the stretches before it (a chained hash): equal ids, equal content.
struct Workload {
  std::string name;
  std::string format;  // mooncake, burstgpt, azure, synthetic
  uint32_t stretch_tokens = 512;
  std::vector<SimRequest> requests;
  std::vector<uint32_t> ids;
  std::vector<std::string> tenants = {"default"};
  uint64_t left_out = 0;  // entries of the trace that say nothing to simulate (no input or output tokens)

  SimTime span() const { return requests.empty() ? 0 : requests.back().at - requests.front().at; }
  // Keys of the blocks of block_tokens that the first `tokens` tokens of prompt and answer seal. Those beyond
  // what the ids cover have no key. block_tokens divides stretch_tokens.
  void Keys(const SimRequest& request, uint32_t tokens, uint32_t block_tokens,
            std::vector<BlockKey>& out) const;
};

// The name of stretch `id`'s sub-block.
BlockKey SimBlockKey(uint64_t id);

struct TraceOptions {
  double speed = 1;         // arrivals come that many times as fast
  double length_scale = 1;  // of all token counts, and of the stretches
  uint64_t requests = 0;    // the first so many; 0: all
};

// Of a trace that ReadTrace (server/bench/trace.h) has read: Mooncake's with its hash_ids; BurstGPT's and
// Azure's tell lengths only, so their prompts share nothing. InvalidArgument: an option out of its range.
absl::StatusOr<Workload> FromTrace(const Trace& trace, std::string name, const TraceOptions& options);

struct TenantShare {
  std::string name;
  double weight = 1;
};

// A mix of conversations: sessions arrive as a Poisson process (or burstier); each has turns whose prompt is
// all that was said before and something new, a while after the turn before it could be expected to have
// ended. Prompts of one tenant begin with the same system prompt. `rate` counts requests, not sessions. The
// mix is steady from the first request on: conversations that began earlier go on.
struct SyntheticOptions {
  double rate = 10;  // requests a second, on average
  uint64_t requests = 10'000;
  double burst = 1;  // coefficient of variation of the gaps between sessions (gamma); 1: Poisson
  LengthSpec input = LengthSpec::Fixed(1000);  // new tokens of a turn
  LengthSpec output = LengthSpec::Fixed(200);  // of an answer
  LengthSpec turns = LengthSpec::Fixed(1);     // of a session
  LengthSpec system = LengthSpec::Fixed(0);    // tokens that all prompts of a tenant begin with; 0: none
  double think_seconds = 30;                   // mean, exponential, between an answer and the next turn
  double answer_seconds = 5;                   // what an answer is taken to last when turns are planned
  uint32_t prompt_max = 0;                     // a session ends before a prompt grows longer; 0: no limit
  std::vector<TenantShare> tenants = {{"default", 1}};
  double interactive_share = 0, batch_share = 0;  // of requests; the rest is standard
  uint32_t stretch_tokens = 512;
};
absl::StatusOr<Workload> MakeSynthetic(const SyntheticOptions& options, uint64_t seed);

// "a:10,b:1,c": names with weights (1 where none is given).
absl::StatusOr<std::vector<TenantShare>> ParseTenantShares(std::string_view text);

}  // namespace tidepool
