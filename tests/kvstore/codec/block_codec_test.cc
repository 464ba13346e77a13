#include "kvstore/codec/block_codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/kvstore/codec/synthetic_kv.h"

namespace tidepool {
namespace {

using Bytes = std::vector<std::byte>;
using testing::HasSubstr;

const BlockLayout kLayout{2, 2, 64, 32, DType::kBF16};
const char* const kNames[] = {"none",       "int8",       "fp8",        "int4",
                              "cachegen-1", "cachegen-2", "cachegen-3", "cachegen"};

Bytes Encoded(const BlockCodec& codec, const BlockLayout& layout, const Bytes& block) {
  Bytes out(codec.MaxEncodedBytes(layout));
  const auto bytes = codec.Encode(layout, block, out);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  out.resize(bytes.value_or(0));
  return out;
}

double RelativeError(const BlockLayout& layout, const Bytes& a, const Bytes& b) {
  double error = 0, power = 0;
  for (size_t i = 0; i < a.size() / DTypeBytes(layout.dtype); ++i) {
    const double x = KvElement(layout.dtype, a.data(), i), y = KvElement(layout.dtype, b.data(), i);
    error += (x - y) * (x - y);
    power += x * x;
  }
  return std::sqrt(error / power);
}

TEST(BlockCodec, IsFoundByItsNameOnly) {
  for (const char* name : kNames) {
    ASSERT_NE(FindBlockCodec(name), nullptr) << name;
    EXPECT_EQ(FindBlockCodec(name)->name(), name);
  }
  EXPECT_EQ(FindBlockCodec("")->name(), "none");
  for (const char* name : {"zstd", "INT8", "cachegen-4", "cachegen-", " none"}) {
    EXPECT_EQ(FindBlockCodec(name), nullptr) << name;
    EXPECT_THAT(std::string(GetBlockCodec(name).status().message()), HasSubstr("int4"));
  }
}

TEST(BlockCodec, RoundTripsWithinItsErrorAndSize) {
  struct Want {
    const char* name;
    double error, bytes;  // at most, of the block's
  };
  for (const Want& want : {Want{"none", 0, 1.01},
                           {"int8", 0.025, 0.51},
                           {"fp8", 0.03, 0.51},
                           {"int4", 0.12, 0.33},
                           {"cachegen-3", 0.08, 0.31},
                           {"cachegen-2", 0.16, 0.27},
                           {"cachegen-1", 0.2, 0.25}}) {
    const BlockCodec& codec = *FindBlockCodec(want.name);
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      for (const BlockLayout& layout :
           {BlockLayout{4, 2, 64, 32, dtype}, BlockLayout{2, 4, 128, 64, dtype}}) {
        const Bytes block = SyntheticBlock(layout, 3);
        const Bytes payload = Encoded(codec, layout, block);
        EXPECT_LE(payload.size(), codec.MaxEncodedBytes(layout));
        const double scale = dtype == DType::kF32 ? 0.7 : 1;  // the same codes of wider numbers
        EXPECT_LE(static_cast<double>(payload.size()),
                  want.bytes * (want.error == 0 ? 1 : scale) * static_cast<double>(block.size()))
            << want.name << " " << layout.ToString();
        Bytes back(block.size());
        ASSERT_TRUE(codec.Decode(layout, payload, back).ok());
        EXPECT_LE(RelativeError(layout, block, back), want.error) << want.name << " " << layout.ToString();
        EXPECT_EQ(CodecOfPayload(payload), &codec);
      }
    }
  }
}

TEST(BlockCodec, OddShapesRoundTrip) {
  for (const char* name : kNames) {
    const BlockCodec& codec = *FindBlockCodec(name);
    for (const BlockLayout& layout :
         {BlockLayout{1, 1, 1, 1, DType::kF32}, BlockLayout{3, 1, 80, 33, DType::kBF16},
          BlockLayout{1, 3, 7, 5, DType::kF16}, BlockLayout{2, 1, 256, 1024, DType::kBF16}}) {
      const Bytes block = SyntheticBlock(layout, 3);
      Bytes back(block.size());
      ASSERT_TRUE(codec.Decode(layout, Encoded(codec, layout, block), back).ok()) << name;
      if (layout.block_tokens > 1) {
        EXPECT_LT(RelativeError(layout, block, back), 0.25) << name;
      }
    }
  }
}

TEST(BlockCodec, EncodingTwiceGivesTheSameBytes) {
  const Bytes block = SyntheticBlock(kLayout, 1);
  for (const char* name : kNames) {
    EXPECT_EQ(Encoded(*FindBlockCodec(name), kLayout, block), Encoded(*FindBlockCodec(name), kLayout, block));
  }
}

TEST(BlockCodec, RepeatedTripsDoNotDrift) {
  const Bytes block = SyntheticBlock(kLayout, 12);
  for (const char* name : {"int8", "fp8", "int4", "cachegen-3", "cachegen-1"}) {
    const BlockCodec& codec = *FindBlockCodec(name);
    Bytes once(block.size());
    ASSERT_TRUE(codec.Decode(kLayout, Encoded(codec, kLayout, block), once).ok());
    Bytes now = once;
    for (int i = 0; i < 8; ++i) {
      Bytes next(now.size());
      ASSERT_TRUE(codec.Decode(kLayout, Encoded(codec, kLayout, now), next).ok());
      now = next;
    }
    EXPECT_LT(RelativeError(kLayout, block, now), 1.5 * RelativeError(kLayout, block, once) + 0.002) << name;
  }
}

TEST(BlockCodec, EveryDamagedByteIsDataLoss) {
  Rng rng(2);
  const BlockLayout layout{2, 1, 16, 32, DType::kBF16};
  const Bytes block = SyntheticBlock(layout, 2);
  for (const char* name : kNames) {
    const BlockCodec& codec = *FindBlockCodec(name);
    const Bytes good = Encoded(codec, layout, block);
    Bytes out(block.size());
    for (size_t i = 0; i < good.size(); ++i) {
      Bytes bad = good;
      bad[i] ^= static_cast<std::byte>(1u << rng.Below(8));
      EXPECT_EQ(codec.Decode(layout, bad, out).code(), absl::StatusCode::kDataLoss) << name << " byte " << i;
      EXPECT_EQ(codec.Decode(layout, std::span(good).first(i), out).code(), absl::StatusCode::kDataLoss);
    }
    Bytes longer = good;
    longer.push_back(std::byte{0});
    EXPECT_EQ(codec.Decode(layout, longer, out).code(), absl::StatusCode::kDataLoss);
  }
}

TEST(BlockCodec, APayloadOfAnotherCodecOrLayoutIsRefusedByName) {
  const Bytes block = SyntheticBlock(kLayout, 2);
  const Bytes payload = Encoded(*FindBlockCodec("int8"), kLayout, block);
  Bytes out(block.size());
  const absl::Status codec = FindBlockCodec("int4")->Decode(kLayout, payload, out);
  EXPECT_EQ(codec.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(codec.message()), HasSubstr("int8"));
  BlockLayout other = kLayout;
  std::swap(other.layers, other.kv_heads);
  other.layers = 4;
  other.kv_heads = 1;
  ASSERT_EQ(other.block_bytes(), kLayout.block_bytes());
  const absl::Status layout = FindBlockCodec("int8")->Decode(other, payload, out);
  EXPECT_EQ(layout.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(layout.message()), HasSubstr("l4 h1"));
}

TEST(BlockCodec, CacheGenTakesEveryLevelAndNothingElse) {
  const Bytes block = SyntheticBlock(kLayout, 2);
  Bytes out(block.size());
  const BlockCodec& any = *FindBlockCodec("cachegen");
  for (const char* level : {"cachegen-1", "cachegen-2", "cachegen-3"}) {
    EXPECT_TRUE(any.Decode(kLayout, Encoded(*FindBlockCodec(level), kLayout, block), out).ok());
  }
  EXPECT_FALSE(any.Decode(kLayout, Encoded(*FindBlockCodec("fp8"), kLayout, block), out).ok());
  EXPECT_FALSE(FindBlockCodec("cachegen-2")
                   ->Decode(kLayout, Encoded(*FindBlockCodec("cachegen-1"), kLayout, block), out)
                   .ok());
}

TEST(BlockCodec, NumbersThatAreNotFiniteAreRefused) {
  Bytes block = SyntheticBlock(kLayout, 2);
  KvSetElement(kLayout.dtype, block.data(), 1000, std::nanf(""));
  for (const char* name : {"int8", "fp8", "int4", "cachegen-2"}) {
    const BlockCodec& codec = *FindBlockCodec(name);
    Bytes out(codec.MaxEncodedBytes(kLayout));
    EXPECT_EQ(codec.Encode(kLayout, block, out).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(BlockCodec, SizesThatDoNotFitAreRefused) {
  const Bytes block = SyntheticBlock(kLayout, 2);
  const BlockCodec& codec = *FindBlockCodec("int8");
  Bytes out(codec.MaxEncodedBytes(kLayout)), small(out.size() - 1), half(block.size() / 2);
  EXPECT_FALSE(codec.Encode(kLayout, block, small).ok());
  EXPECT_FALSE(codec.Encode(kLayout, half, out).ok());
  EXPECT_FALSE(codec.Decode(kLayout, Encoded(codec, kLayout, block), half).ok());
}

}  // namespace
}  // namespace tidepool
