#include "kernels/soft_cap.h"

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

TEST(SoftCap, MatchesReferenceAtOddSizesAndScales) {
  ThreadPool pool(2);
  for (const int64_t n : {0, 1, 15, 16, 17, 100003}) {
    for (const float cap : {0.5f, 30.0f, 50.0f}) {
      for (const float scale : {1e-3f, 1.0f, 100.0f}) {
        std::vector<float> x = RandomFloats(n, 1, scale);
        std::vector<double> want(x.size());
        SoftCapRef(x.data(), n, cap, want.data());
        SoftCap(x.data(), n, cap, pool);
        ExpectNear(x, want, 0, 1e-6);
      }
    }
  }
}

TEST(SoftCap, ExtremesStayInsideAndNanStaysNan) {
  ThreadPool pool(1);
  std::vector<float> x = {1e30f, -1e30f, INFINITY, -INFINITY, 0.0f, std::nanf("")};
  SoftCap(x.data(), 6, 30.0f, pool);
  EXPECT_EQ(x[0], 30.0f);
  EXPECT_EQ(x[1], -30.0f);
  EXPECT_EQ(x[2], 30.0f);
  EXPECT_EQ(x[3], -30.0f);
  EXPECT_EQ(x[4], 0.0f);
  EXPECT_TRUE(std::isnan(x[5]));
}

TEST(SoftCap, AnElementsBitsDoNotDependOnItsPlace) {
  ThreadPool pool(1);
  std::vector<float> x = RandomFloats(37, 3, 90.0f), all = x;
  SoftCap(all.data(), 37, 50.0f, pool);
  for (size_t i = 0; i < 37; ++i) {
    SoftCap(&x[i], 1, 50.0f, pool);
    EXPECT_TRUE(SameBits(&x[i], &all[i], 1)) << "element " << i;
  }
}

}  // namespace
}  // namespace tidepool
