#include "kernels/logit_blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/rng.h"

namespace tidepool {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> Row(int64_t n) {
  Rng rng(static_cast<uint64_t>(n) + 1);
  std::vector<float> row(static_cast<size_t>(n));
  for (float& x : row) x = static_cast<float>(rng.Uniform() * 200 - 100);
  for (size_t i = 0; i < row.size(); i += 7) row[i] = -kInf;
  return row;
}

TEST(LogitBlocks, MaximaAndWeightsAreThoseOfPlainLoops) {
  for (const int64_t n : {0, 1, 3, 15, 16, 17, 255, 256, 257, 511, 1000, 5000}) {
    std::vector<float> row = Row(n);
    if (n > 0) row[static_cast<size_t>(n - 1)] = 3;
    std::vector<float> maxima(static_cast<size_t>(LogitBlocks(n))), sums(maxima.size()), weights(row.size());
    ASSERT_TRUE(BlockMaxima(row.data(), n, maxima.data()));
    const float max = n > 0 ? *std::max_element(row.begin(), row.end()) : 0;
    const double total = ExpBlocks(row.data(), n, max, 0.1f, weights.data(), sums.data());
    double want_total = 0;
    for (size_t b = 0; b < maxima.size(); ++b) {
      const auto begin = row.begin() + static_cast<std::ptrdiff_t>(b * kLogitBlock);
      const auto end =
          row.begin() + std::min<std::ptrdiff_t>(n, static_cast<std::ptrdiff_t>((b + 1) * kLogitBlock));
      EXPECT_EQ(maxima[b], *std::max_element(begin, end));
      double want = 0;
      for (auto it = begin; it != end; ++it) {
        const double w = std::exp((double{*it} - max) * 0.1f);
        EXPECT_NEAR(weights[static_cast<size_t>(it - row.begin())], w, 1e-5 * w);
        want += w;
      }
      EXPECT_NEAR(sums[b], want, 1e-5 * want);
      want_total += want;
    }
    EXPECT_NEAR(total, want_total, 1e-5 * want_total) << n;
  }
}

TEST(LogitBlocks, WhatIsNoDistributionIsFoundWhereverItStands) {
  for (const int64_t n : {1, 17, 300}) {
    for (const float bad : {std::nanf(""), -std::nanf(""), kInf}) {
      for (int64_t at = 0; at < n; ++at) {
        std::vector<float> row(static_cast<size_t>(n), 1.0f), maxima(static_cast<size_t>(LogitBlocks(n)));
        row[static_cast<size_t>(at)] = bad;
        EXPECT_FALSE(BlockMaxima(row.data(), n, maxima.data())) << bad << " at " << at << " of " << n;
      }
    }
  }
  std::vector<float> nothing(20, -kInf), maxima(1);
  EXPECT_TRUE(BlockMaxima(nothing.data(), 20, maxima.data()));
  EXPECT_EQ(maxima[0], -kInf);
}

}  // namespace
}  // namespace tidepool
