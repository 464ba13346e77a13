#include "kvstore/codec/cachegen.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/kvstore/codec/synthetic_kv.h"

namespace tidepool {
namespace {

using Bytes = std::vector<std::byte>;

const BlockLayout kLayouts[] = {
    {4, 2, 64, 32, DType::kBF16}, {2, 1, 128, 16, DType::kBF16}, {3, 2, 20, 40, DType::kF32},
    {1, 1, 1, 1, DType::kBF16},   {1, 3, 33, 7, DType::kF16},    {2, 2, 64, 256, DType::kBF16},
};

Bytes Encoded(const BlockLayout& layout, int level, const Bytes& block, CacheGenCost* cost = nullptr) {
  Bytes out;
  EXPECT_TRUE(CacheGenEncode(layout, level, block, out, cost));
  EXPECT_LE(out.size(), CacheGenMaxBytes(layout));
  return out;
}
Bytes Decoded(const BlockLayout& layout, const Bytes& body) {
  Bytes out(layout.block_bytes());
  const absl::Status s = CacheGenDecode(layout, body, out);
  EXPECT_TRUE(s.ok()) << s;
  return out;
}
double Number(const BlockLayout& layout, const Bytes& block, size_t i) {
  return KvElement(layout.dtype, block.data(), i);
}
size_t Count(const BlockLayout& layout) { return layout.block_bytes() / DTypeBytes(layout.dtype); }

TEST(CacheGen, BinsFollowTheLayer) {
  // CacheGen's own, for 32 layers.
  EXPECT_EQ(CacheGenBins(2, 0, 32, false), 32);
  EXPECT_EQ(CacheGenBins(2, 9, 32, false), 32);
  EXPECT_EQ(CacheGenBins(2, 10, 32, false), 16);
  EXPECT_EQ(CacheGenBins(2, 1, 32, true), 32);
  EXPECT_EQ(CacheGenBins(2, 2, 32, true), 16);
  EXPECT_EQ(CacheGenBins(1, 19, 32, false), 16);
  EXPECT_EQ(CacheGenBins(1, 20, 32, false), 12);
  EXPECT_EQ(CacheGenBins(1, 0, 32, true), 16);
  EXPECT_EQ(CacheGenBins(1, 2, 32, true), 12);
  EXPECT_EQ(CacheGenBins(3, 31, 32, true), 32);
  // Of four layers the first stands for the first of 32.
  EXPECT_EQ(CacheGenBins(2, 0, 4, true), 32);
  EXPECT_EQ(CacheGenBins(2, 1, 4, true), 16);
}

// The error is half a step, and the step is what the head says.
TEST(CacheGen, IsLosslessAfterTheRounding) {
  for (const BlockLayout& layout : kLayouts) {
    for (const int level : {1, 2, 3}) {
      const Bytes block = SyntheticBlock(layout, 5);
      const Bytes once = Decoded(layout, Encoded(layout, level, block));
      const size_t head_elems = layout.head_elems();
      for (size_t plane = 0; plane < Count(layout) / head_elems; ++plane) {
        const uint32_t layer = static_cast<uint32_t>(plane / (2 * layout.kv_heads));
        const bool v = plane / layout.kv_heads % 2 == 1;
        // The mean of the channels' deviations, by the book.
        double deviation = 0, amax = 0;
        for (uint32_t c = 0; c < layout.head_dim; ++c) {
          double sum = 0, squares = 0;
          for (uint32_t t = 0; t < layout.block_tokens; ++t) {
            const double x = Number(layout, block, plane * head_elems + size_t{t} * layout.head_dim + c);
            sum += x;
            squares += x * x;
            amax = std::max(amax, std::abs(x));
          }
          const double mean = sum / layout.block_tokens;
          deviation += std::sqrt(std::max(0.0, squares / layout.block_tokens - mean * mean));
        }
        const double step = std::max(8 * std::max(deviation / layout.head_dim, amax / 2048) /
                                         CacheGenBins(level, layer, layout.layers, v),
                                     amax / 16000);
        for (size_t i = 0; i < head_elems; ++i) {
          const double x = Number(layout, block, plane * head_elems + i);
          const double y = Number(layout, once, plane * head_elems + i);
          ASSERT_LE(std::abs(x - y), step * 0.505 + std::abs(x) * 0x1p-8 + 1e-6 * amax)
              << layout.ToString() << " level " << level << " plane " << plane << " element " << i;
        }
      }
    }
  }
}

TEST(CacheGen, TheStreamIsWithinTwoPercentOfTheEntropyOfItsSymbols) {
  const BlockLayout layout{2, 4, 128, 256, DType::kBF16};
  for (const int level : {1, 2, 3}) {
    CacheGenCost cost;
    const Bytes body = Encoded(layout, level, SyntheticBlock(layout, 9), &cost);
    EXPECT_EQ(cost.symbols, Count(layout));
    EXPECT_EQ(cost.stream_bits + cost.side_bits, body.size() * 8);
    EXPECT_LT(static_cast<double>(cost.stream_bits), 1.005 * (cost.ideal_bits + cost.anchor_bits));
    // Everything that a payload of 256 tokens holds, against the symbols alone.
    EXPECT_LT(static_cast<double>(body.size() * 8), 1.04 * cost.ideal_bits) << level;
  }
}

TEST(CacheGen, HigherLevelsTakeMoreBytesAndLoseLess) {
  const BlockLayout layout{8, 4, 64, 32, DType::kBF16};
  const Bytes block = SyntheticBlock(layout, 4);
  double last_error = 1e30;
  size_t last_bytes = 0;
  for (const int level : {1, 2, 3}) {
    const Bytes body = Encoded(layout, level, block);
    const Bytes back = Decoded(layout, body);
    double error = 0;
    for (size_t i = 0; i < Count(layout); ++i) {
      const double d = Number(layout, block, i) - Number(layout, back, i);
      error += d * d;
    }
    EXPECT_GT(body.size(), last_bytes);
    EXPECT_LT(error, last_error);
    last_bytes = body.size();
    last_error = error;
  }
  EXPECT_LT(last_bytes * 3, block.size());
}

TEST(CacheGen, ConstantAndZeroBlocksTakeNextToNothing) {
  const BlockLayout layout{2, 2, 64, 32, DType::kBF16};
  for (const float value : {0.0f, 3.0f, -1e-30f, 1e30f}) {
    Bytes block(layout.block_bytes());
    for (size_t i = 0; i < Count(layout); ++i) KvSetElement(layout.dtype, block.data(), i, value);
    const Bytes body = Encoded(layout, 1, block);
    EXPECT_LT(body.size(), block.size() / 10);
    const Bytes back = Decoded(layout, body);
    for (size_t i = 0; i < Count(layout); ++i) {
      ASSERT_NEAR(Number(layout, back, i), Number(layout, block, i), std::abs(value) * 0.005 + 1e-30);
    }
  }
}

TEST(CacheGen, WhatWouldNotShrinkIsKeptAsItIs) {
  const BlockLayout layout{2, 1, 2, 1, DType::kBF16};  // a head longer than the layer
  const Bytes block = SyntheticBlock(layout, 3);
  const Bytes body = Encoded(layout, 3, block);
  EXPECT_EQ(body.size(), CacheGenMaxBytes(layout));
  EXPECT_EQ(Decoded(layout, body), block);
}

TEST(CacheGen, NumbersThatAreNotFiniteAreRefused) {
  const BlockLayout layout{2, 2, 16, 32, DType::kBF16};
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -2e36f}) {
    Bytes block = SyntheticBlock(layout, 3), out;
    KvSetElement(layout.dtype, block.data(), Count(layout) - 5, bad);
    EXPECT_FALSE(CacheGenEncode(layout, 2, block, out));
  }
}

TEST(CacheGen, ExtremeOutliersTakeEscapesNotTheirNeighboursPrecision) {
  const BlockLayout layout{1, 1, 64, 32, DType::kF32};
  Bytes block = SyntheticBlock(layout, 8);
  const Bytes before = Decoded(layout, Encoded(layout, 3, block));
  for (uint32_t t = 0; t < layout.block_tokens; ++t) {
    KvSetElement(layout.dtype, block.data() + layout.Offset(0, false, 0, t), 7,
                 t % 2 == 0 ? 150.0f : -150.0f);
  }
  const Bytes back = Decoded(layout, Encoded(layout, 3, block));
  double error = 0, plain = 0;
  for (size_t i = 0; i < layout.head_elems(); ++i) {
    const double x = Number(layout, block, i), d = x - Number(layout, back, i);
    if (i % 64 == 7) {
      EXPECT_LT(std::abs(d), 2.0);
      continue;
    }
    error += d * d;
    plain += std::pow(x - Number(layout, before, i), 2);
  }
  // One channel at 150 times the others makes the mean deviation about 3 times as large, not 150 times.
  EXPECT_LT(error, plain * 20);
}

TEST(CacheGen, DamageIsAnErrorOrOtherNumbersNeverOutOfBounds) {
  const BlockLayout layout{3, 2, 24, 32, DType::kBF16};
  const Bytes good = Encoded(layout, 2, SyntheticBlock(layout, 6));
  Rng rng(7);
  for (int i = 0; i < 3000; ++i) {
    Bytes bad = good;
    for (uint64_t n = 1 + rng.Below(4); n > 0; --n)
      bad[rng.Below(bad.size())] = static_cast<std::byte>(rng.Next());
    if (rng.Chance(0.3)) bad.resize(rng.Below(bad.size() + 1));
    if (rng.Chance(0.1)) bad.insert(bad.end(), 3, std::byte{1});
    bad.shrink_to_fit();
    Bytes out(layout.block_bytes());
    (void)CacheGenDecode(layout, bad, out);  // the sanitizer judges
  }
  for (size_t n = 0; n < good.size(); ++n) {
    const Bytes cut(good.begin(), good.begin() + static_cast<ptrdiff_t>(n));
    Bytes out(layout.block_bytes());
    EXPECT_EQ(CacheGenDecode(layout, cut, out).code(), absl::StatusCode::kDataLoss) << n;
  }
}

}  // namespace
}  // namespace tidepool
