#include "server/worker/write_behind.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <thread>

#include "kvstore/keys.h"
#include "tests/kvstore/fake_block_tier.h"

namespace tidepool {
namespace {

const BlockLayout kLayout{.layers = 1, .kv_heads = 1, .head_dim = 8, .block_tokens = 4, .dtype = DType::kF32};

// A tier whose writes are answered when the test says so.
class SlowTier final : public BlockTier {
 public:
  Caps caps() const override { return fake_.caps(); }
  ReadId Read(const BlockKey& key, std::span<const int32_t> tokens, std::span<std::byte> dst,
              absl::Duration timeout, ReadDone done) override {
    return fake_.Read(key, tokens, dst, timeout, std::move(done));
  }
  bool CancelRead(ReadId id) override { return fake_.CancelRead(id); }
  void Write(const BlockInfo& info, std::span<const std::byte> payload, Done done) override {
    {
      std::unique_lock lock(mu_);
      ++begun_;
      changed_.notify_all();
      if (held_) {
        waiting_.push_back([this, info, payload, done] { fake_.Write(info, payload, done); });
        return;
      }
    }
    fake_.Write(info, payload, std::move(done));
  }
  void Erase(const BlockKey& key, Done done) override { fake_.Erase(key, std::move(done)); }
  void EraseIf(Predicate matches, CountDone done) override {
    fake_.EraseIf(std::move(matches), std::move(done));
  }
  bool Contains(const BlockKey& key) const override { return fake_.Contains(key); }
  std::optional<TierEntry> Find(const BlockKey& key) const override { return fake_.Find(key); }
  Page List(uint64_t cursor, size_t max) const override { return fake_.List(cursor, max); }
  TierStats stats() const override { return fake_.stats(); }
  TierHealth health() const override { return fake_.health(); }
  void SetObserver(TierObserver* observer) override { fake_.SetObserver(observer); }

  void Hold() {
    std::lock_guard lock(mu_);
    held_ = true;
  }
  void Release() {
    std::vector<std::function<void()>> waiting;
    {
      std::lock_guard lock(mu_);
      held_ = false;
      waiting.swap(waiting_);
    }
    for (const auto& write : waiting) write();
  }
  bool WaitBegun(size_t n) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, std::chrono::seconds(30), [&] { return begun_ >= n; });
  }
  FakeBlockTier& fake() { return fake_; }

 private:
  FakeBlockTier fake_{kLayout.block_bytes(), 1000};
  std::mutex mu_;
  std::condition_variable changed_;
  bool held_ = false;
  size_t begun_ = 0;
  std::vector<std::function<void()>> waiting_;
};

class WriteBehindTest : public ::testing::Test {
 protected:
  void Start(WriteBehind::Options options = {}) {
    auto pool = BlockPool::Create({.layout = kLayout, .slots = 64, .metrics = &metrics_});
    ASSERT_TRUE(pool.ok()) << pool.status();
    pool_ = *std::move(pool);
    options.pool = pool_.get();
    options.tier = &tier_;
    options.metrics = &metrics_;
    store_ = std::make_unique<WriteBehind>(std::move(options));
  }
  void TearDown() override {
    tier_.Release();
    store_.reset();
    EXPECT_EQ(pool_->stats().leased, 0u) << "nothing stays leased";
  }
  BlockInfo Info(int32_t n) {
    const std::vector<int32_t> tokens(4, n);
    const BlockKey root = RootKey("m", kLayout, "t", "");
    return {
        .key = ChildKey(root, tokens), .parent = root, .tokens = tokens, .tenant = "tenant", .session = 3};
  }
  // Publishes a block and offers it.
  BlockKey Offer(int32_t n) {
    const BlockInfo info = Info(n);
    auto slots = pool_->Reserve(1);
    EXPECT_TRUE(slots.ok()) << slots.status();
    std::fill((*slots)[0].data().begin(), (*slots)[0].data().end(), static_cast<std::byte>(n));
    const BlockLease lease = pool_->Publish(std::move((*slots)[0]), info);
    store_->Offer(info.key, lease);
    return info.key;
  }
  uint64_t Count(const std::string& outcome) {
    return metrics_.AddCounter("tidepool_worker_stores_total", "", {{"outcome", outcome}}).value();
  }

  MetricRegistry metrics_;
  SlowTier tier_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<WriteBehind> store_;
};

TEST_F(WriteBehindTest, ABlockThatIsClearedWhileItIsWrittenDoesNotStayOnTheDisk) {
  Start();
  tier_.Hold();
  const BlockKey cleared = Offer(5), kept = Offer(6);
  ASSERT_TRUE(tier_.WaitBegun(2));
  // The disk's own clear finds nothing yet: the writes come after it.
  EXPECT_EQ(pool_->Erase(std::array{cleared}).blocks, 1u);
  tier_.EraseIf(EveryBlock(), [](const absl::StatusOr<uint64_t>& erased) { EXPECT_EQ(*erased, 0u); });
  tier_.Release();
  ASSERT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_FALSE(tier_.Contains(cleared));
  EXPECT_TRUE(tier_.Contains(kept));
  EXPECT_EQ(Count("cleared_meanwhile"), 1u);
}

TEST_F(WriteBehindTest, WritesWhatIsOfferedWithAllThatIsKnownOfIt) {
  Start();
  const BlockKey key = Offer(5);
  ASSERT_TRUE(store_->Flush(absl::Seconds(30)));
  std::vector<std::byte> bytes(kLayout.block_bytes());
  absl::StatusOr<BlockTier::Record> record = absl::UnknownError("");
  tier_.Read(key, Info(5).tokens, bytes, absl::Seconds(1), [&](auto r) { record = std::move(r); });
  ASSERT_TRUE(record.ok()) << record.status();
  EXPECT_EQ(record->info, Info(5));
  EXPECT_EQ(bytes, std::vector<std::byte>(kLayout.block_bytes(), std::byte{5}));
  EXPECT_EQ(Count("stored"), 1u);
  EXPECT_EQ(pool_->stats().leased, 0u);
}

TEST_F(WriteBehindTest, WritesABlockOnce) {
  Start();
  const BlockKey key = Offer(1);
  ASSERT_TRUE(store_->Flush(absl::Seconds(30)));
  store_->Offer(key, *pool_->Lease(key));
  ASSERT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_EQ(Count("stored"), 1u);
  EXPECT_EQ(Count("there_already"), 1u);
  EXPECT_TRUE(tier_.WaitBegun(1));
}

TEST_F(WriteBehindTest, AUseOfABlockThatTheTierHasIsToldAndNotWritten) {
  std::atomic<int> used = 0;
  BlockKey last;
  Start({.used = [&](const BlockKey& key) {
    ++used;
    last = key;
  }});
  const BlockKey key = Offer(1);
  ASSERT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_EQ(used, 0);
  store_->OfferAgain(key, *pool_->Lease(key));
  EXPECT_EQ(used, 1);
  EXPECT_EQ(last, key);
  ASSERT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_EQ(Count("stored"), 1u);
}

TEST_F(WriteBehindTest, AdmissionDecides) {
  Start({.admit = [](const BlockInfo& info) { return info.tokens[0] % 2 == 0; }});
  for (int32_t i = 0; i < 10; ++i) Offer(i);
  ASSERT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_EQ(Count("stored"), 5u);
  EXPECT_EQ(Count("not_admitted"), 5u);
}

TEST_F(WriteBehindTest, AFullQueueDropsAndCounts) {
  Start({.max_queued = 8, .max_writing = 2});
  tier_.Hold();
  for (int32_t i = 0; i < 20; ++i) Offer(i);
  ASSERT_TRUE(tier_.WaitBegun(2));
  EXPECT_EQ(store_->queued(), 8u);
  EXPECT_EQ(pool_->stats().leased, 8u) << "what waits keeps its slots, and no more does";
  EXPECT_EQ(pool_->stats().leases[static_cast<size_t>(LeaseKind::kTierIo)], 8u);
  EXPECT_EQ(Count("dropped_queue_full"), 12u);
}

TEST_F(WriteBehindTest, UnderPressureWhatWaitsLetsGo) {
  Start({.max_queued = 60, .max_writing = 2});
  tier_.Hold();
  for (int32_t i = 0; i < 60; ++i) Offer(i);
  ASSERT_TRUE(tier_.WaitBegun(2));
  EXPECT_FALSE(pool_->Reserve(62).ok());
  store_->DropQueued();
  EXPECT_TRUE(pool_->Reserve(62).ok());
  EXPECT_EQ(Count("dropped_slots_needed"), 58u);
  tier_.Release();
  EXPECT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_EQ(Count("stored"), 2u);
  // What was dropped may come again.
  Offer(59);
  EXPECT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_EQ(Count("stored"), 3u);
}

TEST_F(WriteBehindTest, FlushEndsWithItsGrace) {
  Start({.max_queued = 60, .max_writing = 2});
  tier_.Hold();
  for (int32_t i = 0; i < 10; ++i) Offer(i);
  ASSERT_TRUE(tier_.WaitBegun(2));
  EXPECT_FALSE(store_->Flush(absl::Milliseconds(20)));
  EXPECT_EQ(Count("dropped_at_shutdown"), 8u);
  EXPECT_EQ(store_->queued(), 2u) << "with the tier";
}

TEST_F(WriteBehindTest, WhatComesWhileTheTierOpensWaits) {
  Start();
  tier_.fake().SetHealth({TierState::kOpening, ""});
  Offer(1);
  EXPECT_FALSE(store_->Flush(absl::ZeroDuration()));
  Offer(2);
  tier_.fake().SetHealth({TierState::kOn, ""});
  EXPECT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_EQ(Count("stored"), 1u);
  EXPECT_EQ(Count("dropped_at_shutdown"), 1u);
}

TEST_F(WriteBehindTest, ATierThatFailsLosesNothingElse) {
  Start();
  tier_.fake().SetHealth({TierState::kOff, "gone"});
  for (int32_t i = 0; i < 5; ++i) Offer(i);
  EXPECT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_EQ(Count("dropped_by_tier"), 5u);
  EXPECT_EQ(pool_->stats().leased, 0u);
  tier_.fake().SetHealth({TierState::kOn, ""});
  Offer(1);
  EXPECT_TRUE(store_->Flush(absl::Seconds(30)));
  EXPECT_EQ(Count("stored"), 1u);
}

TEST_F(WriteBehindTest, ATierThatDoesNotAnswerDoesNotKeepItFromEnding) {
  Start({.end_wait = absl::Milliseconds(10)});
  tier_.Hold();
  const BlockKey written = Offer(1);
  const BlockKey cleared = Offer(2);
  ASSERT_TRUE(tier_.WaitBegun(2));
  store_.reset();
  EXPECT_EQ(pool_->stats().leased, 2u) << "the tier may still read them";
  (void)pool_->Erase(std::vector{cleared}, /*pinned=*/true);
  tier_.Release();
  EXPECT_EQ(pool_->stats().leased, 0u);
  EXPECT_EQ(Count("stored"), 1u);
  EXPECT_EQ(Count("cleared_meanwhile"), 1u);
  EXPECT_TRUE(tier_.Contains(written));
}

}  // namespace
}  // namespace tidepool
