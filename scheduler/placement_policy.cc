#include "scheduler/placement_policy.h"

#include <algorithm>
#include <tuple>

namespace tidepool {

namespace {

constexpr uint64_t kImbalanceAbsolute = 64;  // of SGLang's router, as are the next two
constexpr double kImbalanceRelative = 1.5;
constexpr double kMatchMin = 0.3;
constexpr double kDiskCredit = 0.25;  // Dynamo's, of a block

// The seat with the least cost; the first of equals.
template <typename Cost>
size_t Least(std::span<const PolicySeat> seats, const Cost& cost) {
  size_t best = 0;
  for (size_t i = 1; i < seats.size(); ++i) {
    if (cost(seats[i]) < cost(seats[best])) best = i;
  }
  return best;
}

size_t LeastLoaded(std::span<const PolicySeat> seats) {
  return Least(seats, [](const PolicySeat& s) { return s.load; });
}

size_t PowerOfTwo(Rng& rng, std::span<const PolicySeat> seats) {
  if (seats.size() == 1) return 0;
  const size_t a = rng.Below(seats.size());
  size_t b = rng.Below(seats.size() - 1);
  if (b >= a) ++b;
  return std::tuple(seats[b].load, b) < std::tuple(seats[a].load, a) ? b : a;
}

size_t CacheAware(std::span<const PolicySeat> seats, uint32_t prompt_blocks) {
  const auto [least, most] = std::minmax_element(
      seats.begin(), seats.end(), [](const PolicySeat& a, const PolicySeat& b) { return a.load < b.load; });
  if (most->load - least->load > kImbalanceAbsolute &&
      static_cast<double>(most->load) > kImbalanceRelative * static_cast<double>(least->load)) {
    return LeastLoaded(seats);
  }
  const size_t best = Least(seats, [](const PolicySeat& s) { return -int64_t{s.held_blocks}; });
  if (seats[best].held_blocks >= kMatchMin * prompt_blocks) return best;
  return Least(seats, [](const PolicySeat& s) { return s.cached_blocks; });
}

double DynamoCost(const PolicySeat& s, uint32_t prompt_blocks) {
  const double credit = s.near_blocks + kDiskCredit * (s.held_blocks - s.near_blocks);
  const double prefill = static_cast<double>(s.queued_blocks) + prompt_blocks;
  return std::max(0.0, prefill - credit) + static_cast<double>(s.active_blocks);
}

}  // namespace

std::pair<std::optional<size_t>, size_t> ChooseByPolicy(PlacementPolicy policy, PolicyState& state,
                                                        std::span<const PolicySeat> prefills,
                                                        std::span<const PolicySeat> decodes,
                                                        uint32_t prompt_blocks) {
  // Where the decode workers prefill, they are chosen as prefill workers are.
  const bool apart = !prefills.empty();
  const std::span<const PolicySeat> first = apart ? prefills : decodes;
  size_t p = 0, d = 0;
  switch (policy) {
    case PlacementPolicy::kRandom:
      p = state.rng.Below(first.size());
      d = apart ? state.rng.Below(decodes.size()) : p;
      break;
    case PlacementPolicy::kRoundRobin:
      p = state.next_prefill++ % first.size();
      d = apart ? state.next_decode++ % decodes.size() : p;
      break;
    case PlacementPolicy::kPowerOfTwo:
      p = PowerOfTwo(state.rng, first);
      d = apart ? PowerOfTwo(state.rng, decodes) : p;
      break;
    case PlacementPolicy::kPrefixOnly:
      p = Least(first, [](const PolicySeat& s) { return std::tuple(-int64_t{s.held_blocks}, s.load); });
      d = LeastLoaded(decodes);
      break;
    case PlacementPolicy::kCacheAware:
      p = CacheAware(first, prompt_blocks);
      d = LeastLoaded(decodes);
      break;
    case PlacementPolicy::kDynamo:
      p = Least(first, [&](const PolicySeat& s) { return DynamoCost(s, prompt_blocks); });
      d = Least(decodes, [](const PolicySeat& s) { return s.active_blocks; });
      break;
    case PlacementPolicy::kMooncake:
      p = Least(first, [](const PolicySeat& s) { return s.ttft_seconds; });
      d = Least(decodes, [](const PolicySeat& s) { return s.itl_seconds; });
      break;
    case PlacementPolicy::kTidepool:
    case PlacementPolicy::kLeastLoaded:
      p = LeastLoaded(first);
      d = LeastLoaded(decodes);
      break;
  }
  if (!apart) return {std::nullopt, p};
  return {p, d};
}

}  // namespace tidepool
