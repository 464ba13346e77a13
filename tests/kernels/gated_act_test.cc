#include "kernels/gated_act.h"

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

constexpr GateFunction kFunctions[] = {GateFunction::kSilu, GateFunction::kGeluTanh};

TEST(GatedAct, MatchesReferenceAtOddSizes) {
  ThreadPool pool(2);
  for (const GateFunction f : kFunctions) {
    for (const int64_t rows : {0, 1, 3, 200}) {
      for (const int64_t inter : {1, 15, 16, 17, 172, 1000}) {
        const std::vector<float> x = RandomFloats(rows * 2 * inter, 1, 12.0f);
        std::vector<float> y(static_cast<size_t>(rows * inter));
        std::vector<double> want(y.size());
        GatedAct(f, x.data(), rows, inter, y.data(), pool);
        GatedActRef(f, x.data(), rows, inter, want.data());
        // Gelu: 1e-7 * |gate * up|, both below 12.
        ExpectNear(y, want, f == GateFunction::kSilu ? 1e-12 : 1.5e-5, 1e-6);
      }
    }
  }
}

TEST(GatedAct, SmallGatesKeepTheirRelativeAccuracy) {
  ThreadPool pool(1);
  std::vector<float> x = RandomFloats(64, 2, 1e-4f);
  x.insert(x.end(), 64, 1.0f);
  for (const GateFunction f : kFunctions) {
    std::vector<float> y(64);
    std::vector<double> want(64);
    GatedAct(f, x.data(), 1, 64, y.data(), pool);
    GatedActRef(f, x.data(), 1, 64, want.data());
    ExpectNear(y, want, 0, 1e-6);
  }
}

TEST(GatedAct, ExtremeGatesSaturate) {
  ThreadPool pool(1);
  const std::vector<float> x = {-1000.0f, -90.0f, 0.0f, 90.0f, 1000.0f, 1, 1, 1, 1, 1};
  for (const GateFunction f : kFunctions) {
    std::vector<float> y(5);
    GatedAct(f, x.data(), 1, 5, y.data(), pool);
    EXPECT_NEAR(y[0], 0.0, 1e-30);
    EXPECT_NEAR(y[1], 0.0, 1e-30);
    EXPECT_EQ(y[2], 0.0f);
    EXPECT_EQ(y[3], 90.0f);
    EXPECT_EQ(y[4], 1000.0f);
  }
}

TEST(GatedAct, AnElementsBitsDoNotDependOnItsPlace) {
  ThreadPool pool(1);
  const std::vector<float> gate = RandomFloats(40, 3, 8.0f), up = RandomFloats(40, 4);
  std::vector<float> packed = gate, all(40);
  packed.insert(packed.end(), up.begin(), up.end());
  for (const GateFunction f : kFunctions) {
    GatedAct(f, packed.data(), 1, 40, all.data(), pool);
    for (size_t i = 0; i < 40; ++i) {
      const float pair[2] = {gate[i], up[i]};
      float y;
      GatedAct(f, pair, 1, 1, &y, pool);
      EXPECT_TRUE(SameBits(&y, &all[i], 1)) << "element " << i;
    }
  }
}

}  // namespace
}  // namespace tidepool
