#include "kernels/rms_norm.h"

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

TEST(RmsNorm, MatchesReferenceAtOddSizes) {
  ThreadPool pool(2);
  for (const int64_t rows : {0, 1, 3, 50}) {
    for (const int64_t hidden : {1, 8, 15, 16, 17, 64, 4096}) {
      const std::vector<float> x = RandomFloats(rows * hidden, 1, 3.0f), w = RandomFloats(hidden, 2);
      std::vector<float> y(x.size());
      std::vector<double> want(x.size());
      RmsNorm(x.data(), w.data(), rows, hidden, 1e-5f, y.data(), pool);
      RmsNormRef(x.data(), w.data(), rows, hidden, 1e-5f, want.data());
      ExpectNear(y, want, 1e-7, 1e-5);
    }
  }
}

TEST(RmsNorm, WorksInPlaceAndRowsDoNotDependOnTheBatch) {
  ThreadPool one(1), three(3);
  const int64_t rows = 37, hidden = 1003;
  const std::vector<float> x = RandomFloats(rows * hidden, 1), w = RandomFloats(hidden, 2);
  std::vector<float> all = x;
  RmsNorm(all.data(), w.data(), rows, hidden, 1e-6f, all.data(), three);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> y(static_cast<size_t>(hidden));
    RmsNorm(x.data() + r * hidden, w.data(), 1, hidden, 1e-6f, y.data(), one);
    ASSERT_TRUE(SameBits(y.data(), all.data() + r * hidden, hidden)) << "row " << r;
  }
}

TEST(RmsNormHeads, NormsEachHeadOfAFusedRowAndLeavesTheRest) {
  ThreadPool pool(2);
  for (const int64_t dim : {2, 8, 20, 128}) {
    const int64_t rows = 40, heads = 3, stride = heads * dim + 7;
    const std::vector<float> w = RandomFloats(dim, 2);
    std::vector<float> x = RandomFloats(rows * stride, 1, 3.0f), before = x;
    RmsNormHeads(x.data(), stride, rows, heads, w.data(), dim, 1e-6f, pool);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = r * stride + h * dim;
        std::vector<double> want(static_cast<size_t>(dim));
        RmsNormRef(&before[at], w.data(), 1, dim, 1e-6f, want.data());
        ExpectNear({x.begin() + at, x.begin() + at + dim}, want, 1e-7, 1e-5);
      }
      ASSERT_TRUE(SameBits(&x[r * stride + heads * dim], &before[r * stride + heads * dim], 7));
    }
  }
}

TEST(RmsNorm, ZeroRowStaysFinite) {
  ThreadPool pool(1);
  std::vector<float> x(32, 0.0f), w(32, 1.0f);
  RmsNorm(x.data(), w.data(), 1, 32, 1e-5f, x.data(), pool);
  EXPECT_EQ(x, std::vector<float>(32, 0.0f));
}

}  // namespace
}  // namespace tidepool
