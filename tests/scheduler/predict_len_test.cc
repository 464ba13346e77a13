#include "scheduler/predict_len.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/rng.h"

namespace tidepool {
namespace {

PlaceRequest Asking(std::string tenant, std::string route) {
  PlaceRequest r;
  r.tenant = std::move(tenant);
  r.route = std::move(route);
  return r;
}

TEST(LengthQuantiles, GuessesThePriorUntilEnoughAnswersEnded) {
  LengthQuantiles lengths(256);
  EXPECT_EQ(lengths.Predict(Asking("a", "chat")).mean, 256u);
  EXPECT_EQ(lengths.Predict(Asking("a", "chat")).high, 256u);
  EXPECT_FALSE(lengths.Predict(Asking("a", "chat")).learnt);
  for (uint32_t i = 0; i < LengthQuantiles::kEnough; ++i) lengths.Observe("a", "chat", 10);
  EXPECT_TRUE(lengths.Predict(Asking("a", "chat")).learnt);
  EXPECT_EQ(lengths.Predict(Asking("a", "chat")).mean, 10u);
}

TEST(LengthQuantiles, RoutesAndTenantsAreLearntApartAndOthersTakeTheMeanOfAll) {
  LengthQuantiles lengths(256);
  for (int i = 0; i < 100; ++i) {
    lengths.Observe("a", "classify", 2);
    lengths.Observe("a", "essay", 1000);
    lengths.Observe("b", "classify", 60);
  }
  EXPECT_EQ(lengths.Predict(Asking("a", "classify")).mean, 2u);
  EXPECT_EQ(lengths.Predict(Asking("a", "essay")).mean, 1000u);
  EXPECT_EQ(lengths.Predict(Asking("b", "classify")).mean, 60u);
  EXPECT_EQ(lengths.Predict(Asking("new", "classify")).mean, 354u);
}

TEST(LengthQuantiles, QuantilesAreAFifthOffAtMost) {
  Rng rng(3);
  LengthQuantiles lengths(256);
  std::vector<uint32_t> seen;
  for (int i = 0; i < 900; ++i) {
    seen.push_back(static_cast<uint32_t>(1 + std::exp(3 + 3 * rng.Uniform())));
    lengths.Observe("a", "chat", seen.back());
  }
  std::sort(seen.begin(), seen.end());
  const LengthPrediction p = lengths.Predict(Asking("a", "chat"));
  EXPECT_NEAR(p.median, seen[450], 0.25 * seen[450]);
  EXPECT_NEAR(p.high, seen[810], 0.25 * seen[810]);
  EXPECT_LE(p.median, p.mean) << "answers have a long tail";
}

TEST(LengthQuantiles, WhatAnswersAreNowCountsMoreThanWhatTheyWere) {
  LengthQuantiles lengths(256);
  for (int i = 0; i < 5000; ++i) lengths.Observe("a", "chat", 100);
  for (int i = 0; i < 5000; ++i) lengths.Observe("a", "chat", 1000);
  EXPECT_NEAR(lengths.Predict(Asking("a", "chat")).mean, 1000, 60);
}

TEST(LengthQuantiles, TableIsBoundedAndTheLongestUnusedRouteGivesWay) {
  LengthQuantiles lengths(256, 3);
  for (int i = 0; i < 30; ++i) lengths.Observe("a", "kept", 7);
  for (int i = 0; i < 30; ++i) lengths.Observe("a", "old", 7);
  lengths.Observe("a", "kept", 7);
  for (int i = 0; i < 20; ++i) lengths.Observe("b", "x", 500);
  for (int i = 0; i < 20; ++i) lengths.Observe("c", "y", 500);
  EXPECT_EQ(lengths.routes(), 3u);
  EXPECT_EQ(lengths.Predict(Asking("a", "kept")).mean, 7u);
  EXPECT_NE(lengths.Predict(Asking("a", "old")).mean, 7u);
}

TEST(LengthQuantiles, ExtremesAreKept) {
  LengthQuantiles lengths(256);
  for (int i = 0; i < 50; ++i) lengths.Observe("a", "one", 1);
  for (int i = 0; i < 50; ++i) lengths.Observe("a", "huge", 4'000'000'000u);
  EXPECT_EQ(lengths.Predict(Asking("a", "one")).high, 1u);
  EXPECT_GE(lengths.Predict(Asking("a", "huge")).high, 1u << 20);
}

}  // namespace
}  // namespace tidepool
