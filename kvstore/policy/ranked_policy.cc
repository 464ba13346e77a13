#include "kvstore/policy/ranked_policy.h"

namespace tidepool {

void RankedPolicy::OnErase(uint32_t id, bool) { candidates_.Clear(id); }

void RankedPolicy::SetCandidate(uint32_t id, EvictionBand band) {
  const uint32_t lane = 2 * groups_[id] + static_cast<uint32_t>(band);
  if (!candidates_.contains(id) || candidates_.lane(id) != lane) candidates_.Set(id, lane, ranks_[id]);
}

std::optional<Candidates::Top> RankedPolicy::Lowest(uint32_t lane) {
  while (const auto top = candidates_.Lowest(lane)) {
    if (top->rank == ranks_[top->id]) return top;
    candidates_.Set(top->id, lane, ranks_[top->id]);
  }
  return std::nullopt;
}

std::optional<uint32_t> RankedPolicy::Victim(uint32_t group) {
  for (uint32_t band = 0; band < 2; ++band) {
    std::optional<Candidates::Top> best;
    const uint32_t first = group == kAnyGroup ? band : 2 * group + band;
    const uint32_t end = group == kAnyGroup ? candidates_.lanes() : first + 1;
    for (uint32_t lane = first; lane < end; lane += 2) {
      const auto top = Lowest(lane);
      if (top && (!best || top->rank < best->rank)) best = top;
    }
    if (best) return best->id;
  }
  return std::nullopt;
}

}  // namespace tidepool
