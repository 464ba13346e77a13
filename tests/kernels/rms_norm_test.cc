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

TEST(RmsNorm, ZeroRowStaysFinite) {
  ThreadPool pool(1);
  std::vector<float> x(32, 0.0f), w(32, 1.0f);
  RmsNorm(x.data(), w.data(), 1, 32, 1e-5f, x.data(), pool);
  EXPECT_EQ(x, std::vector<float>(32, 0.0f));
}

}  // namespace
}  // namespace tidepool
