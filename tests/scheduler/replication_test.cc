#include "scheduler/replication.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "scheduler/core.h"
#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

// 4 hits make a run of 8 blocks hot; its bytes fit the budget unless a test says otherwise.
class ReplicationTest : public testing::Test {
 protected:
  void Add(WorkerReport r) {
    const auto result = view_.Report(std::move(r), kStart);
    ASSERT_TRUE(result.status.ok()) << result.status;
  }
  void Use(ReplicationCore& core, std::string_view chain, uint32_t blocks, int times,
           absl::Time now = kStart) {
    for (int i = 0; i < times; ++i) core.OnPlaced(ChainKeys(chain, blocks), now);
  }
  static std::vector<BlockKey> Keys(const std::vector<CopyOrder>& orders) {
    std::vector<BlockKey> out;
    for (const CopyOrder& o : orders) out.insert(out.end(), o.keys.begin(), o.keys.end());
    return out;
  }

  SchedulerOptions scheduler_;
  ReplicationOptions options_;
  ClusterView view_{scheduler_};
};

TEST_F(ReplicationTest, HotRunOfOneHolderIsCopiedToTheStoreHeadFirst) {
  auto p = TestReport("p1", Role::kPrefill);
  Add(Holding(p, "x", 20));
  Add(TestReport("p2", Role::kPrefill));
  Add(TestReport("s1", Role::kStore));
  ReplicationCore core(options_);
  Use(core, "x", 20, 4);
  const auto orders = core.Step(view_, kStart);
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(orders[0].from.worker_id, "p1");
  EXPECT_EQ(orders[0].to.worker_id, "s1");
  // Two whole runs of 8; the last 4 blocks are no run.
  EXPECT_EQ(orders[0].keys, ChainKeys("x", 16));
}

TEST_F(ReplicationTest, RunThatIsUsedSeldomStays) {
  auto p = TestReport("p1", Role::kPrefill);
  Add(Holding(p, "x", 8));
  Add(TestReport("s1", Role::kStore));
  ReplicationCore core(options_);
  Use(core, "x", 8, 3);
  EXPECT_THAT(core.Step(view_, kStart), IsEmpty());
  // Uses count half after a minute: one more does not make up for it.
  Use(core, "x", 8, 1, kStart + absl::Minutes(1));
  EXPECT_THAT(core.Step(view_, kStart + absl::Minutes(1)), IsEmpty());
  EXPECT_EQ(core.hot_runs(kStart + absl::Minutes(1)), 0u);
}

TEST_F(ReplicationTest, RunThatTwoHoldIsEnough) {
  for (const char* id : {"p1", "p2"}) {
    auto p = TestReport(id, Role::kPrefill);
    Add(Holding(p, "x", 8));
  }
  Add(TestReport("s1", Role::kStore));
  ReplicationCore core(options_);
  Use(core, "x", 8, 9);
  EXPECT_THAT(core.Step(view_, kStart), IsEmpty());
  EXPECT_EQ(core.hot_runs(kStart), 1u);
}

TEST_F(ReplicationTest, WhatWasOrderedIsOrderedAgainOnlyLater) {
  auto p = TestReport("p1", Role::kPrefill);
  Add(Holding(p, "x", 8));
  Add(TestReport("s1", Role::kStore));
  ReplicationCore core(options_);
  Use(core, "x", 8, 40);
  EXPECT_EQ(core.Step(view_, kStart).size(), 1u);
  EXPECT_THAT(core.Step(view_, kStart + absl::Seconds(29)), IsEmpty());
  EXPECT_EQ(core.Step(view_, kStart + absl::Seconds(30)).size(), 1u);
}

TEST_F(ReplicationTest, CopiesStayInTheByteBudget) {
  const uint64_t run_bytes = 8 * TestModel().layout.block_bytes();
  options_.bytes_per_second = run_bytes;
  auto p = TestReport("p1", Role::kPrefill);
  Add(Holding(p, "x", 80));
  Add(TestReport("s1", Role::kStore));
  ReplicationCore core(options_);
  Use(core, "x", 80, 40);
  size_t blocks = 0;
  for (int second = 0; second <= 5; ++second)
    blocks += Keys(core.Step(view_, kStart + absl::Seconds(second))).size();
  EXPECT_EQ(blocks, 6u * 8);
}

TEST_F(ReplicationTest, WorkerWithoutRoomIsNoTarget) {
  auto p = TestReport("p1", Role::kPrefill);
  Add(Holding(p, "x", 8));
  auto s = TestReport("s1", Role::kStore);
  s.load.slots_free = 31;  // a quarter of it is less than 8
  Add(s);
  ReplicationCore core(options_);
  Use(core, "x", 8, 4);
  EXPECT_THAT(core.Step(view_, kStart), IsEmpty());
}

TEST_F(ReplicationTest, RunThatOnlyADrainingWorkerHoldsIsSavedAlsoWhereItIsNotHot) {
  auto p = TestReport("p1", Role::kPrefill);
  p.draining = true;
  Add(Holding(p, "x", 8));
  Add(TestReport("p2", Role::kPrefill));
  ReplicationCore core(options_);
  Use(core, "x", 8, 1);
  const auto orders = core.Step(view_, kStart);
  ASSERT_EQ(orders.size(), 1u);
  EXPECT_EQ(orders[0].from.worker_id, "p1");
  EXPECT_EQ(orders[0].to.worker_id, "p2");
}

TEST_F(ReplicationTest, CountsOnlySoManyRunsAndForgetsTheLeastUsed) {
  options_.max_runs = 16;
  ReplicationCore core(options_);
  Use(core, "hot", 8, 5);
  for (int i = 0; i < 100; ++i) Use(core, "c" + std::to_string(i), 8, 1, kStart + absl::Seconds(2 * i) / 10);
  EXPECT_LE(core.runs(), 16u);
  EXPECT_EQ(core.hot_runs(kStart), 1u);
}

TEST_F(ReplicationTest, EvacuationTakesUsedBlocksFirstAndOnlyWhatNobodyElseHolds) {
  auto p = TestReport("p1", Role::kPrefill);
  Holding(p, "cold", 4);
  Holding(p, "hot", 8);
  Holding(p, "shared", 8);
  Add(Holding(p, "disk", 8, Tier::kDisk));
  auto q = TestReport("p2", Role::kPrefill);
  q.tiers.push_back({.tier = Tier::kHost, .blocks = 8});
  Add(Holding(q, "shared", 8));
  ReplicationCore core(options_);
  Use(core, "hot", 8, 1);
  const auto orders = core.Evacuation(view_, "p1", kStart);
  ASSERT_TRUE(orders.ok()) << orders.status();
  auto keys = Keys(*orders);
  ASSERT_EQ(keys.size(), 12u);
  EXPECT_EQ(std::vector(keys.begin(), keys.begin() + 8), ChainKeys("hot", 8));
  EXPECT_THAT(std::vector(keys.begin() + 8, keys.end()),
              testing::UnorderedElementsAreArray(ChainKeys("cold", 4)));
}

TEST_F(ReplicationTest, EvacuationOfUnusedBlocksEvictsNobodysBlocks) {
  auto p = TestReport("p1", Role::kPrefill);
  Holding(p, "cold", 8);
  Add(Holding(p, "hot", 8));
  auto s = TestReport("s1", Role::kStore);
  s.tiers.push_back({.tier = Tier::kHost, .blocks = 10'000});  // full of blocks, all evictable
  Add(s);
  ReplicationCore core(options_);
  Use(core, "hot", 8, 1);
  const auto orders = core.Evacuation(view_, "p1", kStart);
  ASSERT_TRUE(orders.ok()) << orders.status();
  EXPECT_EQ(Keys(*orders), ChainKeys("hot", 8));
}

TEST_F(ReplicationTest, EvacuationNeedsSomebodyToTakeTheBlocks) {
  auto p = TestReport("p1", Role::kPrefill);
  Add(Holding(p, "x", 8));
  ReplicationCore core(options_);
  EXPECT_EQ(core.Evacuation(view_, "p1", kStart).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(core.Evacuation(view_, "p9", kStart).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ReplicationTest, ReplicationMakesAsManyCopiesAsAskedForFromTheNearestTier) {
  auto p = TestReport("p1", Role::kPrefill);
  Add(Holding(p, "x", 4, Tier::kDisk));
  auto q = TestReport("p2", Role::kPrefill);
  Add(Holding(q, "x", 2));
  Add(TestReport("s1", Role::kStore));
  const auto orders = ReplicationCore::Replication(view_, ChainKeys("x", 5), 3, "");
  ASSERT_TRUE(orders.ok()) << orders.status();
  std::map<std::string, size_t> copies;  // by from>to
  for (const CopyOrder& o : *orders) copies[o.from.worker_id + ">" + o.to.worker_id] += o.keys.size();
  // Blocks 0 and 1: one more, from p2's host tier. Blocks 2 and 3: two more. Block 4 nobody has.
  EXPECT_EQ(copies, (std::map<std::string, size_t>{{"p2>s1", 2}, {"p1>s1", 2}, {"p1>p2", 2}}));
}

TEST_F(ReplicationTest, ReplicationToOneWorkerIgnoresTheCount) {
  auto p = TestReport("p1", Role::kPrefill);
  Add(Holding(p, "x", 2));
  auto d = TestReport("d1", Role::kDecode);
  Add(Holding(d, "x", 1));
  const auto orders = ReplicationCore::Replication(view_, ChainKeys("x", 2), 1, "d1");
  ASSERT_TRUE(orders.ok()) << orders.status();
  ASSERT_EQ(orders->size(), 1u);
  EXPECT_THAT((*orders)[0].keys, ElementsAre(ChainKey("x", 1)));
  EXPECT_EQ(ReplicationCore::Replication(view_, ChainKeys("x", 2), 1, "d9").status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace tidepool
