#include "kvstore/block_tier.h"

#include "tests/kvstore/block_tier_contract.h"
#include "tests/kvstore/fake_block_tier.h"

namespace tidepool {
namespace {

INSTANTIATE_TEST_SUITE_P(
    Fake, BlockTierContract,
    testing::Values(BlockTierCase{
        .make = [](size_t max_blocks) { return std::make_unique<FakeBlockTier>(256, max_blocks); },
        .corrupt = [](BlockTier& t, const BlockKey& key) { static_cast<FakeBlockTier&>(t).Corrupt(key); }}));

TEST(FakeBlockTier, SwitchedOffIsUnavailableAndComesBackWithItsBlocks) {
  FakeBlockTier tier(4, 2);
  TierLog log;
  tier.SetObserver(&log);
  std::vector<std::byte> block(4);
  absl::Status status;
  const auto keep = [&](absl::Status s) { status = std::move(s); };
  const auto keep_read = [&](absl::StatusOr<BlockTier::Record> r) { status = r.status(); };
  tier.Write(BlockInfo{}, block, keep);
  EXPECT_TRUE(status.ok());
  tier.SetHealth({TierState::kOff, "pulled"});
  tier.Write(BlockInfo{}, block, keep);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  tier.Read(BlockKey{}, {}, block, absl::Seconds(1), keep_read);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(tier.Contains(BlockKey{}));
  tier.SetHealth({TierState::kOn, ""});
  tier.Read(BlockKey{}, {}, block, absl::Seconds(1), keep_read);
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(log.health().size(), 2u);
}

TEST(FakeBlockTier, NoRoomIsResourceExhausted) {
  FakeBlockTier tier(4, 0);
  std::vector<std::byte> block(4);
  absl::Status status;
  tier.Write(BlockInfo{}, block, [&](absl::Status s) { status = std::move(s); });
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(tier.Contains(BlockKey{}));
}

TEST(FakeBlockTier, HeldReadIsAnsweredOnReleaseOrCancelledOnce) {
  FakeBlockTier tier(4, 2);
  std::vector<std::byte> block(4), dst(4);
  tier.Write(BlockInfo{}, block, [](absl::Status) {});
  tier.Hold();
  std::vector<absl::StatusCode> answers;
  const auto keep = [&](absl::StatusOr<BlockTier::Record> r) { answers.push_back(r.status().code()); };
  const auto first = tier.Read(BlockKey{}, {}, dst, absl::Seconds(1), keep);
  tier.Read(BlockKey{}, {}, dst, absl::Seconds(1), keep);
  EXPECT_TRUE(answers.empty());
  EXPECT_TRUE(tier.CancelRead(first));
  EXPECT_FALSE(tier.CancelRead(first));
  tier.Release();
  EXPECT_EQ(answers, (std::vector<absl::StatusCode>{absl::StatusCode::kCancelled, absl::StatusCode::kOk}));
}

}  // namespace
}  // namespace tidepool
