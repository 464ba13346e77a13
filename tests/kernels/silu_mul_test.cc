#include "kernels/silu_mul.h"

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

TEST(SiluMul, MatchesReferenceAtOddSizes) {
  ThreadPool pool(2);
  for (const int64_t rows : {0, 1, 3, 200}) {
    for (const int64_t inter : {1, 15, 16, 17, 172, 1000}) {
      const std::vector<float> x = RandomFloats(rows * 2 * inter, 1, 12.0f);
      std::vector<float> y(static_cast<size_t>(rows * inter));
      std::vector<double> want(y.size());
      SiluMul(x.data(), rows, inter, y.data(), pool);
      SiluMulRef(x.data(), rows, inter, want.data());
      ExpectNear(y, want, 1e-12, 1e-6);
    }
  }
}

TEST(SiluMul, ExtremeGatesSaturate) {
  ThreadPool pool(1);
  const std::vector<float> x = {-1000.0f, -90.0f, 0.0f, 90.0f, 1000.0f, 1, 1, 1, 1, 1};
  std::vector<float> y(5);
  SiluMul(x.data(), 1, 5, y.data(), pool);
  EXPECT_NEAR(y[0], 0.0, 1e-30);
  EXPECT_NEAR(y[1], 0.0, 1e-30);
  EXPECT_EQ(y[2], 0.0f);
  EXPECT_EQ(y[3], 90.0f);
  EXPECT_EQ(y[4], 1000.0f);
}

TEST(SiluMul, AnElementsBitsDoNotDependOnItsPlace) {
  ThreadPool pool(1);
  const std::vector<float> gate = RandomFloats(40, 3, 8.0f), up = RandomFloats(40, 4);
  std::vector<float> packed = gate, all(40);
  packed.insert(packed.end(), up.begin(), up.end());
  SiluMul(packed.data(), 1, 40, all.data(), pool);
  for (size_t i = 0; i < 40; ++i) {
    const float pair[2] = {gate[i], up[i]};
    float y;
    SiluMul(pair, 1, 1, &y, pool);
    EXPECT_TRUE(SameBits(&y, &all[i], 1)) << "element " << i;
  }
}

}  // namespace
}  // namespace tidepool
