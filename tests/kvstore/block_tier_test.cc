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

TEST(FakeBlockTier, FailedBackendIsUnavailableAndComesBack) {
  FakeBlockTier tier(4, 2);
  std::vector<std::byte> block(4);
  absl::Status status;
  auto keep = [&](absl::Status s) { status = std::move(s); };
  tier.set_failed(true);
  tier.Write(BlockKey{}, block, keep);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  tier.Read(BlockKey{}, block, keep);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  tier.set_failed(false);
  tier.Write(BlockKey{}, block, keep);
  EXPECT_TRUE(status.ok());
}

TEST(FakeBlockTier, NoRoomIsResourceExhausted) {
  FakeBlockTier tier(4, 0);
  std::vector<std::byte> block(4);
  absl::Status status;
  tier.Write(BlockKey{}, block, [&](absl::Status s) { status = std::move(s); });
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(tier.Contains(BlockKey{}));
}

}  // namespace
}  // namespace tidepool
