#include "scheduler/prefix_index.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "base/rng.h"
#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

std::vector<HeldPrefix> MatchTiers(const PrefixIndex& index, const std::vector<BlockKey>& keys,
                                   size_t workers) {
  std::vector<HeldPrefix> out;
  index.Match(keys, workers, out);
  return out;
}

std::vector<uint32_t> Match(const PrefixIndex& index, const std::vector<BlockKey>& keys, size_t workers) {
  std::vector<uint32_t> out;
  for (const HeldPrefix& held : MatchTiers(index, keys, workers)) out.push_back(held.blocks);
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

TEST(PrefixIndex, NearPrefixEndsAtTheFirstBlockThatIsOnDiskOnly) {
  PrefixIndex index(100);
  const auto keys = ChainKeys("a", 5);
  for (uint32_t i : {0, 1, 3}) index.Add(keys[i], 0, Tier::kHost);
  for (uint32_t i : {1, 2, 3}) index.Add(keys[i], 0, Tier::kDisk);
  index.Add(keys[0], 1, Tier::kDisk);
  index.Add(keys[0], 2, Tier::kDevice);
  const auto held = MatchTiers(index, keys, 3);
  EXPECT_EQ(held[0], (HeldPrefix{4, 2}));
  EXPECT_EQ(held[1], (HeldPrefix{1, 0}));
  EXPECT_EQ(held[2], (HeldPrefix{1, 1}));
}

TEST(PrefixIndex, WhatAWorkerHoldsBeyondAGapIsARunOfItsOwn) {
  PrefixIndex index(100);
  const std::vector<BlockKey> keys = ChainKeys("a", 8);
  for (int i = 0; i < 5; ++i) index.Add(keys[i], 0);
  index.Add(keys[1], 1);
  for (int i = 4; i < 6; ++i) index.Add(keys[i], 1);
  index.Add(keys[6], 1, Tier::kDisk);
  std::vector<HeldPrefix> held;
  std::vector<HeldRun> runs;
  index.Match(keys, 2, held, runs);
  EXPECT_EQ(held[0], (HeldPrefix{5, 5}));
  EXPECT_EQ(runs[0], HeldRun{});
  EXPECT_EQ(held[1], HeldPrefix{});
  EXPECT_EQ(runs[1], (HeldRun{4, 7, 6}));
}

TEST(PrefixIndex, BlockStaysUntilItsLastTierIsRemoved) {
  PrefixIndex index(100);
  const BlockKey key = ChainKey("a", 0);
  index.Add(key, 0, Tier::kHost);
  index.Add(key, 0, Tier::kDisk);
  EXPECT_EQ(index.entries(), 1u);
  index.Remove(key, 0, Tier::kHost);
  EXPECT_EQ(MatchTiers(index, {key}, 1)[0], (HeldPrefix{1, 0}));
  index.Remove(key, 0, Tier::kHost);  // again: nothing to remove
  EXPECT_EQ(index.blocks(0), 1u);
  index.Remove(key, 0, Tier::kDisk);
  EXPECT_EQ(index.entries(), 0u);
  EXPECT_TRUE(index.Holders(key).empty());
}

TEST(PrefixIndex, AgreesWithAMapOverRandomOperations) {
  constexpr uint32_t kWorkers = 6, kChains = 3, kBlocks = 12;
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    Rng rng(seed);
    PrefixIndex index(1'000'000);
    std::map<WorkerIndex, std::map<BlockKey, std::set<Tier>>> model;
    for (int step = 0; step < 4000; ++step) {
      const auto w = static_cast<WorkerIndex>(rng.Below(kWorkers));
      const std::string chain(1, static_cast<char>('a' + rng.Below(kChains)));
      const BlockKey key = ChainKey(chain, static_cast<uint32_t>(rng.Below(kBlocks)));
      const uint64_t op = rng.Below(100);
      const Tier tier = rng.Below(3) == 0 ? Tier::kDisk : Tier::kHost;
      if (op < 60) {
        index.Add(key, w, tier);
        model[w][key].insert(tier);
      } else if (op < 98) {
        index.Remove(key, w, tier);
        if (model[w].contains(key)) model[w][key].erase(tier);
        if (model[w].contains(key) && model[w][key].empty()) model[w].erase(key);
      } else {
        index.Clear(w);
        model[w].clear();
      }
      const auto keys = ChainKeys(chain, kBlocks);
      const auto got = MatchTiers(index, keys, kWorkers);
      size_t entries = 0;
      for (WorkerIndex i = 0; i < kWorkers; ++i) {
        HeldPrefix expect;
        while (expect.blocks < kBlocks && model[i].contains(keys[expect.blocks])) ++expect.blocks;
        while (expect.near_blocks < expect.blocks &&
               model[i][keys[expect.near_blocks]].contains(Tier::kHost)) {
          ++expect.near_blocks;
        }
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
