#pragma once

// FetchNode end to end over a real transport, two nodes with pools of their own: run over every transport.

#include <gtest/gtest.h>

#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kvstore/block_tier.h"
#include "kvstore/fetch_node.h"
#include "tests/kvstore/fake_block_tier.h"
#include "tests/kvstore/fetch_test_util.h"

namespace tidepool {

using NodeTransportFactory = std::function<std::unique_ptr<Transport>()>;

// Waits for a fetch's result, counting that it comes once.
class Waiter {
 public:
  std::function<void(FetchResult)> Callback() {
    return [this](FetchResult r) {
      std::lock_guard lock(mu_);
      ++times_;
      result_ = std::move(r);
      cv_.notify_all();
    };
  }
  FetchResult& Get() {
    std::unique_lock lock(mu_);
    if (!cv_.wait_for(lock, std::chrono::seconds(20), [&] { return times_ > 0; })) {
      ADD_FAILURE() << "the fetch did not end";
      result_.emplace();
      result_->status = absl::UnknownError("did not end");
    }
    return *result_;
  }
  int times() {
    std::lock_guard lock(mu_);
    return times_;
  }

 private:
  std::mutex mu_;
  std::condition_variable cv_;
  int times_ = 0;
  std::optional<FetchResult> result_;
};

inline bool Eventually(const std::function<bool()>& holds) {
  const absl::Time limit = Clock::Real().Now() + absl::Seconds(15);
  while (!holds()) {
    if (Clock::Real().Now() > limit) return false;
    std::this_thread::yield();
  }
  return true;
}

struct NodeSpec {
  std::string worker = "w";
  std::string boot = "boot";
  std::string fingerprint = "model-1";
  BlockLayout layout = {.layers = 4, .kv_heads = 2, .head_dim = 64, .block_tokens = 32};  // 128 KiB
  uint32_t slots = 64;
  absl::Duration offer_lease = absl::Seconds(30);
  BlockTier* disk = nullptr;
  const BlockCodec* codec = nullptr;
  size_t lanes = 1;
};

// A node, its pool and its metrics.
struct TestNode {
  TestNode(const NodeTransportFactory& factory, const NodeSpec& spec) : spec(spec) {
    BlockPool::Options options;
    options.layout = spec.layout;
    options.slots = spec.slots;
    options.metrics = &metrics;
    pool = std::move(*BlockPool::Create(options));
    auto started = FetchNode::Start({.worker_id = spec.worker,
                                     .boot_id = spec.boot,
                                     .fingerprint = spec.fingerprint,
                                     .pool = pool.get(),
                                     .transport = factory(),
                                     .metrics = &metrics,
                                     .offer_lease = spec.offer_lease,
                                     .disk = spec.disk,
                                     .codec = spec.codec,
                                     .lanes = spec.lanes});
    EXPECT_TRUE(started.ok()) << started.status();
    node = std::move(*started);
  }
  PeerAddress peer() const { return {spec.worker, spec.boot, node->address()}; }
  std::vector<BlockLease> Slots(size_t n) {
    auto slots = pool->Reserve(n);
    EXPECT_TRUE(slots.ok()) << slots.status();
    return std::move(*slots);
  }
  // Publishes blocks first..first+n, each filled from its own number.
  std::vector<BlockKey> Publish(uint64_t first, size_t n) {
    std::vector<BlockKey> keys;
    for (BlockLease& slot : Slots(n)) {
      const uint64_t seed = first + keys.size();
      Fill(slot.data(), seed);
      keys.push_back(TestKey(seed));
      pool->Publish(std::move(slot), {.key = keys.back()});
    }
    return keys;
  }
  uint64_t Metric(const std::string& series) const {
    const std::string text = metrics.Render();
    const size_t at = text.find("\n" + series + " ");
    EXPECT_NE(at, std::string::npos) << series;
    return at == std::string::npos ? 0 : std::stoull(text.substr(at + series.size() + 2));
  }

  NodeSpec spec;
  MetricRegistry metrics;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<FetchNode> node;
};

class FetchNodeContract : public testing::TestWithParam<NodeTransportFactory> {
 protected:
  std::unique_ptr<TestNode> Node(NodeSpec spec) { return std::make_unique<TestNode>(GetParam(), spec); }
  static FetchSpec Spec(TestNode& to, const PeerAddress& from, const std::vector<BlockKey>& keys,
                        const std::string& request = "req", uint32_t part = 0,
                        absl::Duration within = absl::Seconds(10)) {
    FetchSpec spec;
    spec.request_id = request;
    spec.part = part;
    spec.peer = from;
    spec.keys = keys;
    spec.slots = to.Slots(keys.size());
    spec.deadline = Clock::Real().Now() + within;
    return spec;
  }
};

TEST_P(FetchNodeContract, PublishedBlocksArriveEqualAndAbsentOnesAreNotFilled) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  std::vector<BlockKey> keys = b->Publish(100, 20);
  keys.insert(keys.begin() + 7, TestKey(9999));
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), keys), w.Callback());
  FetchResult& r = w.Get();
  ASSERT_TRUE(r.status.ok()) << r.status;
  ASSERT_EQ(r.slots.size(), 21u);
  for (size_t i = 0; i < keys.size(); ++i) {
    EXPECT_EQ(r.filled[i], i != 7) << i;
    if (i != 7) {
      EXPECT_TRUE(Holds(r.slots[i].data(), 100 + i - (i > 7))) << i;
    }
  }
  EXPECT_EQ(r.bytes, 20 * a->spec.layout.block_bytes());
  EXPECT_EQ(w.times(), 1);
  EXPECT_EQ(a->Metric("tidepool_kv_transfer_bytes_total{direction=\"in\"}"), r.bytes);
  EXPECT_TRUE(Eventually([&] {
    return b->Metric("tidepool_kv_transfer_bytes_total{direction=\"out\"}") == r.bytes &&
           b->node->active_fetches() == 0 && b->pool->stats().leased == 0;
  }));
}

TEST_P(FetchNodeContract, WhatASlotHoldsNowIsWhatItsChecksumIsOf) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb", .slots = 4});
  for (uint64_t first : {100, 200, 300}) {
    const std::vector<BlockKey> keys = b->Publish(first, 4);  // in the slots of the round before
    for (uint32_t again = 0; again < 2; ++again) {
      Waiter w;
      const auto part = static_cast<uint32_t>(first) + again;
      a->node->Fetch(Spec(*a, b->peer(), keys, "req", part), w.Callback());
      FetchResult& r = w.Get();
      ASSERT_TRUE(r.status.ok()) << r.status;
      for (size_t i = 0; i < keys.size(); ++i) {
        ASSERT_TRUE(r.filled[i]) << i;
        EXPECT_TRUE(Holds(r.slots[i].data(), first + i)) << i;
      }
      r.slots.clear();
      ASSERT_TRUE(Eventually([&] { return b->node->active_fetches() == 0 && b->pool->stats().leased == 0; }));
    }
  }
}

TEST_P(FetchNodeContract, APublishedBlockThatChangedInMemoryIsAMiss) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  const std::vector<BlockKey> keys = b->Publish(100, 3);
  Waiter good;
  a->node->Fetch(Spec(*a, b->peer(), keys), good.Callback());
  ASSERT_TRUE(good.Get().status.ok()) << good.Get().status;
  {
    auto block = b->pool->Lease(keys[1]);
    ASSERT_TRUE(block.has_value());
    block->data()[70001] ^= std::byte{16};  // as a failing memory module would
  }
  Waiter bad;
  a->node->Fetch(Spec(*a, b->peer(), keys, "req", 1), bad.Callback());
  EXPECT_TRUE(absl::IsDataLoss(bad.Get().status)) << bad.Get().status;
  for (bool filled : bad.Get().filled) EXPECT_FALSE(filled);
  EXPECT_EQ(a->Metric("tidepool_kv_transfer_failures_total{reason=\"checksum\"}"), 1u);
}

TEST_P(FetchNodeContract, BothNodesFetchFromEachOtherAtTheSameTime) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  const auto of_a = a->Publish(1, 8);
  const auto of_b = b->Publish(1000, 8);
  std::vector<std::unique_ptr<Waiter>> waiters;
  for (uint32_t part = 0; part < 6; ++part) {
    waiters.push_back(std::make_unique<Waiter>());
    a->node->Fetch(Spec(*a, b->peer(), of_b, "r", part), waiters.back()->Callback());
    waiters.push_back(std::make_unique<Waiter>());
    b->node->Fetch(Spec(*b, a->peer(), of_a, "r", part), waiters.back()->Callback());
  }
  for (size_t w = 0; w < waiters.size(); ++w) {
    FetchResult& r = waiters[w]->Get();
    ASSERT_TRUE(r.status.ok()) << r.status;
    for (size_t i = 0; i < 8; ++i) EXPECT_TRUE(Holds(r.slots[i].data(), (w % 2 == 0 ? 1000 : 1) + i));
  }
}

TEST_P(FetchNodeContract, AnUnindexedTailIsFetchedByItsOfferAndFreedByRelease) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  auto tail = std::move(b->Slots(1)[0]);
  Fill(tail.data(), 77);
  b->node->Offer("req", TestKey(77), std::move(tail));
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), {TestKey(77)}), w.Callback());
  ASSERT_TRUE(w.Get().status.ok()) << w.Get().status;
  ASSERT_TRUE(w.Get().filled[0]);
  EXPECT_TRUE(Holds(w.Get().slots[0].data(), 77));
  EXPECT_TRUE(Eventually([&] { return b->node->offers() == 1; }));
  EXPECT_EQ(b->pool->stats().leased, 1u);

  // Another request does not see it.
  Waiter other;
  a->node->Fetch(Spec(*a, b->peer(), {TestKey(77)}, "other"), other.Callback());
  ASSERT_TRUE(other.Get().status.ok());
  EXPECT_FALSE(other.Get().filled[0]);

  a->node->SendRelease(b->peer(), "req");
  EXPECT_TRUE(Eventually([&] { return b->node->offers() == 0 && b->pool->stats().leased == 0; }));
}

TEST_P(FetchNodeContract, AnOfferNobodyFetchesIsFreedWhenItsLeaseRunsOut) {
  auto b = Node({.worker = "b", .boot = "bb", .offer_lease = absl::Milliseconds(50)});
  b->node->Offer("req", TestKey(1), std::move(b->Slots(1)[0]));
  EXPECT_TRUE(Eventually([&] { return b->Metric("tidepool_kv_leases_expired_total") == 1; }));
  EXPECT_TRUE(Eventually([&] { return b->pool->stats().leased == 0 && b->node->offers() == 0; }));
}

TEST_P(FetchNodeContract, ReleaseOffersFreesThemAtOnce) {
  auto b = Node({.worker = "b", .boot = "bb"});
  for (uint64_t i = 0; i < 3; ++i) b->node->Offer("req", TestKey(i), std::move(b->Slots(1)[0]));
  EXPECT_TRUE(Eventually([&] { return b->node->offers() == 3; }));
  b->node->ReleaseOffers("req");
  EXPECT_TRUE(Eventually([&] { return b->node->offers() == 0 && b->pool->stats().leased == 0; }));
}

TEST_P(FetchNodeContract, AGrowingOfferIsStreamedAndFilledWhenItsLastLayerIsReady) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  auto slots = b->Slots(3);
  for (uint64_t i = 0; i < 3; ++i) b->node->Offer("req", TestKey(70 + i), slots[i].Clone(), 0);
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), {TestKey(70), TestKey(71), TestKey(72)}), w.Callback());
  const BlockLayout& layout = b->spec.layout;
  std::vector<std::byte> whole(layout.block_bytes());
  for (uint32_t layer = 0; layer < layout.layers; ++layer) {
    EXPECT_EQ(w.times(), 0);
    for (uint64_t i = 0; i < 3; ++i) {
      Fill(whole, 70 + i);
      const size_t at = layer * layout.layer_bytes();
      std::memcpy(slots[i].data().data() + at, whole.data() + at, layout.layer_bytes());
    }
    b->node->AdvanceOffer("req", layer + 1);
    // All layers but the last are sent before that one is computed.
    if (layer + 2 == layout.layers) {
      EXPECT_TRUE(Eventually([&] {
        return b->Metric("tidepool_kv_transfer_bytes_total{direction=\"out\"}") >=
               3 * (layout.layers - 1) * layout.layer_bytes();
      }));
    }
  }
  ASSERT_TRUE(w.Get().status.ok()) << w.Get().status;
  for (uint64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(w.Get().filled[i]);
    EXPECT_TRUE(Holds(w.Get().slots[i].data(), 70 + i));
  }
}

TEST_P(FetchNodeContract, ARevokedOfferIsAbsentAndLeaksNothing) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  auto keys = b->Publish(1, 2);
  b->node->Offer("req", TestKey(70), std::move(b->Slots(1)[0]), 2);
  keys.push_back(TestKey(70));
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), keys), w.Callback());
  EXPECT_TRUE(
      Eventually([&] { return b->Metric("tidepool_kv_transfer_bytes_total{direction=\"out\"}") > 0; }));
  EXPECT_EQ(w.times(), 0);
  b->node->RevokeOffers("req");
  ASSERT_TRUE(w.Get().status.ok()) << w.Get().status;
  EXPECT_EQ(w.Get().filled, (std::vector<bool>{true, true, false}));
  EXPECT_TRUE(Eventually([&] { return b->pool->stats().leased == 0 && b->node->offers() == 0; }));
}

TEST_P(FetchNodeContract, BlocksThatOnlyTheLowerTierHasAreReadPublishedAndSent) {
  const size_t block_bytes = NodeSpec{}.layout.block_bytes();
  FakeBlockTier disk(block_bytes, 100);
  std::vector<BlockKey> keys;
  for (uint64_t i = 0; i < 20; ++i) {
    keys.push_back(TestKey(300 + i));
    std::vector<std::byte> block(block_bytes);
    Fill(block, 300 + i);
    disk.Write({.key = keys.back()}, block, [](absl::Status s) { EXPECT_TRUE(s.ok()) << s; });
  }
  keys.push_back(TestKey(9999));  // nobody has it
  auto a = Node({.worker = "a", .boot = "ba"});
  NodeSpec spec{.worker = "b", .boot = "bb"};
  spec.disk = &disk;
  auto b = Node(spec);
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), keys), w.Callback());
  ASSERT_TRUE(w.Get().status.ok()) << w.Get().status;
  for (uint64_t i = 0; i < 20; ++i) {
    ASSERT_TRUE(w.Get().filled[i]) << i;
    EXPECT_TRUE(Holds(w.Get().slots[i].data(), 300 + i)) << i;
    EXPECT_TRUE(b->pool->Lease(keys[i]).has_value()) << "not published";
  }
  EXPECT_FALSE(w.Get().filled[20]);
  EXPECT_TRUE(Eventually([&] { return b->pool->stats().leased == 0; }));
}

TEST_P(FetchNodeContract, SeveralLanesCarryFetchesAtTheSameTime) {
  NodeSpec spec{.worker = "a", .boot = "ba", .slots = 128};
  spec.lanes = 3;
  auto a = Node(spec);
  auto b = Node({.worker = "b", .boot = "bb"});
  const auto keys = b->Publish(1, 16);
  std::vector<std::unique_ptr<Waiter>> waiters;
  for (uint32_t part = 0; part < 6; ++part) {
    waiters.push_back(std::make_unique<Waiter>());
    a->node->Fetch(Spec(*a, b->peer(), keys, "r", part), waiters.back()->Callback());
  }
  for (auto& w : waiters) {
    ASSERT_TRUE(w->Get().status.ok()) << w->Get().status;
    for (size_t i = 0; i < keys.size(); ++i) EXPECT_TRUE(Holds(w->Get().slots[i].data(), 1 + i));
  }
}

TEST_P(FetchNodeContract, ADifferentModelIsRefusedAndTheTextNamesWhatDiffers) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb", .fingerprint = "model-2"});
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), {TestKey(1)}), w.Callback());
  const absl::Status& s = w.Get().status;
  EXPECT_TRUE(absl::IsFailedPrecondition(s)) << s;
  EXPECT_NE(s.ToString().find("model fingerprint is 'model-1', here it is 'model-2'"), std::string::npos)
      << s;
  EXPECT_EQ(w.Get().slots.size(), 1u);
  EXPECT_FALSE(w.Get().filled[0]);
  EXPECT_EQ(a->Metric("tidepool_kv_transfer_failures_total{reason=\"mismatch\"}"), 1u);
}

TEST_P(FetchNodeContract, ADifferentLayoutIsRefusedAndTheTextNamesBoth) {
  auto a = Node({.worker = "a", .boot = "ba"});
  NodeSpec other{.worker = "b", .boot = "bb"};
  other.layout.kv_heads = 4;
  auto b = Node(other);
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), {TestKey(1)}), w.Callback());
  const absl::Status& s = w.Get().status;
  EXPECT_TRUE(absl::IsFailedPrecondition(s)) << s;
  EXPECT_NE(s.ToString().find("KV layout is 'l4 h2 d64 b32 bfloat16', here it is 'l4 h4 d64 b32 bfloat16'"),
            std::string::npos)
      << s;
}

TEST_P(FetchNodeContract, AnotherBootIdThanExpectedIsUnavailable) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "second-life"});
  const auto keys = b->Publish(1, 1);
  PeerAddress old = b->peer();
  old.boot_id = "first-life";
  Waiter w;
  a->node->Fetch(Spec(*a, old, keys), w.Callback());
  EXPECT_TRUE(absl::IsUnavailable(w.Get().status)) << w.Get().status;
  EXPECT_FALSE(w.Get().filled[0]);
  Waiter good;
  a->node->Fetch(Spec(*a, b->peer(), keys), good.Callback());
  EXPECT_TRUE(good.Get().status.ok()) << good.Get().status;
}

TEST_P(FetchNodeContract, ARestartedPeerServesUnderItsNewBootId) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "b1"});
  auto keys = b->Publish(1, 4);
  Waiter first;
  a->node->Fetch(Spec(*a, b->peer(), keys, "r1"), first.Callback());
  ASSERT_TRUE(first.Get().status.ok()) << first.Get().status;
  const PeerAddress old = b->peer();
  b.reset();
  Waiter gone;
  a->node->Fetch(Spec(*a, old, keys, "r2"), gone.Callback());
  EXPECT_TRUE(absl::IsUnavailable(gone.Get().status)) << gone.Get().status;
  b = Node({.worker = "b", .boot = "b2"});
  keys = b->Publish(50, 4);
  Waiter second;
  a->node->Fetch(Spec(*a, b->peer(), keys, "r3"), second.Callback());
  ASSERT_TRUE(second.Get().status.ok()) << second.Get().status;
  EXPECT_TRUE(Holds(second.Get().slots[3].data(), 53));
}

TEST_P(FetchNodeContract, AbortEndsAFetchWithCancelledAndItsSlotsAreUsableAgain) {
  auto a = Node({.worker = "a", .boot = "ba", .slots = 512});
  auto b = Node({.worker = "b", .boot = "bb", .slots = 512});
  const auto keys = b->Publish(1, 256);
  for (int round = 0; round < 8; ++round) {
    const std::string request = "r" + std::to_string(round);
    Waiter w;
    a->node->Fetch(Spec(*a, b->peer(), keys, request), w.Callback());
    // In the middle, wherever that is by now.
    if (round % 2 == 1) Eventually([&] { return b->node->active_fetches() > 0; });
    a->node->Abort(request, 0);
    FetchResult& r = w.Get();
    EXPECT_TRUE(r.status.ok() || absl::IsCancelled(r.status)) << r.status;
    ASSERT_EQ(r.slots.size(), 256u);
    // They are ours: nothing may write to them from now on.
    for (BlockLease& slot : r.slots) {
      ASSERT_FALSE(slot.empty());
      std::memset(slot.data().data(), 0x5a, slot.data().size());
    }
    Waiter next;
    FetchSpec after = Spec(*a, b->peer(), {keys[0]}, request + "-after");
    a->node->Fetch(std::move(after), next.Callback());
    ASSERT_TRUE(next.Get().status.ok()) << next.Get().status;
    EXPECT_TRUE(Holds(next.Get().slots[0].data(), 1));
    for (BlockLease& slot : r.slots) {
      for (std::byte byte : slot.data()) ASSERT_EQ(byte, std::byte{0x5a});
    }
  }
  EXPECT_EQ(a->pool->stats().quarantined, 0u);
  EXPECT_TRUE(Eventually([&] { return b->pool->stats().leased == 0; }));
}

TEST_P(FetchNodeContract, AFetchFromNobodyEndsInTime) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  const PeerAddress gone = b->peer();
  b.reset();
  Waiter w;
  const absl::Time start = Clock::Real().Now();
  a->node->Fetch(Spec(*a, gone, {TestKey(1)}, "r", 0, absl::Seconds(3)), w.Callback());
  EXPECT_FALSE(w.Get().status.ok());
  EXPECT_LT(Clock::Real().Now() - start, absl::Seconds(6));
  EXPECT_EQ(w.Get().slots.size(), 1u);
}

TEST_P(FetchNodeContract, APastDeadlineIsDeadlineExceeded) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), {TestKey(1)}, "r", 0, -absl::Seconds(1)), w.Callback());
  EXPECT_TRUE(absl::IsDeadlineExceeded(w.Get().status)) << w.Get().status;
}

TEST_P(FetchNodeContract, BadSpecsAreRefusedWithTheFieldNamed) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  auto refused = [&](FetchSpec spec, const char* what) {
    Waiter w;
    a->node->Fetch(std::move(spec), w.Callback());
    EXPECT_TRUE(absl::IsInvalidArgument(w.Get().status)) << what;
    EXPECT_NE(w.Get().status.ToString().find(what), std::string::npos) << w.Get().status;
  };
  FetchSpec spec = Spec(*a, b->peer(), {TestKey(1)});
  spec.request_id.clear();
  refused(std::move(spec), "request_id");
  spec = Spec(*a, b->peer(), {TestKey(1)});
  spec.keys.push_back(TestKey(2));
  refused(std::move(spec), "2 keys but 1 slots");
  spec = Spec(*a, b->peer(), {TestKey(1)});
  spec.peer.boot_id = std::string(65, 'x');
  refused(std::move(spec), "boot_id");
  spec = Spec(*a, b->peer(), {TestKey(1)});
  spec.slots[0] = BlockLease();
  refused(std::move(spec), "slot");
  spec = Spec(*a, {"b", "bb", "no such form"}, {TestKey(1)});
  Waiter w;
  a->node->Fetch(std::move(spec), w.Callback());
  EXPECT_TRUE(absl::IsUnavailable(w.Get().status) || absl::IsInvalidArgument(w.Get().status))
      << w.Get().status;
}

TEST_P(FetchNodeContract, DestroyingANodeEndsItsFetches) {
  auto a = Node({.worker = "a", .boot = "ba", .slots = 512});
  auto b = Node({.worker = "b", .boot = "bb", .slots = 512});
  const auto keys = b->Publish(1, 256);
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), keys), w.Callback());
  a->node.reset();
  FetchResult& r = w.Get();
  EXPECT_TRUE(r.status.ok() || absl::IsCancelled(r.status)) << r.status;
  r.slots.clear();
  EXPECT_EQ(a->pool->stats().leased, 0u);
}

TEST_P(FetchNodeContract, AnIdleNodeUsesNoProcessorTime) {
  auto a = Node({.worker = "a", .boot = "ba"});
  auto b = Node({.worker = "b", .boot = "bb"});
  const auto keys = b->Publish(1, 1);
  Waiter w;
  a->node->Fetch(Spec(*a, b->peer(), keys), w.Callback());
  ASSERT_TRUE(w.Get().status.ok());
  ASSERT_TRUE(Eventually([&] { return b->node->active_fetches() == 0; }));
  auto cpu = [] {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return absl::DurationFromTimespec(t);
  };
  const absl::Duration before = cpu();
  std::this_thread::sleep_for(std::chrono::milliseconds(500));  // the time itself is what is measured
  EXPECT_LT(cpu() - before, absl::Milliseconds(100));
}

}  // namespace tidepool
