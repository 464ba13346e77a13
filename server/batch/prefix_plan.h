#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "server/batch/prompt_path.h"

namespace tidepool {

// In which order to run many prompts so that each prefix is computed once (Core; pure).
//
// The prompts' radix tree is cut into groups that share one prefix (BatchLLM's first-level prefixes,
// arXiv:2412.03594): each prompt belongs to a group at one of the nodes above it, at depth d, which saves d
// units for each of its members but the first. A short prefix keeps many together, a longer one saves more
// for fewer. The best choice by dynamic programming, for a node u with ends(u) prompts of its own, below a
// group at depth D that is open to it (0: none):
//
//   best(u, D) = max( ends(u) D           + sum_c best(c, D),          u's own join the group above
//                     (ends(u) - 1) d(u)  + sum_c best(c, d(u)) )      u opens a group
//   best(all)  = best(root, 0), with d(root) = 0
//
// Groups further up than kOpenGroupsMax nodes are left out of account, so that nested prompts stay linear.
//
// Order: trees (what shares nothing with others) by decode over prefill, high first, so that long answers are
// under way while prompts are computed; inside a tree depth first, so that a group begins when its
// neighbour's prefix was just used, and a prefix is not needed any more once its group ended.
//
// A group shares more than its first level where the pool keeps prefixes of every length, as ours does:
// `after` therefore follows the whole tree, not the groups alone.
inline constexpr uint32_t kOpenGroupsMax = 32;

struct PlannedPrompt {
  uint32_t item = 0;    // index into the input
  int32_t after = -1;   // position in the order of the one that computes the longest shared prefix; -1: none
  uint32_t shared = 0;  // units that it computes
  uint32_t group = 0;   // consecutive numbers
};

struct PrefixPlan {
  std::vector<PlannedPrompt> order;
  uint32_t groups = 0;
  uint64_t units = 0;                    // of all prompts
  uint64_t units_computed = 0;           // if each prefix is computed once
  uint64_t units_saved_first_level = 0;  // by the groups' own prefixes alone: best(all)
};

// Prefixes of fewer than min_shared units count as none. O(n log n) comparisons of paths.
PrefixPlan PlanPrefixes(std::span<const PromptPath> prompts, uint32_t min_shared = 2);

// Prompts as they come.
PrefixPlan PlanInOrder(std::span<const PromptPath> prompts);

}  // namespace tidepool
