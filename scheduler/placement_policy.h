#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include "base/rng.h"
#include "scheduler/options.h"
#include "scheduler/types.h"

// The baselines of PlacementPolicy, over plain numbers: what each published router looks at, and nothing
// else. Ties go to the lower `name` (that is: id) but where a policy draws.
namespace tidepool {

// What a baseline draws or counts from one decision to the next.
struct PolicyState {
  explicit PolicyState(uint64_t seed) : rng(seed) {}
  Rng rng;
  uint64_t next_prefill = 0, next_decode = 0;  // kRoundRobin
};

// One worker that could prefill, or decode, the request.
struct PolicySeat {
  uint64_t name = 0;
  uint64_t load = 0;           // requests there
  uint32_t held_blocks = 0;    // of the prompt
  uint32_t near_blocks = 0;    // of those, in the host tier
  uint64_t cached_blocks = 0;  // in all, of anything
  uint64_t queued_blocks = 0;  // prompts that wait to be computed, in blocks
  uint64_t active_blocks = 0;  // contexts that are being decoded
  // kMooncake: until the first token, with what is there or fetched as its rule says.
  double ttft_seconds = 0;
  double itl_seconds = 0;  // of a step now
};

// Indices into `prefills` and `decodes`, which are in order of name. `prefills` is empty where nobody but
// decode workers can prefill: then the second is where all of it happens. `decodes` is not empty.
// `prompt_blocks` >= 1.
//
//   kRandom       uniform
//   kRoundRobin   the next one
//   kLeastLoaded  fewest requests
//   kPowerOfTwo   of two different ones drawn, fewer requests (Mitzenmacher, 2001)
//   kPrefixOnly   longest prefix, then fewest requests; decode: fewest requests
//   kCacheAware   SGLang's router: where the longest and the shortest queue differ by more than 64 requests
//   and by
//                 1.5 times, the shortest; else the best prefix if it matches 30% of the prompt, else the
//                 worker that has cached least; decode: fewest requests
//   kDynamo       NVIDIA Dynamo's: blocks to prefill (queued and its own, less what is cached: a block on
//   disk
//                 counts a quarter) + blocks being decoded; decode: blocks being decoded
//   kMooncake     least ttft_seconds; decode: least itl_seconds
std::pair<std::optional<size_t>, size_t> ChooseByPolicy(PlacementPolicy policy, PolicyState& state,
                                                        std::span<const PolicySeat> prefills,
                                                        std::span<const PolicySeat> decodes,
                                                        uint32_t prompt_blocks);

}  // namespace tidepool
