#include "kvstore/offer_table.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/kvstore/fetch_test_util.h"

namespace tidepool {
namespace {

constexpr uint32_t kLayers = 4;
constexpr absl::Duration kLease = absl::Seconds(10);
const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

struct Recorder final : OfferObserver {
  void OnOffered(const std::string& request, const BlockKey& key, const BlockLease&) override {
    offered.push_back({request, key});
  }
  void OnDropped(const std::string& request, std::vector<BlockLease>& leases) override {
    dropped.push_back(request);
    if (keep) std::move(leases.begin(), leases.end(), std::back_inserter(kept));
  }
  void OnRevoked(const std::string& request) override { revoked.push_back(request); }

  std::vector<std::pair<std::string, BlockKey>> offered;
  std::vector<std::string> dropped, revoked;
  bool keep = false;
  std::vector<BlockLease> kept;
};

class OfferTableTest : public testing::Test {
 protected:
  void SetUp() override {
    pool_ =
        *BlockPool::Create({.layout = {.layers = kLayers, .kv_heads = 1, .head_dim = 8, .block_tokens = 4},
                            .slots = 16,
                            .metrics = &metrics_});
    table_ = std::make_unique<OfferTable>(kLayers, kLease);
  }
  BlockLease Slot() { return std::move((*pool_->Reserve(1))[0]); }
  uint32_t leased() { return pool_->stats().leased; }
  void Offer(const std::string& request, uint64_t key, uint32_t layers = kLayers, absl::Time now = kStart) {
    table_->Offer(request, TestKey(key), Slot(), layers, now);
  }

  MetricRegistry metrics_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<OfferTable> table_;
};

TEST_F(OfferTableTest, FindsWhatTheRequestOffersAndNothingElse) {
  Offer("a", 1);
  EXPECT_TRUE(table_->Find("a", TestKey(1), kStart).has_value());
  EXPECT_FALSE(table_->Find("a", TestKey(2), kStart).has_value());
  EXPECT_FALSE(table_->Find("b", TestKey(1), kStart).has_value());
  EXPECT_EQ(table_->size(), 1u);
}

TEST_F(OfferTableTest, ABlockThatIsBegunAgainHasAnotherEpoch) {
  const BlockLease slot = Slot();
  table_->Offer("a", TestKey(1), slot.Clone(), 2, kStart);
  const uint64_t first = table_->Find("a", TestKey(1), kStart)->epoch;
  table_->Offer("a", TestKey(1), slot.Clone(), 3, kStart);
  EXPECT_EQ(table_->Find("a", TestKey(1), kStart)->epoch, first) << "it has grown";
  table_->Revoke("a");
  table_->Offer("a", TestKey(1), slot.Clone(), 3, kStart);
  EXPECT_NE(table_->Find("a", TestKey(1), kStart)->epoch, first);
}

TEST_F(OfferTableTest, WhatWasFoundOutlivesTheOffer) {
  Offer("a", 1);
  auto found = table_->Find("a", TestKey(1), kStart);
  EXPECT_EQ(table_->Release("a"), 1u);
  EXPECT_EQ(leased(), 1u);
  found.reset();
  EXPECT_EQ(leased(), 0u);
}

// A prefill that is still running when its decode worker goes away offers more: nobody would release that.
TEST_F(OfferTableTest, WhatIsOfferedAfterItsFetcherIsThroughIsDroppedAtOnce) {
  Offer("a", 1);
  EXPECT_EQ(table_->Close("a"), 1u);
  Offer("a", 2);
  EXPECT_EQ(table_->size(), 0u);
  EXPECT_EQ(leased(), 0u);
  EXPECT_EQ(table_->Close("a"), 0u);
  Offer("b", 3);
  EXPECT_EQ(table_->size(), 1u) << "others are not concerned";
  // Of a request that was merely released it is not known that nobody comes.
  EXPECT_EQ(table_->Release("b"), 1u);
  Offer("b", 3);
  EXPECT_EQ(table_->size(), 1u);
  for (int i = 0; i < 9000; ++i) table_->Close("x" + std::to_string(i));
  Offer("a", 4);
  EXPECT_EQ(table_->size(), 2u) << "what is remembered is bounded";
}

TEST_F(OfferTableTest, ARequestIsKeptAsAWholeWhileAnythingOfItIsFound) {
  Offer("a", 1);
  Offer("a", 2);
  Offer("b", 3);
  EXPECT_EQ(table_->next_expiry(), kStart + kLease);
  ASSERT_TRUE(table_->Find("a", TestKey(1), kStart + kLease / 2).has_value());
  EXPECT_EQ(table_->Expire(kStart + kLease), 1u) << "b was left alone";
  EXPECT_TRUE(table_->Find("a", TestKey(2), kStart + kLease).has_value());
  EXPECT_EQ(table_->Expire(kStart + 2 * kLease), 2u);
  EXPECT_EQ(leased(), 0u);
  EXPECT_EQ(table_->next_expiry(), absl::InfiniteFuture());
}

TEST_F(OfferTableTest, AGrowingOfferBecomesCompleteOnceAndThenStays) {
  Recorder seen;
  table_->SetObserver(&seen);
  Offer("a", 1, 0);
  EXPECT_TRUE(seen.offered.empty());
  table_->Advance("a", {}, 3, kStart);
  EXPECT_EQ(table_->Find("a", TestKey(1), kStart)->layers_ready, 3u);
  table_->Advance("a", {}, 2, kStart);
  EXPECT_EQ(table_->Find("a", TestKey(1), kStart)->layers_ready, 3u) << "layers are not taken back";
  table_->Advance("a", {}, kLayers, kStart);
  table_->Advance("a", {}, kLayers, kStart);
  ASSERT_EQ(seen.offered.size(), 1u);
  const SlotRef first = table_->Find("a", TestKey(1), kStart)->lease.ref();
  Offer("a", 1, 0);
  EXPECT_EQ(table_->Find("a", TestKey(1), kStart)->lease.ref(), first);
  EXPECT_EQ(leased(), 1u) << "the second offer of the same block is given back";
  table_->SetObserver(nullptr);
}

TEST_F(OfferTableTest, RevokeDropsTheGrowingOnesOnly) {
  Recorder seen;
  table_->SetObserver(&seen);
  for (uint64_t k = 0; k < 6; ++k) Offer("a", k, k % 2 == 0 ? kLayers : 1);
  table_->Revoke("a");
  EXPECT_EQ(seen.revoked, std::vector<std::string>{"a"});
  EXPECT_EQ(table_->size(), 3u);
  for (uint64_t k = 0; k < 6; ++k)
    EXPECT_EQ(table_->Find("a", TestKey(k), kStart).has_value(), k % 2 == 0) << k;
  table_->Revoke("a");
  EXPECT_EQ(seen.revoked.size(), 1u);
  table_->SetObserver(nullptr);
}

TEST_F(OfferTableTest, AnObserverMayKeepWhatIsDropped) {
  Recorder seen;
  seen.keep = true;
  table_->SetObserver(&seen);
  Offer("a", 1);
  Offer("b", 2);
  table_->Release("a");
  table_->Expire(kStart + kLease);
  EXPECT_EQ(seen.dropped, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(leased(), 2u);
  seen.kept.clear();
  EXPECT_EQ(leased(), 0u);
  table_->SetObserver(nullptr);
}

TEST_F(OfferTableTest, ManyThreadsLeaveNothingBehind) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(t);
      for (int i = 0; i < 2000; ++i) {
        const std::string request = std::to_string(rng.Below(3));
        auto slot = pool_->Reserve(1);
        if (slot.ok())
          table_->Offer(request, TestKey(rng.Below(4)), std::move((*slot)[0]), rng.Below(kLayers + 1),
                        kStart);
        auto found = table_->Find(request, TestKey(rng.Below(4)), kStart);
        if (i % 3 == 0) table_->Advance(request, {}, kLayers, kStart);
        if (i % 5 == 0) table_->Revoke(request);
        if (i % 7 == 0) table_->Release(request);
      }
    });
  }
  for (std::thread& t : threads) t.join();
  table_->Clear();
  EXPECT_EQ(table_->size(), 0u);
  EXPECT_EQ(leased(), 0u);
}

}  // namespace
}  // namespace tidepool
