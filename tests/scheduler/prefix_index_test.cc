#include "scheduler/prefix_index.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "base/rng.h"
#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

std::vector<uint32_t> Match(const PrefixIndex& index, const std::vector<BlockKey>& keys, size_t workers) {
  std::vector<uint32_t> out;
  index.Match(keys, workers, out);
  return out;
}

TEST(PrefixIndex, CountsRunsFromTheFirstBlock) {
  PrefixIndex index(100);
  const auto keys = ChainKeys("a", 4);
  for (uint32_t i : {0, 1, 2}) index.Add(keys[i], 0);
  for (uint32_t i : {1, 2, 3}) index.Add(keys[i], 1);  // lacks the head: worth nothing
  for (uint32_t i : {0, 2}) index.Add(keys[i], 2);
  EXPECT_EQ(Match(index, keys, 4), (std::vector<uint32_t>{3, 0, 1, 0}));
}

TEST(PrefixIndex, AddingTwiceCountsOnce) {
  PrefixIndex index(100);
  index.Add(ChainKey("a", 0), 0);
  index.Add(ChainKey("a", 0), 0);
  EXPECT_EQ(index.entries(), 1u);
  index.Remove(ChainKey("a", 0), 0);
  index.Remove(ChainKey("a", 0), 0);
  EXPECT_EQ(index.entries(), 0u);
}

TEST(PrefixIndex, FullIndexIgnoresAndCountsButStillRemoves) {
  PrefixIndex index(2);
  for (uint32_t i = 0; i < 5; ++i) index.Add(ChainKey("a", i), 0);
  EXPECT_EQ(index.entries(), 2u);
  EXPECT_EQ(index.ignored(), 3u);
  index.Remove(ChainKey("a", 0), 0);
  index.Add(ChainKey("a", 0), 1);
  EXPECT_EQ(Match(index, ChainKeys("a", 2), 2), (std::vector<uint32_t>{0, 1}));
}

TEST(PrefixIndex, AgreesWithAMapOverRandomOperations) {
  constexpr uint32_t kWorkers = 6, kChains = 3, kBlocks = 12;
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    Rng rng(seed);
    PrefixIndex index(1'000'000);
    std::map<WorkerIndex, std::set<BlockKey>> model;
    for (int step = 0; step < 4000; ++step) {
      const auto w = static_cast<WorkerIndex>(rng.Below(kWorkers));
      const std::string chain(1, static_cast<char>('a' + rng.Below(kChains)));
      const BlockKey key = ChainKey(chain, static_cast<uint32_t>(rng.Below(kBlocks)));
      const uint64_t op = rng.Below(100);
      if (op < 60) {
        index.Add(key, w);
        model[w].insert(key);
      } else if (op < 98) {
        index.Remove(key, w);
        model[w].erase(key);
      } else {
        index.Clear(w);
        model[w].clear();
      }
      const auto keys = ChainKeys(chain, kBlocks);
      const auto got = Match(index, keys, kWorkers);
      size_t entries = 0;
      for (WorkerIndex i = 0; i < kWorkers; ++i) {
        uint32_t expect = 0;
        while (expect < kBlocks && model[i].contains(keys[expect])) ++expect;
        ASSERT_EQ(got[i], expect) << "seed " << seed << " step " << step << " worker " << i;
        ASSERT_EQ(index.blocks(i), model[i].size());
        entries += model[i].size();
      }
      ASSERT_EQ(index.entries(), entries);
    }
  }
}

}  // namespace
}  // namespace tidepool
