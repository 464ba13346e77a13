#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kvstore/block_tier.h"
#include "tests/kvstore/tier_log.h"

namespace tidepool {

// One implementation under test. Every one runs the same suite:
//   INSTANTIATE_TEST_SUITE_P(Fake, BlockTierContract, testing::Values(BlockTierCase{...}));
struct BlockTierCase {
  // A fresh tier, on, with room for `max_blocks` blocks of 256 bytes.
  std::function<std::unique_ptr<BlockTier>(size_t max_blocks)> make;
  // Damages the stored bytes of a key that is there.
  std::function<void(BlockTier&, const BlockKey&)> corrupt;
};

class BlockTierContract : public testing::TestWithParam<BlockTierCase> {
 protected:
  static constexpr size_t kBytes = 256;

  static BlockKey Key(uint8_t n) {
    BlockKey key;
    key.bytes.fill(n);
    return key;
  }
  // Four tokens that only block n has; even blocks are of tenant "even" and session 2.
  static BlockInfo Info(uint8_t n) {
    BlockInfo info;
    info.key = Key(n);
    if (n > 1) info.parent = Key(static_cast<uint8_t>(n - 1));
    info.tokens = {n, n + 1, n + 2, n + 3};
    info.tenant = n % 2 == 0 ? "even" : "odd";
    info.session = n % 2 == 0 ? 2 : 1;
    info.turn = 3;
    info.position = n;
    info.compute_seconds = 0.5f;
    return info;
  }
  static std::vector<std::byte> Block(uint8_t n) { return std::vector<std::byte>(kBytes, std::byte{n}); }

  // Runs one call and waits for its only answer.
  template <typename T>
  static T Await(const std::function<void(std::function<void(T)>)>& call) {
    auto answer = std::make_shared<std::promise<T>>();
    auto future = answer->get_future();
    call([answer](T s) { answer->set_value(std::move(s)); });  // throws if answered twice
    if (future.wait_for(std::chrono::seconds(10)) != std::future_status::ready)
      return absl::DeadlineExceededError("the tier did not answer within 10 s");
    return future.get();
  }
  absl::StatusOr<BlockTier::Record> ReadRecord(uint8_t n, std::span<const int32_t> tokens,
                                               std::span<std::byte> dst) {
    return Await<absl::StatusOr<BlockTier::Record>>(
        [&](BlockTier::ReadDone d) { tier_->Read(Key(n), tokens, dst, absl::Seconds(10), std::move(d)); });
  }
  absl::Status Read(uint8_t n, std::span<std::byte> dst) { return ReadRecord(n, {}, dst).status(); }
  absl::Status Write(uint8_t n, std::span<const std::byte> payload) {
    return Await<absl::Status>([&](BlockTier::Done d) { tier_->Write(Info(n), payload, std::move(d)); });
  }
  absl::Status Write(uint8_t n) { return Write(n, Block(n)); }
  absl::Status Erase(uint8_t n) {
    return Await<absl::Status>([&](BlockTier::Done d) { tier_->Erase(Key(n), std::move(d)); });
  }
  absl::StatusOr<uint64_t> EraseIf(BlockTier::Predicate matches) {
    return Await<absl::StatusOr<uint64_t>>(
        [&](BlockTier::CountDone d) { tier_->EraseIf(std::move(matches), std::move(d)); });
  }

  void SetUp() override {
    tier_ = GetParam().make(4);
    tier_->SetObserver(&log_);
  }
  void TearDown() override { tier_.reset(); }

  TierLog log_;
  std::unique_ptr<BlockTier> tier_;
};

TEST_P(BlockTierContract, CapsAreUsable) {
  const auto caps = tier_->caps();
  EXPECT_FALSE(caps.name.empty());
  EXPECT_EQ(caps.block_bytes, kBytes);
  EXPECT_GE(caps.capacity_bytes, 4 * kBytes);
  EXPECT_GE(caps.max_reads, 1u);
  EXPECT_GE(caps.max_writes, 1u);
  EXPECT_EQ(tier_->health(), (TierHealth{TierState::kOn, ""}));
}

TEST_P(BlockTierContract, ReadsBackWhatWasWrittenAndWhatItIs) {
  ASSERT_TRUE(Write(1).ok());
  ASSERT_TRUE(Write(2).ok());
  auto dst = Block(0);
  EXPECT_TRUE(tier_->Contains(Key(1)));
  const BlockInfo info = Info(2);
  const auto record = ReadRecord(2, info.tokens, dst);
  ASSERT_TRUE(record.ok()) << record.status();
  EXPECT_EQ(dst, Block(2));
  EXPECT_EQ(record->bytes, kBytes);
  EXPECT_EQ(record->info.key, info.key);
  EXPECT_EQ(record->info.parent, info.parent);
  EXPECT_EQ(record->info.tokens, info.tokens);
  EXPECT_EQ(record->info.tenant, info.tenant);
  EXPECT_EQ(record->info.session, info.session);
  EXPECT_EQ(record->info.turn, info.turn);
  EXPECT_EQ(record->info.position, info.position);
  EXPECT_EQ(record->info.compute_seconds, info.compute_seconds);
  EXPECT_EQ(log_.stored(), (std::vector<BlockKey>{Key(1), Key(2)}));
}

TEST_P(BlockTierContract, AbsentBlockIsNotFound) {
  auto dst = Block(0);
  EXPECT_EQ(Read(1, dst).code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(tier_->Contains(Key(1)));
  EXPECT_FALSE(tier_->Find(Key(1)).has_value());
}

TEST_P(BlockTierContract, OtherTokensAreAMiss) {
  ASSERT_TRUE(Write(1).ok());
  auto dst = Block(0);
  const std::vector<int32_t> other = {1, 2, 3, 5}, longer = {1, 2, 3, 4, 5};
  EXPECT_EQ(ReadRecord(1, other, dst).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ReadRecord(1, longer, dst).status().code(), absl::StatusCode::kNotFound);
}

TEST_P(BlockTierContract, ShorterPayloadKeepsItsLength) {
  const auto half = std::vector<std::byte>(kBytes / 2 + 1, std::byte{9});
  ASSERT_TRUE(Write(1, half).ok());
  auto dst = Block(0);
  const auto record = ReadRecord(1, {}, dst);
  ASSERT_TRUE(record.ok());
  ASSERT_EQ(record->bytes, half.size());
  EXPECT_TRUE(std::equal(half.begin(), half.end(), dst.begin()));
  EXPECT_EQ(tier_->Find(Key(1))->bytes, half.size());
}

TEST_P(BlockTierContract, ACompressedBlockReadsTheSame) {
  const auto compress = [&](uint8_t n) {
    return Await<absl::StatusOr<BlockTier::Compressed>>(
        [&](BlockTier::CompressDone d) { tier_->Compress(Key(n), std::move(d)); });
  };
  ASSERT_TRUE(Write(1).ok());
  for (int i = 0; i < 2; ++i) {
    const auto done = compress(1);
    if (absl::IsFailedPrecondition(done.status())) GTEST_SKIP() << done.status();
    ASSERT_TRUE(done.ok()) << done.status();
    EXPECT_GT(done->after, 0u);
    EXPECT_LE(done->after, done->before);
    EXPECT_TRUE(i == 0 || done->after == done->before);
    auto dst = Block(0);
    ASSERT_TRUE(Read(1, dst).ok());
    EXPECT_EQ(dst, Block(1));
    EXPECT_EQ(tier_->Find(Key(1))->bytes, kBytes);
  }
  EXPECT_EQ(compress(2).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(log_.stored(), std::vector<BlockKey>{Key(1)});  // it is the same block
  EXPECT_TRUE(log_.removed().empty());
}

TEST_P(BlockTierContract, ErasedBlockIsAMissAndErasingNothingIsFine) {
  ASSERT_TRUE(Write(1).ok());
  EXPECT_TRUE(Erase(1).ok());
  EXPECT_TRUE(Erase(1).ok());
  auto dst = Block(0);
  EXPECT_EQ(Read(1, dst).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(log_.removed(), (std::vector<std::pair<BlockKey, TierRemoval>>{{Key(1), TierRemoval::kErased}}));
  ASSERT_TRUE(Write(1).ok());
  EXPECT_TRUE(Read(1, dst).ok());
}

TEST_P(BlockTierContract, ErasesByTenantSessionAndAllWithACount) {
  for (uint8_t n = 1; n <= 4; ++n) ASSERT_TRUE(Write(n).ok());
  EXPECT_EQ(*EraseIf(BlocksOfTenant("nobody")), 0u);
  EXPECT_EQ(*EraseIf(BlocksOfTenant("even")), 2u);
  EXPECT_FALSE(tier_->Contains(Key(2)));
  EXPECT_TRUE(tier_->Contains(Key(3)));
  ASSERT_TRUE(Write(2).ok());
  EXPECT_EQ(*EraseIf(BlocksOfSession(1)), 2u);
  EXPECT_TRUE(tier_->Contains(Key(2)));
  EXPECT_EQ(*EraseIf(EveryBlock()), 1u);
  EXPECT_EQ(tier_->stats().blocks, 0u);
  EXPECT_EQ(tier_->stats().bytes, 0u);
}

TEST_P(BlockTierContract, WritingAgainChangesNothing) {
  ASSERT_TRUE(Write(1).ok());
  ASSERT_TRUE(Write(1).ok());
  auto dst = Block(0);
  ASSERT_TRUE(Read(1, dst).ok());
  EXPECT_EQ(dst, Block(1));
  EXPECT_EQ(tier_->stats().blocks, 1u);
}

TEST_P(BlockTierContract, DamagedBlockIsDataLossThenAMissNeverWrongBytes) {
  ASSERT_TRUE(Write(1).ok());
  GetParam().corrupt(*tier_, Key(1));
  auto dst = Block(0);
  EXPECT_EQ(Read(1, dst).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(Read(1, dst).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(log_.removed(), (std::vector<std::pair<BlockKey, TierRemoval>>{{Key(1), TierRemoval::kDamaged}}));
}

TEST_P(BlockTierContract, StaysWithinItsCapacityByEvicting) {
  for (uint8_t n = 1; n <= 20; ++n) ASSERT_TRUE(Write(n).ok()) << int{n};
  size_t kept = 0;
  auto dst = Block(0);
  for (uint8_t n = 1; n <= 20; ++n) {
    const auto status = Read(n, dst);
    if (status.ok()) {
      ++kept;
      EXPECT_EQ(dst, Block(n));
    } else {
      EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
    }
  }
  EXPECT_GE(kept, 1u);
  EXPECT_LE(tier_->stats().bytes, tier_->caps().capacity_bytes);
  EXPECT_EQ(tier_->stats().blocks, kept);
  EXPECT_EQ(log_.stored().size(), 20u);
  EXPECT_EQ(log_.removed().size(), 20 - kept);
}

TEST_P(BlockTierContract, BuffersAndPayloadsOfImpossibleSizesAreRefused) {
  ASSERT_TRUE(Write(1).ok());
  std::vector<std::byte> small(kBytes - 1), large(kBytes + 1);
  EXPECT_EQ(Read(1, small).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Write(2, large).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Write(2, {}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(tier_->Contains(Key(2)));
}

TEST_P(BlockTierContract, ReadWithoutTimeIsRefused) {
  ASSERT_TRUE(Write(1).ok());
  auto dst = Block(0);
  const auto record = Await<absl::StatusOr<BlockTier::Record>>(
      [&](BlockTier::ReadDone d) { tier_->Read(Key(1), {}, dst, absl::ZeroDuration(), std::move(d)); });
  EXPECT_EQ(record.status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_P(BlockTierContract, ListWalksEveryBlockOnce) {
  for (uint8_t n = 1; n <= 4; ++n) ASSERT_TRUE(Write(n).ok());
  std::set<BlockKey> seen;
  std::optional<uint64_t> cursor = 0;
  for (int pages = 0; cursor.has_value() && pages < 10; ++pages) {
    const BlockTier::Page page = tier_->List(*cursor, 3);
    EXPECT_LE(page.entries.size(), 3u);
    for (const TierEntry& entry : page.entries) {
      EXPECT_TRUE(seen.insert(entry.key).second);
      const uint8_t n = entry.key.bytes[0];
      EXPECT_EQ(entry.tenant, Info(n).tenant);
      EXPECT_EQ(entry.session, Info(n).session);
      EXPECT_EQ(entry.parent, Info(n).parent);
      EXPECT_EQ(entry.position, n);
      EXPECT_EQ(entry.bytes, kBytes);
    }
    cursor = page.next;
  }
  EXPECT_FALSE(cursor.has_value());
  EXPECT_EQ(seen.size(), 4u);
}

TEST_P(BlockTierContract, AnAnsweredReadCannotBeCancelled) {
  ASSERT_TRUE(Write(1).ok());
  auto dst = Block(0);
  BlockTier::ReadId id = 0;
  const auto record = Await<absl::StatusOr<BlockTier::Record>>(
      [&](BlockTier::ReadDone d) { id = tier_->Read(Key(1), {}, dst, absl::Seconds(10), std::move(d)); });
  ASSERT_TRUE(record.ok());
  EXPECT_FALSE(tier_->CancelRead(id));
}

}  // namespace tidepool
