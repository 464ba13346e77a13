#include "kernels/kv_codec.h"

#include <algorithm>
#include <limits>

#include "kernels/cpu_features.h"
#include "kernels/kv_codec_cpu.h"
#include "kernels/paged_attention.h"
#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

using Bytes = std::vector<std::byte>;

constexpr KvQuant kQuants[] = {KvQuant::kFp8, KvQuant::kInt8, KvQuant::kInt4};
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

Bytes Encoded(const KvPlane& plane, const std::vector<float>& x) {
  Bytes out(plane.bytes());
  for (size_t i = 0; i < x.size(); ++i) KvSetElement(plane.dtype, out.data(), i, x[i]);
  return out;
}
std::vector<float> Decoded(const KvPlane& plane, const Bytes& bytes) {
  std::vector<float> out(plane.elems());
  for (size_t i = 0; i < out.size(); ++i) out[i] = KvElement(plane.dtype, bytes.data(), i);
  return out;
}
Bytes RoundTrip(KvQuant quant, const KvPlane& plane, const Bytes& block) {
  Bytes coded(KvQuantBytes(quant, plane)), out(plane.bytes());
  EXPECT_TRUE(KvQuantize(quant, plane, block.data(), coded.data()));
  KvDequantize(quant, plane, coded.data(), out.data());
  return out;
}

// Numbers of many magnitudes, zeros and both signs among them.
std::vector<float> Wide(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> out(n);
  for (float& x : out) {
    x = static_cast<float>(std::ldexp(rng.Uniform() * 2 - 1, static_cast<int>(rng.Below(14)) - 10));
    if (rng.Chance(0.05)) x = 0;
  }
  return out;
}

// Gaussian-like noise in which a few channels lie far out: what K looks like.
std::vector<float> WithOutlierChannels(uint32_t tokens, uint32_t dim, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> out(size_t{tokens} * dim);
  for (uint32_t t = 0; t < tokens; ++t) {
    for (uint32_t c = 0; c < dim; ++c) {
      const double noise = rng.Uniform() + rng.Uniform() + rng.Uniform() - 1.5;
      out[size_t{t} * dim + c] = static_cast<float>(noise + (c % 16 == 5 ? 20.0 + noise : 0.0));
    }
  }
  return out;
}

TEST(KvCodec, EveryInstructionSetWritesAndReadsTheReferencesBits) {
  for (const KvQuant quant : kQuants) {
    for (const DType dtype : kDTypes) {
      for (const bool v : {false, true}) {
        for (const auto& [tokens, dim] : {std::pair{32u, 64u},
                                          {32u, 128u},
                                          {1u, 1u},
                                          {3u, 5u},
                                          {33u, 80u},
                                          {16u, 33u},
                                          {70u, 31u},
                                          {64u, 16u},
                                          {7u, 47u}}) {
          const KvPlane plane{dtype, tokens, dim, v};
          const Bytes block = Encoded(plane, Wide(plane.elems(), tokens * 131 + dim));
          Bytes want(KvQuantBytes(quant, plane)), want_back(plane.bytes());
          ASSERT_TRUE(KvQuantizeRef(quant, plane, block.data(), want.data()));
          KvDequantizeRef(quant, plane, want.data(), want_back.data());
          const KvPlaneView view{static_cast<int>(dtype), static_cast<int>(tokens), static_cast<int>(dim), v};
          for (const KvCodecOps* ops : {&kKvCodecAvx2, &kKvCodecAvx512}) {
            if (ops == &kKvCodecAvx512 && !Cpu().avx512) continue;
            const auto* src = reinterpret_cast<const uint8_t*>(block.data());
            // One guard byte behind each output.
            Bytes got(want.size() + 1, std::byte{0xa5}), back(want_back.size() + 1, std::byte{0xa5});
            ASSERT_TRUE(
                ops->quantize(static_cast<int>(quant), view, src, reinterpret_cast<uint8_t*>(got.data())));
            ops->dequantize(static_cast<int>(quant), view, reinterpret_cast<const uint8_t*>(got.data()),
                            reinterpret_cast<uint8_t*>(back.data()));
            ASSERT_EQ(got.back(), std::byte{0xa5});
            ASSERT_EQ(back.back(), std::byte{0xa5});
            got.pop_back();
            back.pop_back();
            ASSERT_EQ(got, want) << "quant " << static_cast<int>(quant) << " dtype " << DTypeName(dtype)
                                 << " v " << v << " " << tokens << "x" << dim;
            ASSERT_EQ(back, want_back);
          }
        }
      }
    }
  }
}

TEST(KvCodec, ErrorsStayWithinTheStatedBounds) {
  for (const DType dtype : kDTypes) {
    // Half a unit in the last place of the type, relative.
    const float half_ulp = dtype == DType::kF32 ? 0x1p-24f : dtype == DType::kBF16 ? 0x1p-8f : 0x1p-11f;
    for (const bool v : {false, true}) {
      const KvPlane plane{dtype, 64, 96, v};
      const Bytes block = Encoded(plane, Wide(plane.elems(), 7));
      const std::vector<float> x = Decoded(plane, block);
      float amax = 0;
      for (const float e : x) amax = std::max(amax, std::abs(e));
      const std::vector<float> fp8 = Decoded(plane, RoundTrip(KvQuant::kFp8, plane, block));
      const std::vector<float> int8 = Decoded(plane, RoundTrip(KvQuant::kInt8, plane, block));
      const std::vector<float> int4 = Decoded(plane, RoundTrip(KvQuant::kInt4, plane, block));
      for (uint32_t t = 0; t < plane.tokens; ++t) {
        for (uint32_t c = 0; c < plane.dim; ++c) {
          const size_t i = size_t{t} * plane.dim + c;
          const float rounding = half_ulp * std::abs(x[i]) * 1.1f + 0x1p-24f * amax;
          EXPECT_LE(std::abs(fp8[i] - x[i]), std::max(std::abs(x[i]) / 16, amax / 256 / 1024) + rounding);
          EXPECT_LE(std::abs(int8[i] - x[i]),
                    amax / 254 * 1.0001f + half_ulp * (std::abs(x[i]) + amax / 254));
          float lo = x[i], hi = x[i];
          for (uint32_t k = 0; k < kKvGroup; ++k) {
            const float other = v ? x[size_t{t} * plane.dim + c / kKvGroup * kKvGroup + k]
                                  : x[size_t{t / kKvGroup * kKvGroup + k} * plane.dim + c];
            lo = std::min(lo, other);
            hi = std::max(hi, other);
          }
          EXPECT_LE(
              std::abs(int4[i] - x[i]),
              (hi - lo) / 30 * 1.0001f + half_ulp * (std::abs(x[i]) + (hi - lo) / 30) + 0x1p-22f * (hi - lo));
        }
      }
    }
  }
}

TEST(KvCodec, EncodingWhatWasDecodedChangesNothingMore) {
  for (const KvQuant quant : kQuants) {
    for (const bool v : {false, true}) {
      const KvPlane plane{DType::kBF16, 32, 64, v};
      const Bytes once = RoundTrip(quant, plane, Encoded(plane, RandomFloats(32 * 64, 11, 3.0f)));
      Bytes again = once;
      for (int i = 0; i < 5; ++i) again = RoundTrip(quant, plane, again);
      if (quant != KvQuant::kInt4) {
        EXPECT_EQ(again, once);
        continue;
      }
      const std::vector<float> a = Decoded(plane, once), b = Decoded(plane, again);
      for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 0x1p-7 * std::abs(a[i]) + 1e-6);
    }
  }
}

TEST(KvCodec, ExtremesOfARangeComeBackExactly) {
  const KvPlane plane{DType::kBF16, 32, 32, false};
  std::vector<float> x = RandomFloats(32 * 32, 5);
  x[100] = -7.5f;
  const Bytes block = Encoded(plane, x);
  EXPECT_EQ(Decoded(plane, RoundTrip(KvQuant::kInt8, plane, block))[100], -7.5f);
  EXPECT_EQ(Decoded(plane, RoundTrip(KvQuant::kInt4, plane, block))[100], -7.5f);
  EXPECT_EQ(Decoded(plane, RoundTrip(KvQuant::kFp8, plane, block))[100], -7.5f);
}

TEST(KvCodec, ConstantZeroAndTinyPlanesSurvive) {
  for (const KvQuant quant : kQuants) {
    for (const bool v : {false, true}) {
      const KvPlane plane{DType::kF32, 32, 64, v};
      for (const float value : {0.0f, 1.25f, -3.0f, 0x1p-110f, 0x1p-149f, 0x1p119f}) {
        const std::vector<float> x(plane.elems(), value);
        for (const float y : Decoded(plane, RoundTrip(quant, plane, Encoded(plane, x)))) {
          ASSERT_TRUE(std::isfinite(y));
          if (std::abs(value) > 1e-20f) {
            ASSERT_NEAR(y, value, std::abs(value) * 1e-6);
          } else {
            ASSERT_LE(std::abs(y), 0x1p-99f);
          }
        }
      }
    }
  }
}

TEST(KvCodec, NumbersThatAreNotFiniteAreRefusedAndDecodeToZeros) {
  for (const KvQuant quant : kQuants) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(), -0x1p121f}) {
      for (const size_t where : {size_t{0}, size_t{17}, size_t{33 * 20 - 1}}) {
        const KvPlane plane{DType::kBF16, 33, 20, false};
        std::vector<float> x = RandomFloats(33 * 20, 2);
        x[where] = bad;
        Bytes coded(KvQuantBytes(quant, plane), std::byte{1}), out(plane.bytes(), std::byte{1});
        const Bytes block = Encoded(plane, x);
        EXPECT_FALSE(KvQuantize(quant, plane, block.data(), coded.data()));
        KvDequantize(quant, plane, coded.data(), out.data());
        for (const float y : Decoded(plane, out)) ASSERT_EQ(y, 0.0f);
      }
    }
  }
}

TEST(KvCodec, DecodingArbitraryBytesStaysInside) {
  Rng rng(3);
  for (const KvQuant quant : kQuants) {
    for (const DType dtype : kDTypes) {
      for (const bool v : {false, true}) {
        const KvPlane plane{dtype, 37, 45, v};
        Bytes coded(KvQuantBytes(quant, plane)), out(plane.bytes());
        for (std::byte& b : coded) b = static_cast<std::byte>(rng.Next());
        KvDequantize(quant, plane, coded.data(), out.data());  // the sanitizer judges
      }
    }
  }
}

TEST(KvCodec, OfEveryCodeOfE4m3TheValueComesBack) {
  const KvPlane plane{DType::kF32, 1, 254, false};
  Bytes coded(KvQuantBytes(KvQuant::kFp8, plane));
  const float one = 1.0f;
  std::memcpy(coded.data(), &one, sizeof one);
  for (int i = 0; i < 254; ++i)
    coded[4 + static_cast<size_t>(i)] = static_cast<std::byte>(i < 127 ? i : i + 1);
  Bytes values(plane.bytes()), again(coded.size());
  KvDequantize(KvQuant::kFp8, plane, coded.data(), values.data());
  const std::vector<float> x = Decoded(plane, values);
  EXPECT_EQ(x[1], 0x1p-9f);  // the smallest
  EXPECT_EQ(x[8], 0x1p-6f);  // the smallest normal one
  EXPECT_EQ(x[0x38], 1.0f);
  EXPECT_EQ(x[126], 448.0f);  // the largest
  EXPECT_EQ(x[253], -448.0f);
  ASSERT_TRUE(KvQuantize(KvQuant::kFp8, plane, values.data(), again.data()));
  EXPECT_EQ(again, coded);
}

// What KIVI is about: with outliers in channels of K, groups along the tokens of a channel lose far less than
// groups along the channels of a token.
TEST(KvCodec, ForKWithOutlierChannelsPerChannelBeatsPerToken) {
  const std::vector<float> x = WithOutlierChannels(32, 128, 9);
  double error[2] = {};
  for (const bool v : {false, true}) {
    const KvPlane plane{DType::kBF16, 32, 128, v};
    const std::vector<float> y = Decoded(plane, RoundTrip(KvQuant::kInt4, plane, Encoded(plane, x)));
    for (size_t i = 0; i < x.size(); ++i) error[v] += (x[i] - y[i]) * (x[i] - y[i]);
  }
  EXPECT_LT(error[0] * 20, error[1]) << "per channel " << error[0] << ", per token " << error[1];
}

// Planted keys: each query is one key without its outlier channels, so that the ordinary ones decide. Which
// token it attends to most must not depend on the codec, nor by much what it gets there.
TEST(KvCodec, AttentionFindsTheSameTokenThroughEveryCodec) {
  constexpr uint32_t kDim = 64, kTokens = 32, kBlocks = 16, kAll = kTokens * kBlocks;
  const BlockLayout layout{1, 1, kDim, kTokens, DType::kBF16};
  const std::vector<float> keys = WithOutlierChannels(kAll, kDim, 21);
  // Each token's V names it: 9 bits of its number as signs, over and over.
  std::vector<float> values(size_t{kAll} * kDim);
  for (uint32_t t = 0; t < kAll; ++t) {
    for (uint32_t c = 0; c < kDim; ++c)
      values[size_t{t} * kDim + c] = ((t >> (c % 9)) & 1) != 0 ? 1.0f : -1.0f;
  }
  const KvPlane k{DType::kBF16, kTokens, kDim, false}, v{DType::kBF16, kTokens, kDim, true};
  std::vector<Bytes> exact;
  for (uint32_t b = 0; b < kBlocks; ++b) {
    const auto part = [&](const std::vector<float>& all) {
      return std::vector<float>(all.begin() + b * static_cast<ptrdiff_t>(k.elems()),
                                all.begin() + (b + 1) * static_cast<ptrdiff_t>(k.elems()));
    };
    exact.push_back(Encoded(k, part(keys)));
    const Bytes second = Encoded(v, part(values));
    exact.back().insert(exact.back().end(), second.begin(), second.end());
  }
  const auto attended = [&](const std::vector<Bytes>& blocks, const std::vector<float>& q) {
    std::vector<const std::byte*> bases;
    for (const Bytes& b : blocks) bases.push_back(b.data());
    const AttentionSeq seq{bases.data(), kAll, 0, 1};
    std::vector<float> out(kDim);
    ThreadPool pool(1);
    EXPECT_TRUE(PagedAttention(layout, 0, std::span(&seq, 1), q.data(), kDim, 1, {.scale = 4.0f}, out.data(),
                               nullptr, NumericMode::kBatchInvariant, pool)
                    .ok());
    uint32_t token = 0;
    for (uint32_t bit = 0; bit < 9; ++bit) token |= (out[bit] > 0 ? 1u : 0u) << bit;
    return token;
  };
  for (const KvQuant quant : kQuants) {
    std::vector<Bytes> coded = exact;
    for (Bytes& block : coded) {
      const auto middle = block.begin() + static_cast<ptrdiff_t>(k.bytes());
      const Bytes k_back = RoundTrip(quant, k, Bytes(block.begin(), middle));
      const Bytes v_back = RoundTrip(quant, v, Bytes(middle, block.end()));
      std::copy(v_back.begin(), v_back.end(), std::copy(k_back.begin(), k_back.end(), block.begin()));
    }
    Rng rng(5);
    int agree = 0, right = 0;
    for (int i = 0; i < 200; ++i) {
      const auto target = static_cast<uint32_t>(rng.Below(kAll));
      std::vector<float> q(kDim);
      for (uint32_t c = 0; c < kDim; ++c) q[c] = c % 16 == 5 ? 0.0f : keys[size_t{target} * kDim + c];
      const uint32_t want = attended(exact, q);
      right += want == target;
      agree += attended(coded, q) == want;
    }
    EXPECT_GE(right, 195);
    EXPECT_GE(agree, quant == KvQuant::kInt8 ? 198 : 190) << "quant " << static_cast<int>(quant);
  }
}

TEST(KvCodec, WidenAndNarrowAreTheElementwiseConversions) {
  for (const DType dtype : kDTypes) {
    for (const size_t n : {0, 1, 15, 16, 17, 100}) {
      const KvPlane plane{dtype, 1, static_cast<uint32_t>(n), false};
      const std::vector<float> x = Wide(n, n + 1);
      const Bytes want = Encoded(plane, x);
      Bytes got(plane.bytes() + 1, std::byte{7});
      KvNarrow(dtype, x.data(), n, got.data());
      EXPECT_EQ(got.back(), std::byte{7});
      got.pop_back();
      EXPECT_EQ(got, want);
      std::vector<float> wide(n + 1, 9.0f);
      KvWiden(dtype, want.data(), n, wide.data());
      EXPECT_EQ(wide.back(), 9.0f);
      wide.pop_back();
      EXPECT_EQ(wide, Decoded(plane, want));
    }
  }
}

}  // namespace
}  // namespace tidepool
