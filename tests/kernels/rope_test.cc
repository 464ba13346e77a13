#include "kernels/rope.h"

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

TEST(Rope, MatchesReferenceAtOddShapes) {
  ThreadPool pool(2);
  for (const int dim : {2, 6, 8, 64, 128}) {
    const auto table = RopeTable::Create(dim, 10000.0, 8192);
    ASSERT_TRUE(table.ok());
    for (const int heads : {1, 3}) {
      for (const int64_t extra : {0, 5}) {
        const std::vector<int32_t> positions = {0, 1, 17, 8191, 5, 5};
        const int64_t stride = heads * dim + extra;
        std::vector<float> x = RandomFloats(stride * 6, 3), want = x;
        ASSERT_TRUE(table->Apply(x.data(), stride, heads, positions, pool).ok());
        RopeRef(want.data(), stride, heads, dim, 10000.0, positions);
        for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], want[i], 5e-7) << "element " << i;
      }
    }
  }
}

TEST(Rope, PositionZeroIsTheIdentity) {
  ThreadPool pool(1);
  const auto table = RopeTable::Create(8, 10000.0, 4);
  std::vector<float> x = RandomFloats(16, 1), before = x;
  const std::vector<int32_t> positions = {0};
  ASSERT_TRUE(table->Apply(x.data(), 16, 2, positions, pool).ok());
  EXPECT_EQ(x, before);
}

// What makes it a position embedding: q·k depends on the distance only.
TEST(Rope, DotProductDependsOnTheDistanceOnly) {
  ThreadPool pool(1);
  const auto table = RopeTable::Create(64, 500000.0, 4096);
  const std::vector<float> q = RandomFloats(64, 1), k = RandomFloats(64, 2);
  const auto dot = [&](int32_t q_pos, int32_t k_pos) {
    std::vector<float> a = q, b = k;
    EXPECT_TRUE(table->Apply(a.data(), 64, 1, std::span(&q_pos, 1), pool).ok());
    EXPECT_TRUE(table->Apply(b.data(), 64, 1, std::span(&k_pos, 1), pool).ok());
    double sum = 0;
    for (size_t i = 0; i < 64; ++i) sum += double{a[i]} * b[i];
    return sum;
  };
  EXPECT_NEAR(dot(10, 3), dot(4007, 4000), 1e-4);
  EXPECT_GT(std::abs(dot(10, 3) - dot(10, 9)), 1e-3);
}

TEST(Rope, GivenFrequenciesAndFactorAreUsed) {
  ThreadPool pool(1);
  const std::vector<double> inv_freq = {0.5, 0.25};
  const auto table = RopeTable::CreateFromInvFreq(inv_freq, 16, 2.0);
  ASSERT_TRUE(table.ok());
  EXPECT_EQ(table->head_dim(), 4);
  std::vector<float> x = {1, 1, 0, 0};
  const std::vector<int32_t> positions = {3};
  ASSERT_TRUE(table->Apply(x.data(), 4, 1, positions, pool).ok());
  EXPECT_FLOAT_EQ(x[0], static_cast<float>(2 * std::cos(1.5)));
  EXPECT_FLOAT_EQ(x[3], static_cast<float>(2 * std::sin(0.75)));
}

TEST(Rope, RefusesBadShapesAndPositionsAndLeavesTheInputAlone) {
  EXPECT_FALSE(RopeTable::Create(7, 10000.0, 16).ok());
  EXPECT_FALSE(RopeTable::Create(8, 0.0, 16).ok());
  EXPECT_FALSE(RopeTable::Create(8, 10000.0, 0).ok());
  ThreadPool pool(1);
  const auto table = RopeTable::Create(8, 10000.0, 16);
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
