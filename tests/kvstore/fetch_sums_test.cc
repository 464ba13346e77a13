#include "kvstore/fetch_sums.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

TEST(KeptSumsTest, AChecksumIsFoundByItsOwnSlotGenerationAndLayersOnly) {
  KeptSums sums(8);
  EXPECT_FALSE(sums.Find({3, 1}, 0, 4).has_value());
  sums.Keep({3, 1}, {0, 4, 77});
  sums.Keep({3, 1}, {0, 2, 78});
  EXPECT_EQ(sums.Find({3, 1}, 0, 4), 77u);
  EXPECT_EQ(sums.Find({3, 1}, 0, 2), 78u);
  EXPECT_FALSE(sums.Find({3, 1}, 2, 4).has_value());
  EXPECT_FALSE(sums.Find({3, 2}, 0, 4).has_value());
  EXPECT_FALSE(sums.Find({4, 1}, 0, 4).has_value());
}

TEST(KeptSumsTest, AnotherGenerationForgetsAllOfTheSlot) {
  KeptSums sums(8);
  sums.Keep({3, 1}, {0, 2, 1});
  sums.Keep({3, 1}, {2, 4, 2});
  sums.Keep({3, 2}, {0, 2, 3});
  EXPECT_EQ(sums.Find({3, 2}, 0, 2), 3u);
  EXPECT_FALSE(sums.Find({3, 2}, 2, 4).has_value());
  EXPECT_FALSE(sums.Find({3, 1}, 2, 4).has_value());
}

TEST(KeptSumsTest, SlotsThatShareAPlaceAreNotTakenForEachOther) {
  KeptSums sums(1 << 20);
  const uint32_t other = 5 + KeptSums::kMaxPlaces;
  sums.Keep({5, 1}, {0, 4, 1});
  EXPECT_FALSE(sums.Find({other, 1}, 0, 4).has_value());
  sums.Keep({other, 1}, {0, 4, 2});
  EXPECT_EQ(sums.Find({other, 1}, 0, 4), 2u);
  EXPECT_FALSE(sums.Find({5, 1}, 0, 4).has_value());
}

TEST(KeptSumsTest, OfOneBlockOnlySoManyRangesAreKept) {
  KeptSums sums(1);
  for (uint32_t n = 0; n <= KeptSums::kMaxRanges; ++n) sums.Keep({0, 1}, {n, n + 1, n});
  EXPECT_FALSE(sums.Find({0, 1}, 0, 1).has_value());
  EXPECT_EQ(sums.Find({0, 1}, KeptSums::kMaxRanges, KeptSums::kMaxRanges + 1), KeptSums::kMaxRanges);
}

}  // namespace
}  // namespace tidepool
