#include "base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace tidepool {
namespace {

TEST(DType, BF16RoundsToNearestEven) {
  EXPECT_EQ(ToBF16(1.0f).bits, 0x3f80);
  EXPECT_EQ(ToBF16(std::bit_cast<float>(0x3f808000u)).bits, 0x3f80) << "a tie goes to even";
  EXPECT_EQ(ToBF16(std::bit_cast<float>(0x3f818000u)).bits, 0x3f82) << "a tie goes to even";
  EXPECT_EQ(ToBF16(std::bit_cast<float>(0x3f808001u)).bits, 0x3f81);
  EXPECT_EQ(ToFloat(ToBF16(std::numeric_limits<float>::infinity())), std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(ToFloat(ToBF16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(DType, EveryBF16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const BF16 v{static_cast<uint16_t>(bits)};
    if (std::isnan(ToFloat(v))) continue;
    ASSERT_EQ(ToBF16(ToFloat(v)).bits, v.bits);
  }
}

TEST(DType, HalfWidensExactly) {
  EXPECT_EQ(HalfToFloat(0x3c00), 1.0f);
  EXPECT_EQ(HalfToFloat(0xc000), -2.0f);
  EXPECT_EQ(HalfToFloat(0x7bff), 65504.0f);
  EXPECT_EQ(HalfToFloat(0x0001), 0x1.0p-24f) << "the smallest subnormal";
  EXPECT_EQ(HalfToFloat(0x03ff), 1023 * 0x1.0p-24f) << "the largest subnormal";
  EXPECT_EQ(HalfToFloat(0x7c00), std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(HalfToFloat(0x7e00)));
  EXPECT_TRUE(std::signbit(HalfToFloat(0x8000)));
}

}  // namespace
}  // namespace tidepool
