#include "server/worker/request_blocks.h"

#include <gtest/gtest.h>

#include <future>

#include "tests/kvstore/fake_block_tier.h"
#include "tests/server/engine/engine_fixture.h"

namespace tidepool {
namespace {

// Memory of a peer on this host.
class PeerMemory final : public SlotOwner {
 public:
  std::span<std::byte> SlotBytes(uint32_t) const override { return bytes_; }
  bool writable() const override { return false; }
  void AddLease(SlotRef, LeaseKind) override { ++leases; }
  void DropLease(SlotRef, LeaseKind) override { --leases; }

  int leases = 0;

 private:
  mutable std::vector<std::byte> bytes_ = std::vector<std::byte>(kLayout.block_bytes());
};

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
  const PlannedFetch there = blocks.StartFetch("r#0", 0, kPeer, 0, 1, /*growing=*/false);
  const PlannedFetch growing = blocks.StartFetch("r#0", 0, kPeer, 1, 3, /*growing=*/true);
  EXPECT_EQ(there.spec.deadline, clock_.Now() + context_.config.transport.fetch_timeout);
  EXPECT_EQ(growing.spec.deadline, there.spec.deadline + context_.config.worker.prefill_timeout);
}

TEST_F(RequestBlocksTest, WhatIsReadInPlaceBehindAGapIsComputedInItsOwnSlot) {
  PeerMemory peer;
  RequestBlocks blocks = Make(10);
  ASSERT_TRUE(blocks.TryReserve(12));
  PlannedFetch fetch = blocks.StartFetch("r#0", 0, kPeer, 0, 2, /*growing=*/false);
  FetchResult result;
  result.slots = std::move(fetch.spec.slots);
  result.slots[1] = BlockLease(&peer, {0, 1}, LeaseKind::kPeer);
  ++peer.leases;
  result.filled = {false, true};
  result.transport = "arena";
  EXPECT_FALSE(blocks.EndFetch(fetch, std::move(result)));
  std::vector<BlockLease> others = *pool_->Reserve(5);
  EXPECT_FALSE(pool_->Reserve(1).ok()) << "all that is left is the request's own";
  v1::Sampling sampling;
  sampling.set_top_p(1);
  auto sink = std::make_shared<RecordingSink>();
  const absl::Status status = blocks.Submit("r#0", sampling, {.max_tokens = 2}, sink);
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_TRUE(sink->WaitFinished());
  EXPECT_EQ(sink->ids(), Continue(Prompt(10), 2));
  EXPECT_EQ(peer.leases, 0);
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

TEST_F(RequestBlocksTest, ASubmitThatFailsHoldsNothing) {
  PeerMemory memory;
  RequestBlocks blocks = Make(10);
  ASSERT_TRUE(blocks.TryReserve(12));
  const auto end = [&](PlannedFetch fetch, BlockLease slot, bool filled) {
    FetchResult result;
    result.slots.push_back(std::move(slot));
    result.filled = {filled};
    blocks.EndFetch(fetch, std::move(result));
  };
  // The first is read in the peer's memory; the slot of the second does not come back.
  end(blocks.StartFetch("r#0", 0, kPeer, 0, 1, /*growing=*/false),
      BlockLease(&memory, {0, 1}, LeaseKind::kPeer), true);
  ++memory.leases;
  PeerAddress remote = kPeer;
  remote.arena.clear();
  end(blocks.StartFetch("r#0", 0, remote, 1, 2, /*growing=*/false), BlockLease(), false);
  std::vector<BlockLease> others = *pool_->Reserve(6);
  v1::Sampling sampling;
  sampling.set_top_p(1);
  EXPECT_TRUE(absl::IsResourceExhausted(
      blocks.Submit("r#0", sampling, {.max_tokens = 2}, std::make_shared<RecordingSink>())));
  EXPECT_EQ(pool_->stats().leased, 6u) << "the others'";
  EXPECT_EQ(memory.leases, 0);
}

}  // namespace
}  // namespace tidepool
