#include "kernels/rope.h"

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

std::vector<float> Frequencies(int rotary_dim, double theta = 10000.0) {
  std::vector<float> out;
  for (int i = 0; i < rotary_dim; i += 2)
    out.push_back(static_cast<float>(std::pow(theta, -double(i) / rotary_dim)));
  return out;
}

TEST(Rope, MatchesReferenceAtOddShapes) {
  ThreadPool pool(2);
  for (const int dim : {2, 6, 8, 64, 128}) {
    for (const int rotary : {2, dim / 4 * 2, dim}) {
      if (rotary == 0) continue;
      for (const double factor : {1.0, 1.19}) {
        const std::vector<float> inv_freq = Frequencies(rotary);
        const auto table = RopeTable::Create(inv_freq, dim, 8192, factor);
        ASSERT_TRUE(table.ok());
        EXPECT_EQ(table->rotary_dim(), rotary);
        for (const int heads : {1, 3}) {
          for (const int64_t extra : {0, 5}) {
            const std::vector<int32_t> positions = {0, 1, 17, 8191, 5, 5};
            const int64_t stride = heads * dim + extra;
            std::vector<float> x = RandomFloats(stride * 6, 3), want = x;
            ASSERT_TRUE(table->Apply(x.data(), stride, heads, positions, pool).ok());
            RopeRef(want.data(), stride, heads, dim, inv_freq, factor, positions);
            for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], want[i], 5e-7) << "element " << i;
          }
        }
      }
    }
  }
}

TEST(Rope, PositionZeroIsTheIdentity) {
  ThreadPool pool(1);
  const auto table = RopeTable::Create(Frequencies(8), 8, 4);
  std::vector<float> x = RandomFloats(16, 1), before = x;
  const std::vector<int32_t> positions = {0};
  ASSERT_TRUE(table->Apply(x.data(), 16, 2, positions, pool).ok());
  EXPECT_EQ(x, before);
}

TEST(Rope, ElementsBeyondTheRotatedPartStay) {
  ThreadPool pool(1);
  const auto table = RopeTable::Create(Frequencies(6), 16, 64, 3.0);
  std::vector<float> x = RandomFloats(32, 1), before = x;
  const std::vector<int32_t> positions = {63};
  ASSERT_TRUE(table->Apply(x.data(), 32, 2, positions, pool).ok());
  for (const size_t head : {0, 16}) {
    EXPECT_FALSE(SameBits(&x[head], &before[head], 6));
    EXPECT_TRUE(SameBits(&x[head + 6], &before[head + 6], 10));
  }
}

// What makes it a position embedding: q·k depends on the distance only.
TEST(Rope, DotProductDependsOnTheDistanceOnly) {
  ThreadPool pool(1);
  const auto table = RopeTable::Create(Frequencies(64, 500000.0), 64, 4096);
  const std::vector<float> q = RandomFloats(64, 1), k = RandomFloats(64, 2);
  const auto dot = [&](int32_t q_pos, int32_t k_pos) {
    std::vector<float> a = q, b = k;
    EXPECT_TRUE(table->Apply(a.data(), 64, 1, std::span(&q_pos, 1), pool).ok());
    EXPECT_TRUE(table->Apply(b.data(), 64, 1, std::span(&k_pos, 1), pool).ok());
    double sum = 0;
    for (size_t i = 0; i < 64; ++i) sum += double{a[i]} * b[i];
    return sum;
  };
  EXPECT_NEAR(dot(10, 3), dot(4007, 4000), 1e-3);
  EXPECT_GT(std::abs(dot(10, 3) - dot(10, 9)), 1e-2);
}

TEST(Rope, AnglesAreRoundedToFloat32AsTheReferenceImplementationsDo) {
  ThreadPool pool(1);
  const std::vector<float> inv_freq = {0.1f};
  const int64_t pos = 100003;
  const auto table = RopeTable::Create(inv_freq, 2, pos + 1);
  ASSERT_TRUE(table.ok());
  std::vector<float> x = {1, 0};
  const std::vector<int32_t> positions = {static_cast<int32_t>(pos)};
  ASSERT_TRUE(table->Apply(x.data(), 2, 1, positions, pool).ok());
  const float angle = static_cast<float>(pos) * 0.1f;
  EXPECT_EQ(x[0], static_cast<float>(std::cos(double{angle})));
  EXPECT_NE(x[0], static_cast<float>(std::cos(pos * double{0.1f})));
}

TEST(Rope, RefusesBadShapesAndPositionsAndLeavesTheInputAlone) {
  EXPECT_FALSE(RopeTable::Create({}, 8, 16).ok());
  EXPECT_FALSE(RopeTable::Create(Frequencies(10), 8, 16).ok());
  EXPECT_FALSE(RopeTable::Create(Frequencies(8), 8, 0).ok());
  ThreadPool pool(1);
  const auto table = RopeTable::Create(Frequencies(8), 8, 16);
  std::vector<float> x = RandomFloats(16, 1), before = x;
  for (const int32_t bad : {-1, 16}) {
    const std::vector<int32_t> positions = {1, bad};
    EXPECT_EQ(table->Apply(x.data(), 8, 1, positions, pool).code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(x, before);
  }
  const std::vector<int32_t> positions = {1};
  EXPECT_FALSE(table->Apply(x.data(), 8, 2, positions, pool).ok());
}

}  // namespace
}  // namespace tidepool
