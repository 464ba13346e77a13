#include "kvstore/disk/plane_codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/rng.h"

namespace tidepool {
namespace {

// Numbers as KV has them: of normal size, each channel with a scale of its own.
std::vector<std::byte> Numbers(size_t count, size_t width, uint64_t seed = 1) {
  Rng rng(seed);
  std::vector<std::byte> out(count * width);
  for (size_t i = 0; i < count; ++i) {
    const double scale = std::exp2(static_cast<double>(i % 64) / 16 - 2);
    double sum = 0;
    for (int k = 0; k < 6; ++k) sum += static_cast<double>(rng.Below(1 << 20)) / (1 << 19) - 1;
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(sum * scale));
    const uint32_t value = width == 4 ? bits : bits >> 16;
    std::memcpy(out.data() + i * width, &value, width);
  }
  return out;
}

std::vector<std::byte> Noise(size_t bytes) {
  Rng rng(9);
  std::vector<std::byte> out(bytes);
  for (std::byte& b : out) b = static_cast<std::byte>(rng.Below(256));
  return out;
}

// The encoding with as much room as `room`; empty where it does not fit.
std::vector<std::byte> Encode(PlaneCodec& codec, std::span<const std::byte> in, size_t room) {
  std::vector<std::byte> out(room);
  const auto bytes = codec.Encode(in, out);
  out.resize(bytes.value_or(0));
  return out;
}

TEST(PlaneCodec, EveryWidthAndLengthComesBackToTheBit) {
  for (const size_t width : {1, 2, 4}) {
    PlaneCodec codec(width);
    for (const size_t bytes : {0, 1, 2, 3, 5, 64, 4097, 65536, 200003}) {
      for (const bool noise : {false, true}) {
        const auto in = noise ? Noise(bytes) : Numbers(bytes / 4 + 1, 4);
        const auto exact = std::span(in).first(bytes);
        const auto coded = Encode(codec, exact, bytes + 64);
        ASSERT_FALSE(coded.empty()) << width << " " << bytes;
        std::vector<std::byte> out(bytes, std::byte{0xaa});
        ASSERT_TRUE(codec.Decode(coded, out).ok()) << width << " " << bytes;
        EXPECT_TRUE(std::equal(out.begin(), out.end(), exact.begin())) << width << " " << bytes;
      }
    }
  }
}

TEST(PlaneCodec, ExponentsShrinkAndMantissasDoNot) {
  PlaneCodec bf16(2), fp32(4);
  const auto two = Numbers(1 << 17, 2), four = Numbers(1 << 17, 4);
  const double ratio2 =
      static_cast<double>(Encode(bf16, two, two.size()).size()) / static_cast<double>(two.size());
  const double ratio4 =
      static_cast<double>(Encode(fp32, four, four.size()).size()) / static_cast<double>(four.size());
  EXPECT_LT(ratio2, 0.75);
  EXPECT_GT(ratio2, 0.55);
  EXPECT_LT(ratio4, 0.9);
  EXPECT_GT(ratio4, 0.75);
  // bf16 numbers kept as fp32: half of the bytes are zeros.
  std::vector<std::byte> wide(2 * two.size());
  for (size_t i = 0; i < two.size() / 2; ++i) std::memcpy(wide.data() + 4 * i + 2, two.data() + 2 * i, 2);
  EXPECT_LT(static_cast<double>(Encode(fp32, wide, wide.size()).size()),
            0.4 * static_cast<double>(wide.size()));
}

TEST(PlaneCodec, WhatDoesNotFitIsNotEncoded) {
  PlaneCodec codec(2);
  const auto noise = Noise(100000);
  EXPECT_TRUE(Encode(codec, noise, 90000).empty());
  const auto in = Numbers(50000, 2);
  const auto whole = Encode(codec, in, in.size());
  for (const size_t room : {size_t{0}, size_t{3}, size_t{12}, whole.size() - 1})
    EXPECT_TRUE(Encode(codec, in, room).empty()) << room;
  EXPECT_EQ(Encode(codec, in, whole.size()), whole);
}

TEST(PlaneCodec, DamageIsAnErrorOrOtherBytesButNeverOutOfBounds) {
  PlaneCodec codec(2);
  const auto in = Numbers(3000, 2);
  const auto coded = Encode(codec, in, in.size());
  std::vector<std::byte> out(in.size());
  for (size_t n = 0; n < coded.size(); n += 7) {
    const std::vector<std::byte> cut(coded.begin(), coded.begin() + static_cast<std::ptrdiff_t>(n));
    EXPECT_EQ(codec.Decode(cut, out).code(), absl::StatusCode::kDataLoss) << n;
  }
  for (size_t i = 0; i < coded.size(); ++i) {
    auto flipped = coded;
    flipped[i] ^= std::byte{0x81};
    (void)codec.Decode(flipped, out);
  }
  std::vector<std::byte> longer(in.size() + 2), shorter(in.size() - 2);
  EXPECT_FALSE(codec.Decode(coded, longer).ok());
  EXPECT_FALSE(codec.Decode(coded, shorter).ok());
  PlaneCodec other(4);
  EXPECT_FALSE(other.Decode(coded, out).ok());
  ASSERT_TRUE(codec.Decode(coded, out).ok());  // damage leaves nothing behind
  EXPECT_EQ(out, in);
}

}  // namespace
}  // namespace tidepool
