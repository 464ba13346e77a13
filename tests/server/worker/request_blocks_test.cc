#include "server/worker/request_blocks.h"

#include <gtest/gtest.h>

#include <future>

#include "tests/kvstore/fake_block_tier.h"
#include "tests/server/engine/engine_fixture.h"

namespace tidepool {
namespace {

class RequestBlocksTest : public EngineTest {
 protected:
  void SetUp() override {
    Start({.max_batch = 4, .max_step_tokens = 16, .max_waiting = 8}, /*slots=*/8);
    context_.layout = kLayout;
    context_.pool = pool_.get();
    context_.engine = engine_.get();
    context_.probe = &probe_;
    context_.clock = &clock_;
  }
  RequestBlocks Make(size_t prompt) {
    return RequestBlocks(context_, kRoot, Prompt(prompt), {.tenant = "t", .session = 0, .turn = 0});
  }
  // Publishes the first `n` blocks of a prompt of Make's.
  void Publish(RequestBlocks& blocks, uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) {
      std::vector<BlockLease> slot = *pool_->Reserve(1, {.tenant = "t"});
      pool_->Publish(std::move(slot[0]), blocks.InfoOf(i));
    }
  }
  static FetchResult InPlace(PlannedFetch& fetch, BlockRun run) {
    FetchResult result;
    result.slots = std::move(fetch.spec.slots);
    result.filled.assign(result.slots.size(), true);
    result.in_place = std::move(run);
    result.transport = "arena";
    return result;
  }
  static FetchResult Failed(std::vector<BlockLease> slots) {
    FetchResult result;
    result.status = absl::UnavailableError("cut off");
    result.slots = std::move(slots);
    result.filled.assign(result.slots.size(), false);
    return result;
  }
  static v1::Sampling Sampling() {
    v1::Sampling sampling;
    sampling.set_top_p(1);
    return sampling;
  }
  std::shared_ptr<RecordingSink> Submitted(RequestBlocks& blocks) {
    auto sink = std::make_shared<RecordingSink>();
    const absl::Status status = blocks.Submit("r#0", Sampling(), {.max_tokens = 2}, sink);
    EXPECT_TRUE(status.ok()) << status;
    return sink;
  }
  uint64_t Counted(const std::string& series) {
    const std::string all = Metrics();
    const size_t at = all.find("\n" + series + " ");
    EXPECT_NE(at, std::string::npos) << series << " in\n" << all;
    return at == std::string::npos ? 0 : std::stoull(all.substr(at + series.size() + 2));
  }

  const BlockKey kRoot = RootKey("model", kLayout, "", "");
  const PeerAddress kPeer{.worker_id = "p", .boot_id = "b", .transport = "t", .arena = "a"};
  FakeClock clock_;
  WorkerProbe probe_{metrics_};
  WorkerContext context_;
};

TEST_F(RequestBlocksTest, ARequestThatWaitsIsOneUseOfItsPrefixAndOneTurn) {
  RequestBlocks blocks = Make(22);
  Publish(blocks, 3);
  std::vector<BlockLease> others = *pool_->Reserve(5);
  for (int i = 0; i < 20; ++i) EXPECT_FALSE(blocks.TryReserve(22));
  EXPECT_EQ(pool_->stats().leased, 5u) << "nothing is held while it waits";
  BlockLease::DropAll(std::move(others));
  ASSERT_TRUE(blocks.TryReserve(22));
  EXPECT_EQ(blocks.published(), 3u);
  // The mark that an attempt leaves at the end of the prefix would look like an earlier turn to the next.
  EXPECT_EQ(Counted("tidepool_pool_session_turns_total{tier=\"host\"}"), 0u);
}

TEST_F(RequestBlocksTest, ABatchRequestThatLeavesRoomDropsNoStores) {
  FakeBlockTier tier(kLayout.block_bytes(), 100);
  std::promise<void> go_on;
  std::shared_future<void> gate = go_on.get_future().share();
  WriteBehind store(
      {.pool = pool_.get(), .tier = &tier, .metrics = &metrics_, .admit = [gate](const BlockInfo&) {
         gate.wait();
         return true;
       }});
  context_.store = &store;
  RequestBlocks stored = Make(22);
  Publish(stored, 3);
  for (uint32_t i = 0; i < 3; ++i) store.Offer(stored.keys()[i], *pool_->Lease(stored.keys()[i]));
  std::vector<BlockLease> others = *pool_->Reserve(2);
  // Three are free, one of them is to remain for others; two more would go only if the stores did.
  RequestBlocks batch(context_, kRoot, Prompt(10, 500), {.tenant = "t", .session = 0, .turn = 0});
  EXPECT_FALSE(batch.TryReserve(12, /*reuse=*/true, /*batch_class=*/true));
  EXPECT_GE(store.queued(), 2u);
  EXPECT_EQ(Counted("tidepool_worker_stores_total{outcome=\"dropped_slots_needed\"}"), 0u);
  RequestBlocks online(context_, kRoot, Prompt(18, 500), {.tenant = "t", .session = 0, .turn = 0});
  EXPECT_FALSE(online.TryReserve(20));
  EXPECT_GE(Counted("tidepool_worker_stores_total{outcome=\"dropped_slots_needed\"}"), 2u);
  go_on.set_value();
}

TEST_F(RequestBlocksTest, AGrowingFetchMayTakeAsLongAsThePrefill) {
  RequestBlocks blocks = Make(10);
  ASSERT_TRUE(blocks.TryReserve(12));
  PlannedFetch there = blocks.StartFetch("r#0", 0, kPeer, 0, 1, /*growing=*/false);
  const PlannedFetch growing = blocks.StartFetch("r#0", 0, kPeer, 1, 3, /*growing=*/true);
  EXPECT_EQ(there.spec.deadline, clock_.Now() + context_.config.transport.fetch_timeout);
  EXPECT_EQ(growing.spec.deadline, there.spec.deadline + context_.config.worker.prefill_timeout);
}

TEST_F(RequestBlocksTest, WhatIsReadInPlaceKeepsNoSlotHere) {
  PeerMemory peer(Prompt(22));
  RequestBlocks blocks = Make(22);
  ASSERT_TRUE(blocks.TryReserve(24));
  PlannedFetch first = blocks.StartFetch("r#0", 0, kPeer, 0, 2, /*growing=*/false);
  PlannedFetch second = blocks.StartFetch("r#0", 0, kPeer, 2, 5, /*growing=*/false);
  // They end in any order.
  EXPECT_TRUE(blocks.EndFetch(second, InPlace(second, peer.Run(2, 5))));
  EXPECT_TRUE(blocks.EndFetch(first, InPlace(first, peer.Run(0, 2))));
  EXPECT_EQ(blocks.ready(), 5u);
  EXPECT_EQ(blocks.fetched_blocks(), 5u);
  EXPECT_EQ(pool_->stats().leased, 6u) << "until it is known that they are not needed";
  const auto sink = Submitted(blocks);
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(22), 2));
  EXPECT_EQ(pool_->stats().leased, 1u) << "the tail's";
  EXPECT_EQ(peer.leases, 2);
  sink->result = {};
  EXPECT_EQ(peer.leases, 0);
}

TEST_F(RequestBlocksTest, WhatIsReadInPlaceBehindAGapIsComputedInItsOwnSlot) {
  PeerMemory peer(Prompt(10));
  RequestBlocks blocks = Make(10);
  ASSERT_TRUE(blocks.TryReserve(12));
  PlannedFetch missing = blocks.StartFetch("r#0", 0, kPeer, 0, 1, /*growing=*/false);
  PlannedFetch there = blocks.StartFetch("r#0", 0, kPeer, 1, 2, /*growing=*/false);
  EXPECT_TRUE(blocks.EndFetch(there, InPlace(there, peer.Run(1, 2))));
  EXPECT_FALSE(blocks.EndFetch(missing, Failed(std::move(missing.spec.slots))));
  std::vector<BlockLease> others = *pool_->Reserve(5);
  EXPECT_FALSE(pool_->Reserve(1).ok()) << "all that is left is the request's own";
  const auto sink = Submitted(blocks);
  EXPECT_EQ(peer.leases, 0);
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(10), 2));
}

TEST_F(RequestBlocksTest, AQuarantinedSlotIsReplacedByTheRequestsOwn) {
  for (const bool in_place : {true, false}) {
    // By one that was set aside for what is read in place, or for the answer.
    PeerMemory peer(Prompt(10));
    RequestBlocks blocks = Make(10);
    ASSERT_TRUE(blocks.TryReserve(in_place ? 12 : 13));
    if (in_place) {
      PlannedFetch there = blocks.StartFetch("r#0", 0, kPeer, 0, 1, /*growing=*/false);
      EXPECT_TRUE(blocks.EndFetch(there, InPlace(there, peer.Run(0, 1))));
    }
    PlannedFetch bad = blocks.StartFetch("r#0", 0, kPeer, 1, 2, /*growing=*/false);
    pool_->Quarantine(std::move(bad.spec.slots[0]));
    EXPECT_FALSE(blocks.EndFetch(bad, Failed(std::move(bad.spec.slots))));
    const BlockPool::Stats stats = pool_->stats();
    std::vector<BlockLease> others = *pool_->Reserve(stats.free + stats.evictable);
    const auto sink = Submitted(blocks);
    ASSERT_TRUE(sink->WaitFinished());
    EXPECT_EQ(sink->ids(), Continue(Prompt(10), 2));
  }
}

TEST_F(RequestBlocksTest, ABlockThatTheDiskBroughtIsAUseOfIt) {
  FakeBlockTier tier(kLayout.block_bytes(), 100);
  std::vector<BlockKey> used;
  WriteBehind store(
      {.pool = pool_.get(), .tier = &tier, .metrics = &metrics_, .used = [&](const BlockKey& key) {
         used.push_back(key);
       }});
  context_.store = &store;
  RequestBlocks blocks = Make(22);
  ASSERT_TRUE(blocks.TryReserve(22));
  BlockLoader::Result result;
  for (uint32_t i = 0; i < 2; ++i) {
    const BlockInfo info = blocks.InfoOf(i);
    tier.Write(info, std::vector<std::byte>(kLayout.block_bytes()), [](const absl::Status&) {});
    result.leases.push_back(pool_->Publish(std::move((*pool_->Reserve(1))[0]), info));
  }
  result.loaded = 2;
  result.from = {LoadedFrom::kPeer, LoadedFrom::kDisk};
  blocks.EndLoad(std::move(result));
  EXPECT_EQ(used, std::vector{blocks.keys()[1]});
}

TEST_F(RequestBlocksTest, WhatIsHereBehindLoadedBlocksIsUsedByOneThatResumes) {
  for (const bool resumed : {true, false}) {
    RequestBlocks first = Make(22);
    ASSERT_TRUE(first.TryReserve(22));
    // As after a preemption of one whose first two blocks were read in place.
    for (uint32_t i = 2; i < 4; ++i) {
      first.at(i) = pool_->Publish(std::move(first.at(i)), first.InfoOf(i));
    }
    first.Drop();
    RequestBlocks blocks(context_, kRoot, Prompt(22), {.tenant = "t", .session = 0, .turn = 0}, resumed);
    ASSERT_TRUE(blocks.TryReserve(22));
    EXPECT_EQ(blocks.published(), 0u);
    BlockLoader::Result result;
    for (uint32_t i = 0; i < 2; ++i) {
      result.leases.push_back(pool_->Publish(std::move(blocks.at(i)), blocks.InfoOf(i)));
    }
    result.loaded = 2;
    result.from = {LoadedFrom::kPeer, LoadedFrom::kPeer};
    blocks.EndLoad(std::move(result));
    EXPECT_EQ(blocks.published(), resumed ? 4u : 2u);
    EXPECT_EQ(blocks.ready(), blocks.published());
    EXPECT_EQ(pool_->stats().leased, 6u) << "what it does not need goes back";
    blocks.Drop();
    pool_->Clear({});
  }
}

TEST_F(RequestBlocksTest, AResumeWithoutASlotForAQuarantinedOneLeavesTheSequence) {
  controls_->Allow(1);
  auto sink = std::make_shared<RecordingSink>();
  {
    RequestBlocks begun = Make(10);
    ASSERT_TRUE(begun.TryReserve(10));
    ASSERT_TRUE(begun.Submit("r#0", Sampling(), {.max_tokens = 4, .preemptible = true}, sink).ok());
  }
  ASSERT_TRUE(sink->WaitTokens(1));
  EXPECT_TRUE(engine_->Preempt("r#0"));
  controls_->Free();
  ASSERT_TRUE(sink->WaitPaused());
  std::unique_ptr<PreemptedSequence> away = sink->TakePreempted();
  ASSERT_NE(away, nullptr);
  away->SaveTail();
  RequestBlocks blocks(context_, kRoot, away->tokens(), {.tenant = "t", .session = 0, .turn = 0}, true);
  ASSERT_TRUE(blocks.TryReserve(static_cast<uint32_t>(away->tokens().size())));
  pool_->Quarantine(std::move(blocks.at(2)));
  const BlockPool::Stats stats = pool_->stats();
  std::vector<BlockLease> others = *pool_->Reserve(stats.free + stats.evictable);
  EXPECT_TRUE(absl::IsResourceExhausted(blocks.Resume(away, 0)));
  ASSERT_NE(away, nullptr) << "it can try again";
  EXPECT_EQ(pool_->stats().leased, others.size()) << "and holds nothing meanwhile";
  BlockLease::DropAll(std::move(others));
  RequestBlocks again(context_, kRoot, away->tokens(), {.tenant = "t", .session = 0, .turn = 0}, true);
  ASSERT_TRUE(again.TryReserve(static_cast<uint32_t>(away->tokens().size())));
  away->DropKept();
  ASSERT_TRUE(again.Resume(away, 0).ok());
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(10), 4));
}

TEST_F(RequestBlocksTest, ASubmitThatFailsHoldsNothing) {
  PeerMemory peer(Prompt(10));
  RequestBlocks blocks = Make(10);
  ASSERT_TRUE(blocks.TryReserve(12));
  // The slot of the first does not come back, and nothing was set aside beyond the prompt.
  PlannedFetch bad = blocks.StartFetch("r#0", 0, kPeer, 0, 1, /*growing=*/false);
  pool_->Quarantine(std::move(bad.spec.slots[0]));
  EXPECT_FALSE(blocks.EndFetch(bad, Failed(std::move(bad.spec.slots))));
  PlannedFetch there = blocks.StartFetch("r#0", 0, kPeer, 1, 2, /*growing=*/false);
  EXPECT_TRUE(blocks.EndFetch(there, InPlace(there, peer.Run(1, 2))));
  std::vector<BlockLease> others = *pool_->Reserve(5);
  EXPECT_TRUE(absl::IsResourceExhausted(
      blocks.Submit("r#0", Sampling(), {.max_tokens = 2}, std::make_shared<RecordingSink>())));
  EXPECT_EQ(pool_->stats().leased, 5u) << "the others'";
  EXPECT_EQ(peer.leases, 0);
}

}  // namespace
}  // namespace tidepool
