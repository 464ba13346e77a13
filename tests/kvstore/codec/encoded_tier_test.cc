#include "kvstore/codec/encoded_tier.h"

#include <gtest/gtest.h>

#include <future>

#include "tests/kvstore/codec/synthetic_kv.h"
#include "tests/kvstore/fake_block_tier.h"

namespace tidepool {
namespace {

using Bytes = std::vector<std::byte>;

const BlockLayout kLayout{2, 2, 64, 32, DType::kBF16};

class EncodedTierTest : public testing::Test {
 protected:
  void Make(const char* codec, size_t max_waiting = 64) {
    codec_ = FindBlockCodec(codec);
    auto inner = std::make_unique<FakeBlockTier>(codec_->MaxEncodedBytes(kLayout), 8);
    inner_ = inner.get();
    auto tier = EncodedTier::Create({.codec = codec_,
                                     .layout = kLayout,
                                     .inner = std::move(inner),
                                     .max_waiting = max_waiting,
                                     .metrics = &metrics_});
    ASSERT_TRUE(tier.ok()) << tier.status();
    tier_ = std::move(*tier);
  }
  static BlockInfo Info(uint8_t n) {
    BlockInfo info;
    info.key.bytes.fill(n);
    info.tokens = {n, n + 1};
    info.tenant = n % 2 == 0 ? "even" : "odd";
    return info;
  }
  template <typename T, typename Call>
  static T Await(Call call) {
    auto answer = std::make_shared<std::promise<T>>();
    auto future = answer->get_future();
    call([answer](T value) { answer->set_value(std::move(value)); });  // throws if answered twice
    if (future.wait_for(std::chrono::seconds(20)) != std::future_status::ready)
      return absl::DeadlineExceededError("no answer");
    return future.get();
  }
  absl::Status Write(uint8_t n, const Bytes& block) {
    return Await<absl::Status>([&](BlockTier::Done d) { tier_->Write(Info(n), block, std::move(d)); });
  }
  absl::StatusOr<BlockTier::Record> Read(uint8_t n, Bytes& dst, absl::Duration timeout = absl::Seconds(20)) {
    return Await<absl::StatusOr<BlockTier::Record>>(
        [&](BlockTier::ReadDone d) { tier_->Read(Info(n).key, Info(n).tokens, dst, timeout, std::move(d)); });
  }
  absl::Status Erase(uint8_t n) {
    return Await<absl::Status>([&](BlockTier::Done d) { tier_->Erase(Info(n).key, std::move(d)); });
  }

  MetricRegistry metrics_;
  const BlockCodec* codec_ = nullptr;
  FakeBlockTier* inner_ = nullptr;
  std::unique_ptr<EncodedTier> tier_;
};

TEST_F(EncodedTierTest, WhatComesBackIsWhatTheCodecMakesOfIt) {
  for (const char* name : {"none", "int8", "cachegen-2"}) {
    tier_.reset();
    Make(name);
    const Bytes block = SyntheticBlock(kLayout, 5);
    ASSERT_TRUE(Write(1, block).ok());
    Bytes payload(codec_->MaxEncodedBytes(kLayout)), want(block.size()), got(block.size());
    payload.resize(*codec_->Encode(kLayout, block, payload));
    ASSERT_TRUE(codec_->Decode(kLayout, payload, want).ok());
    const auto record = Read(1, got);
    ASSERT_TRUE(record.ok()) << record.status();
    EXPECT_EQ(got, want);
    EXPECT_EQ(record->bytes, kLayout.block_bytes());
    EXPECT_EQ(record->info.tokens, Info(1).tokens);
    EXPECT_EQ(tier_->Find(Info(1).key)->bytes, payload.size());  // what it takes below
    EXPECT_EQ(tier_->stats().bytes, inner_->stats().bytes);
    EXPECT_EQ(tier_->caps().block_bytes, kLayout.block_bytes());
  }
}

TEST_F(EncodedTierTest, MissesAndOtherTokensPassThrough) {
  Make("int8");
  Bytes dst(kLayout.block_bytes());
  EXPECT_EQ(Read(1, dst).status().code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(Write(1, SyntheticBlock(kLayout, 1)).ok());
  const std::vector<int32_t> other = {7, 7};
  EXPECT_EQ(Await<absl::StatusOr<BlockTier::Record>>([&](BlockTier::ReadDone d) {
              tier_->Read(Info(1).key, other, dst, absl::Seconds(5), std::move(d));
            })
                .status()
                .code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(Read(1, dst, absl::ZeroDuration()).status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(EncodedTierTest, SizesThatAreNoBlockAreRefused) {
  Make("int8");
  Bytes small(kLayout.block_bytes() - 1);
  EXPECT_EQ(Write(1, small).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(Write(1, SyntheticBlock(kLayout, 1)).ok());
  EXPECT_EQ(Read(1, small).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(EncodedTierTest, ATierBelowThatIsTooSmallIsRefusedAtOnce) {
  const auto tier = EncodedTier::Create({.codec = FindBlockCodec("cachegen"),
                                         .layout = kLayout,
                                         .inner = std::make_unique<FakeBlockTier>(kLayout.block_bytes(), 8),
                                         .metrics = &metrics_});
  EXPECT_EQ(tier.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(EncodedTierTest, ABlockThatIsNotFiniteIsNotStored) {
  Make("int8");
  Bytes block = SyntheticBlock(kLayout, 1);
  KvSetElement(kLayout.dtype, block.data(), 3, std::nanf(""));
  EXPECT_EQ(Write(1, block).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(tier_->Contains(Info(1).key));
}

TEST_F(EncodedTierTest, APayloadThatDoesNotDecodeIsAMissAndGone) {
  Make("int8");
  Bytes garbage(500, std::byte{3});
  inner_->Write(Info(1), garbage, [](absl::Status s) { ASSERT_TRUE(s.ok()); });
  Bytes dst(kLayout.block_bytes());
  EXPECT_EQ(Read(1, dst).status().code(), absl::StatusCode::kDataLoss);
  // Erasures keep their order: behind this one the first is done.
  EXPECT_TRUE(Erase(2).ok());
  EXPECT_EQ(Read(1, dst).status().code(), absl::StatusCode::kNotFound);
}

// A store that ran under another codec before: its records are of no use, and not mistaken for ours.
TEST_F(EncodedTierTest, APayloadOfAnotherCodecIsAMiss) {
  Make("int8");
  const BlockCodec& other = *FindBlockCodec("int4");
  const Bytes block = SyntheticBlock(kLayout, 1);
  Bytes payload(other.MaxEncodedBytes(kLayout));
  payload.resize(*other.Encode(kLayout, block, payload));
  inner_->Write(Info(1), payload, [](absl::Status s) { ASSERT_TRUE(s.ok()); });
  Bytes dst(kLayout.block_bytes());
  EXPECT_EQ(Read(1, dst).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(EncodedTierTest, AnErasureTakesTheWritesBeforeItAlong) {
  Make("cachegen-1");
  const Bytes block = SyntheticBlock(kLayout, 2);
  for (int round = 0; round < 20; ++round) {
    std::promise<absl::Status> written;
    tier_->Write(Info(4), block, [&](absl::Status s) { written.set_value(std::move(s)); });
    ASSERT_TRUE(Erase(4).ok());  // while it may still be encoding
    written.get_future().get().IgnoreError();
    Bytes dst(kLayout.block_bytes());
    ASSERT_EQ(Read(4, dst).status().code(), absl::StatusCode::kNotFound);
  }
  for (uint8_t n = 1; n <= 4; ++n) ASSERT_TRUE(Write(n, block).ok());
  const auto erased = Await<absl::StatusOr<uint64_t>>(
      [&](BlockTier::CountDone d) { tier_->EraseIf(BlocksOfTenant("even"), std::move(d)); });
  EXPECT_EQ(*erased, 2u);
}

TEST_F(EncodedTierTest, BeyondItsQueueWritesAreDroppedAndAnswered) {
  Make("cachegen-3", 2);
  const Bytes block = SyntheticBlock(kLayout, 2);
  std::atomic<int> ok{0}, dropped{0};
  constexpr int kWrites = 200;
  for (int i = 0; i < kWrites; ++i) {
    tier_->Write(Info(static_cast<uint8_t>(1 + i % 200)), block,
                 [&](absl::Status s) { (absl::IsResourceExhausted(s) ? dropped : ok).fetch_add(1); });
  }
  tier_.reset();  // answers what was accepted
  EXPECT_EQ(ok + dropped, kWrites);
  EXPECT_GT(dropped, 0);
  EXPECT_GE(ok, 2);
}

TEST_F(EncodedTierTest, AReadIsAnsweredOnceHoweverItEnds) {
  Make("int8");
  ASSERT_TRUE(Write(1, SyntheticBlock(kLayout, 1)).ok());
  inner_->Hold();
  Bytes dst(kLayout.block_bytes());
  std::vector<absl::StatusCode> answers;
  const auto id =
      tier_->Read(Info(1).key, {}, dst, absl::Seconds(5),
                  [&](absl::StatusOr<BlockTier::Record> r) { answers.push_back(r.status().code()); });
  EXPECT_TRUE(answers.empty());
  EXPECT_TRUE(tier_->CancelRead(id));
  EXPECT_EQ(answers, std::vector{absl::StatusCode::kCancelled});
  EXPECT_FALSE(tier_->CancelRead(id));
  EXPECT_FALSE(tier_->CancelRead(12345));
  inner_->Release();
  EXPECT_EQ(answers.size(), 1u);
}

TEST_F(EncodedTierTest, ReadsThatAreUnderWayAreAnsweredBeforeItIsGone) {
  Make("int8");
  ASSERT_TRUE(Write(1, SyntheticBlock(kLayout, 1)).ok());
  inner_->Hold();
  std::vector<Bytes> dsts(8, Bytes(kLayout.block_bytes()));
  std::atomic<int> answers{0};
  for (Bytes& dst : dsts) {
    tier_->Read(Info(1).key, {}, dst, absl::Seconds(20),
                [&](absl::StatusOr<BlockTier::Record>) { ++answers; });
  }
  tier_.reset();
  EXPECT_EQ(answers, 8);
}

TEST_F(EncodedTierTest, SpeedsAreThoseOfBlocksNotOfPayloads) {
  Make("int4");
  inner_->set_speed({.latency_seconds = 0.01, .bytes_per_second = 1e9});
  ASSERT_TRUE(Write(1, SyntheticBlock(kLayout, 1)).ok());
  Bytes dst(kLayout.block_bytes());
  ASSERT_TRUE(Read(1, dst).ok());
  const TierStats stats = tier_->stats();
  EXPECT_GT(stats.read.bytes_per_second, 3e9);
  EXPECT_GT(stats.read.latency_seconds, 0.01);
}

TEST_F(EncodedTierTest, ATierThatIsOffIsOff) {
  Make("int8");
  inner_->SetHealth({TierState::kOff, "pulled"});
  EXPECT_EQ(Write(1, SyntheticBlock(kLayout, 1)).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(tier_->health().reason, "pulled");
}

}  // namespace
}  // namespace tidepool
