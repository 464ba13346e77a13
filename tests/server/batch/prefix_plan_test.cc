#include "server/batch/prefix_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <string>

#include "base/rng.h"

namespace tidepool {
namespace {

// A letter is a unit; as in PathOf, an element stands for everything up to it.
PromptPath Path(const std::string& text, uint32_t decode = 10) {
  PromptPath path;
  uint64_t chain = 1469598103934665603ull;
  for (const char c : text) {
    chain = (chain ^ static_cast<uint64_t>(c)) * 1099511628211ull;
    path.units.push_back(chain);
  }
  path.decode_tokens = decode;
  return path;
}

std::vector<PromptPath> Paths(const std::vector<std::string>& texts) {
  std::vector<PromptPath> out;
  for (const std::string& text : texts) out.push_back(Path(text));
  return out;
}

// All distinct prefixes: what must be computed at least.
uint64_t DistinctPrefixes(const std::vector<PromptPath>& prompts) {
  std::set<uint64_t> seen;
  for (const PromptPath& p : prompts) seen.insert(p.units.begin(), p.units.end());
  return seen.size();
}

void CheckPlan(const std::vector<PromptPath>& prompts, const PrefixPlan& plan, uint32_t min_shared) {
  ASSERT_EQ(plan.order.size(), prompts.size());
  std::set<uint32_t> items;
  uint64_t computed = 0;
  for (size_t i = 0; i < plan.order.size(); ++i) {
    const PlannedPrompt& one = plan.order[i];
    EXPECT_TRUE(items.insert(one.item).second);
    const auto& units = prompts[one.item].units;
    // Nobody before it shares more than what the one it waits for computes.
    size_t longest = 0;
    for (size_t j = 0; j < i; ++j) {
      const auto& other = prompts[plan.order[j].item].units;
      const auto [x, y] = std::ranges::mismatch(units, other);
      longest = std::max(longest, static_cast<size_t>(x - units.begin()));
    }
    EXPECT_EQ(one.shared, longest < min_shared ? 0 : longest) << "at " << i;
    if (one.after >= 0) {
      ASSERT_LT(one.after, static_cast<int32_t>(i));
      const auto& leader = prompts[plan.order[static_cast<size_t>(one.after)].item].units;
      const auto [x, y] = std::ranges::mismatch(units, leader);
      EXPECT_EQ(static_cast<size_t>(x - units.begin()), one.shared);
    }
    computed += units.size() - one.shared;
  }
  EXPECT_EQ(plan.units_computed, computed);
}

TEST(PrefixPlan, ComputesEachPrefixOnce) {
  const auto prompts = Paths({"abcx", "zz", "abcy", "abdz", "abcx1", "zzq"});
  const PrefixPlan plan = PlanPrefixes(prompts);
  CheckPlan(prompts, plan, 2);
  EXPECT_EQ(plan.units_computed, DistinctPrefixes(prompts));
}

TEST(PrefixPlan, HoldsForRandomTrees) {
  Rng rng(7);
  for (int round = 0; round < 300; ++round) {
    std::vector<PromptPath> prompts;
    const size_t n = rng.Next() % 40;
    for (size_t i = 0; i < n; ++i) {
      std::string text;
      const size_t length = rng.Next() % 9;
      for (size_t k = 0; k < length; ++k) text.push_back(static_cast<char>('a' + rng.Next() % 2));
      prompts.push_back(Path(text, static_cast<uint32_t>(rng.Next() % 50)));
    }
    const uint32_t min_shared = 1 + static_cast<uint32_t>(rng.Next() % 3);
    const PrefixPlan plan = PlanPrefixes(prompts, min_shared);
    CheckPlan(prompts, plan, min_shared);
    if (min_shared == 1) {
      EXPECT_EQ(plan.units_computed, DistinctPrefixes(prompts));
    }
  }
}

// best(root) by trying every way to give each prompt a group at one of its prefixes.
uint64_t BestByTrying(const std::vector<std::string>& texts) {
  std::vector<size_t> level(texts.size(), 0);
  uint64_t best = 0;
  for (;;) {
    std::map<std::string, uint64_t> groups;
    for (size_t i = 0; i < texts.size(); ++i) ++groups[texts[i].substr(0, level[i])];
    uint64_t saved = 0;
    for (const auto& [prefix, n] : groups) saved += (n - 1) * prefix.size();
    best = std::max(best, saved);
    size_t i = 0;
    while (i < texts.size() && level[i] == texts[i].size()) level[i++] = 0;
    if (i == texts.size()) return best;
    ++level[i];
  }
}

TEST(PrefixPlan, FirstLevelChoiceSavesTheMostThereIs) {
  Rng rng(11);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::string> texts;
    for (int i = 0; i < 5; ++i) {
      std::string text;
      const size_t length = 1 + rng.Next() % 5;
      for (size_t k = 0; k < length; ++k) text.push_back(static_cast<char>('a' + rng.Next() % 2));
      texts.push_back(text);
    }
    EXPECT_EQ(PlanPrefixes(Paths(texts), 1).units_saved_first_level, BestByTrying(texts))
        << texts[0] << " " << texts[1] << " " << texts[2] << " " << texts[3] << " " << texts[4];
  }
}

TEST(PrefixPlan, SplitsAGroupWhereALongerPrefixSavesMore) {
  // Two families of long prefixes under a short common one: each its own group.
  const auto prompts = Paths({"aabbbbbbbb1", "aacccccccc1", "aabbbbbbbb2", "aacccccccc2"});
  const PrefixPlan plan = PlanPrefixes(prompts);
  EXPECT_EQ(plan.groups, 2u);
  EXPECT_EQ(plan.units_saved_first_level, 20u);
  // One prompt with a little more in common with another stays with all.
  const auto together = Paths({"aaaaaaaa1", "aaaaaaaab2", "aaaaaaaab3", "aaaaaaaa4"});
  EXPECT_EQ(PlanPrefixes(together).groups, 1u);
}

TEST(PrefixPlan, GroupsAreContiguous) {
  Rng rng(3);
  std::vector<PromptPath> prompts;
  for (int i = 0; i < 300; ++i) {
    std::string text(1 + rng.Next() % 12, 'a');
    for (char& c : text) c = static_cast<char>('a' + rng.Next() % 3);
    prompts.push_back(Path(text));
  }
  const PrefixPlan plan = PlanPrefixes(prompts);
  std::set<uint32_t> ended;
  for (size_t i = 1; i < plan.order.size(); ++i) {
    if (plan.order[i].group == plan.order[i - 1].group) continue;
    ended.insert(plan.order[i - 1].group);
    EXPECT_FALSE(ended.contains(plan.order[i].group));
  }
}

TEST(PrefixPlan, LongAnswersGoFirst) {
  std::vector<PromptPath> prompts = {Path("aaaaaaaaaa", 1), Path("bbbbbbbbbb", 100), Path("cccccccccc", 10)};
  const PrefixPlan plan = PlanPrefixes(prompts);
  EXPECT_EQ(plan.order[0].item, 1u);
  EXPECT_EQ(plan.order[1].item, 2u);
  EXPECT_EQ(plan.order[2].item, 0u);
}

TEST(PrefixPlan, ManyEqualAndNestedPromptsAreQuick) {
  std::vector<PromptPath> prompts;
  PromptPath chain;
  for (uint64_t i = 0; i < 3000; ++i) {
    chain.units.push_back(i);
    prompts.push_back(chain);
    prompts.push_back(chain);
  }
  const PrefixPlan plan = PlanPrefixes(prompts);
  EXPECT_EQ(plan.units_computed, 3000u + 2);  // two of one unit, which is below what counts as shared
}

TEST(PrefixPlan, NothingToPlan) {
  EXPECT_TRUE(PlanPrefixes({}).order.empty());
  const auto one = Paths({""});
  EXPECT_EQ(PlanPrefixes(one).order.size(), 1u);
}

}  // namespace
}  // namespace tidepool
