#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <vector>

#include "kvstore/block_tier.h"

namespace tidepool {

// One implementation under test. Every one runs the same suite:
//   INSTANTIATE_TEST_SUITE_P(Fake, BlockTierContract, testing::Values(BlockTierCase{...}));
struct BlockTierCase {
  // A fresh tier with room for `max_blocks` blocks of 256 bytes.
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
  static std::vector<std::byte> Block(uint8_t n) { return std::vector<std::byte>(kBytes, std::byte{n}); }

  // Runs one call and waits for its only answer.
  static absl::Status Await(const std::function<void(BlockTier::Done)>& call) {
    auto answer = std::make_shared<std::promise<absl::Status>>();
    auto future = answer->get_future();
    call([answer](absl::Status s) { answer->set_value(std::move(s)); });  // throws if answered twice
    if (future.wait_for(std::chrono::seconds(10)) != std::future_status::ready)
      return absl::DeadlineExceededError("the tier did not answer within 10 s");
    return future.get();
  }
  absl::Status Read(uint8_t n, std::vector<std::byte>& dst) {
    return Await([&](BlockTier::Done d) { tier_->Read(Key(n), dst, std::move(d)); });
  }
  absl::Status Write(uint8_t n) {
    const auto block = Block(n);
    return Await([&](BlockTier::Done d) { tier_->Write(Key(n), block, std::move(d)); });
  }
  absl::Status Erase(uint8_t n) {
    return Await([&](BlockTier::Done d) { tier_->Erase(Key(n), std::move(d)); });
  }

  void SetUp() override { tier_ = GetParam().make(4); }
  std::unique_ptr<BlockTier> tier_;
};

TEST_P(BlockTierContract, CapsAreUsable) {
  const auto caps = tier_->caps();
  EXPECT_FALSE(caps.name.empty());
  EXPECT_EQ(caps.block_bytes, kBytes);
  EXPECT_GE(caps.capacity_bytes, 4 * kBytes);
  EXPECT_GE(caps.max_inflight, 1u);
}

TEST_P(BlockTierContract, ReadsBackWhatWasWritten) {
  ASSERT_TRUE(Write(1).ok());
  ASSERT_TRUE(Write(2).ok());
  auto dst = Block(0);
  EXPECT_TRUE(tier_->Contains(Key(1)));
  ASSERT_TRUE(Read(1, dst).ok());
  EXPECT_EQ(dst, Block(1));
}

TEST_P(BlockTierContract, AbsentBlockIsNotFound) {
  auto dst = Block(0);
  EXPECT_EQ(Read(1, dst).code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(tier_->Contains(Key(1)));
}

TEST_P(BlockTierContract, ErasedBlockIsAMissAndErasingNothingIsFine) {
  ASSERT_TRUE(Write(1).ok());
  EXPECT_TRUE(Erase(1).ok());
  EXPECT_TRUE(Erase(1).ok());
  auto dst = Block(0);
  EXPECT_EQ(Read(1, dst).code(), absl::StatusCode::kNotFound);
}

TEST_P(BlockTierContract, WritingAgainChangesNothing) {
  ASSERT_TRUE(Write(1).ok());
  ASSERT_TRUE(Write(1).ok());
  auto dst = Block(0);
  ASSERT_TRUE(Read(1, dst).ok());
  EXPECT_EQ(dst, Block(1));
}

TEST_P(BlockTierContract, DamagedBlockIsDataLossThenAMissNeverWrongBytes) {
  ASSERT_TRUE(Write(1).ok());
  GetParam().corrupt(*tier_, Key(1));
  auto dst = Block(0);
  EXPECT_EQ(Read(1, dst).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(Read(1, dst).code(), absl::StatusCode::kNotFound);
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
  EXPECT_LE(kept * kBytes, tier_->caps().capacity_bytes);
}

TEST_P(BlockTierContract, BufferOfAnotherSizeIsRefused) {
  ASSERT_TRUE(Write(1).ok());
  std::vector<std::byte> small(kBytes - 1);
  EXPECT_EQ(Read(1, small).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Await([&](BlockTier::Done d) { tier_->Write(Key(2), small, std::move(d)); }).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(tier_->Contains(Key(2)));
}

}  // namespace tidepool
