#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "kvstore/policy/candidates.h"
#include "kvstore/policy/policy.h"

namespace tidepool {

// RankedPolicy: what all policies here share: every entry has a rank, and the candidate with the lowest goes.
// Ranks change in place; a candidate's position in the heap is corrected when it comes up, which is right as
// long as ranks only rise between two looks. A policy whose ranks fall says so (Moved).
class RankedPolicy : public EvictionPolicy {
 public:
  explicit RankedPolicy(uint32_t capacity) : ranks_(capacity), groups_(capacity), candidates_(capacity) {}

  void OnErase(uint32_t id, bool evicted) override;
  void SetCandidate(uint32_t id, EvictionBand band) override;
  void ClearCandidate(uint32_t id) override { candidates_.Clear(id); }
  std::optional<uint32_t> Victim(uint32_t group) override;

 protected:
  // To be called first thing in OnInsert.
  void Enter(uint32_t id, uint32_t group) { groups_[id] = group; }
  Rank& rank(uint32_t id) { return ranks_[id]; }
  // The rank fell.
  void Moved(uint32_t id) {
    if (candidates_.contains(id)) candidates_.Set(id, candidates_.lane(id), ranks_[id]);
  }

 private:
  std::optional<Candidates::Top> Lowest(uint32_t lane);

  std::vector<Rank> ranks_;
  std::vector<uint32_t> groups_;
  Candidates candidates_;  // lane: 2 * group + band
};

}  // namespace tidepool
