#include "scheduler/rank_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "base/rng.h"

namespace tidepool {
namespace {

std::vector<WorkerIndex> First(const RankTree& tree, size_t n) {
  std::vector<WorkerIndex> out;
  tree.Walk([&](WorkerIndex i) {
    out.push_back(i);
    return out.size() < n;
  });
  return out;
}

TEST(RankTree, EmptyTreeHasNobody) {
  RankTree tree;
  EXPECT_TRUE(First(tree, 3).empty());
  tree.Set(0, {1});
  tree.Remove(0);
  tree.Remove(77);
  EXPECT_TRUE(First(tree, 3).empty());
}

TEST(RankTree, TiesGoByLoadThenName) {
  RankTree tree;
  tree.Set(0, {1, 2, 10});
  tree.Set(1, {1, 1, 30});
  tree.Set(2, {1, 1, 20});
  EXPECT_EQ(First(tree, 3), (std::vector<WorkerIndex>{2, 1, 0}));
}

TEST(RankTree, AgreesWithASortOverRandomChanges) {
  Rng rng(1);
  RankTree tree;
  std::map<WorkerIndex, std::tuple<double, uint64_t, uint64_t>> model;
  for (int step = 0; step < 5000; ++step) {
    const auto i = static_cast<WorkerIndex>(rng.Below(1 + static_cast<uint64_t>(step) / 20));
    if (rng.Chance(0.2)) {
      tree.Remove(i);
      model.erase(i);
    } else {
      const auto value = static_cast<double>(rng.Below(20));
      const uint64_t load = rng.Below(3);
      tree.Set(i, {value, load, i});
      model[i] = {value, load, i};
    }
    std::vector<std::pair<std::tuple<double, uint64_t, uint64_t>, WorkerIndex>> sorted;
    for (const auto& [w, key] : model) sorted.emplace_back(key, w);
    std::sort(sorted.begin(), sorted.end());
    const size_t n = 1 + rng.Below(12);
    const auto got = First(tree, n);
    ASSERT_EQ(got.size(), std::min(n, sorted.size()));
    for (size_t k = 0; k < got.size(); ++k) ASSERT_EQ(got[k], sorted[k].second) << "step " << step;
  }
}

}  // namespace
}  // namespace tidepool
