#include "scheduler/chain_probe.h"

#include <gtest/gtest.h>

#include "base/rng.h"
#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

TEST(ChainProbe, NobodyHoldsAnything) {
  PrefixIndex index(1000);
  const auto keys = ChainKeys("a", 9);
  ChainProbe probe(index, keys);
  EXPECT_EQ(probe.known(), 0u);
  EXPECT_TRUE(probe.levels().empty());
  EXPECT_EQ(probe.Prefix(0), HeldPrefix{});
  EXPECT_EQ(probe.Run(0, {}), HeldRun{});
  ChainProbe none(index, {});
  EXPECT_EQ(none.known(), 0u);
}

// As pools hold chains: prefixes whose end may be on disk, and runs of answers whose prompt is elsewhere.
TEST(ChainProbe, AgreesWithTheWholeMatchWhereWorkersHoldPrefixesAndRuns) {
  constexpr uint32_t kWorkers = 12;
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    Rng rng(seed);
    PrefixIndex index(1 << 20);
    const auto n = static_cast<uint32_t>(1 + rng.Below(200));
    const auto keys = ChainKeys("a", n);
    uint32_t longest = 0;
    for (WorkerIndex w = 0; w + 1 < kWorkers; ++w) {
      const auto blocks = static_cast<uint32_t>(rng.Below(n + 1));
      const auto near = static_cast<uint32_t>(rng.Chance(0.5) ? blocks : rng.Below(blocks + 1));
      for (uint32_t i = 0; i < blocks; ++i) index.Add(keys[i], w, i < near ? Tier::kHost : Tier::kDisk);
      longest = std::max(longest, blocks);
    }
    if (longest > 0 && longest < n) {
      const uint32_t begin = static_cast<uint32_t>(rng.Below(longest)) + 1;
      for (uint32_t i = begin; i < n; ++i) index.Add(keys[i], kWorkers - 1);
    }
    std::vector<HeldPrefix> held;
    std::vector<HeldRun> runs;
    index.Match(keys, kWorkers, held, runs);
    ChainProbe probe(index, keys);
    for (WorkerIndex w = 0; w < kWorkers; ++w) {
      const HeldPrefix prefix = probe.Prefix(w);
      ASSERT_EQ(prefix, held[w]) << "seed " << seed << " worker " << w;
      ASSERT_EQ(probe.Run(w, prefix), runs[w]) << "seed " << seed << " worker " << w;
    }
    if (probe.known() == 0) continue;
    ASSERT_EQ(probe.levels().front().position, probe.known() - 1);
    ASSERT_EQ(probe.levels().back().position, 0u);
    for (size_t k = 1; k < probe.levels().size(); ++k)
      ASSERT_LT(probe.levels()[k].position, probe.levels()[k - 1].position);
  }
}

TEST(ChainProbe, HoleCostsAnOverestimateAndNothingElse) {
  PrefixIndex index(1000);
  const auto keys = ChainKeys("a", 64);
  for (uint32_t i = 0; i < 64; ++i) {
    if (i != 40) index.Add(keys[i], 0);
  }
  ChainProbe probe(index, keys);
  EXPECT_GE(probe.Prefix(0).blocks, 40u);
  EXPECT_LE(probe.Prefix(0).blocks, 64u);
}

}  // namespace
}  // namespace tidepool
