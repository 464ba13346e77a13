#include "kernels/moe.h"

#include <algorithm>
#include <numeric>

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

TEST(MoeRoute, MatchesReferenceAtOddShapes) {
  ThreadPool pool(2);
  for (const int64_t rows : {0, 1, 5, 300}) {
    for (const auto& [experts, top_k] : {std::pair{1, 1}, {4, 2}, {8, 8}, {60, 7}, {128, 8}, {200, 64}}) {
      for (const bool renormalise : {false, true}) {
        const std::vector<float> logits = RandomFloats(rows * experts, 1, 6.0f);
        const size_t n = static_cast<size_t>(rows * top_k);
        std::vector<int32_t> ids(n), want_ids(n);
        std::vector<float> weights(n);
        std::vector<double> want(n);
        MoeRoute(logits.data(), rows, experts, top_k, renormalise, ids.data(), weights.data(), pool);
        MoeRouteRef(logits.data(), rows, experts, top_k, renormalise, want_ids.data(), want.data());
        ASSERT_EQ(ids, want_ids) << experts << " experts, top " << top_k;
        ExpectNear(weights, want, 1e-12, 1e-6);
      }
    }
  }
}

TEST(MoeRoute, TiesGoToTheLowerIdAndIdsRise) {
  ThreadPool pool(1);
  const std::vector<float> logits = {1, 2, 2, 0, 2, 1, 1, 1};
  std::vector<int32_t> ids(4);
  std::vector<float> weights(4);
  MoeRoute(logits.data(), 1, 8, 4, true, ids.data(), weights.data(), pool);
  EXPECT_EQ(ids, (std::vector<int32_t>{0, 1, 2, 4}));
  EXPECT_NEAR(weights[0] + weights[1] + weights[2] + weights[3], 1.0, 1e-6);
}

TEST(MoeRoute, NanAndInfiniteLogitsGiveValidIds) {
  ThreadPool pool(1);
  const std::vector<float> logits = {std::nanf(""), INFINITY,  -INFINITY, 0,
                                     -INFINITY,     -INFINITY, -INFINITY, -INFINITY};
  std::vector<int32_t> ids(4);
  std::vector<float> weights(4);
  MoeRoute(logits.data(), 2, 4, 2, false, ids.data(), weights.data(), pool);
  for (const int32_t id : ids) {
    EXPECT_GE(id, 0);
    EXPECT_LT(id, 4);
  }
  EXPECT_LT(ids[0], ids[1]);
}

TEST(MoeGroup, BringsEachExpertsRowsTogetherInTheirOrder) {
  const std::vector<int32_t> ids = {0, 3, 1, 3, 0, 1, 3, 4};  // 4 rows, top 2, expert 2 is not chosen
  std::vector<int32_t> offsets(6), place(8);
  MoeGroup(ids.data(), 4, 2, 5, offsets.data(), place.data());
  EXPECT_EQ(offsets, (std::vector<int32_t>{0, 2, 4, 4, 7, 8}));
  EXPECT_EQ(place, (std::vector<int32_t>{0, 4, 2, 5, 1, 3, 6, 7}));
}

TEST(MoeGroup, NoRowsGiveEmptyGroups) {
  std::vector<int32_t> offsets(4, 9);
  MoeGroup(nullptr, 0, 2, 3, offsets.data(), nullptr);
  EXPECT_EQ(offsets, std::vector<int32_t>(4, 0));
}

TEST(MoeCombine, UndoesGatherAndWeighs) {
  ThreadPool pool(2);
  const int64_t rows = 37, hidden = 19;
  const int top_k = 3, experts = 11;
  const std::vector<float> logits = RandomFloats(rows * experts, 3, 4.0f), x = RandomFloats(rows * hidden, 4);
  std::vector<int32_t> ids(rows * top_k), offsets(experts + 1), place(rows * top_k);
  std::vector<float> weights(rows * top_k), grouped(rows * top_k * hidden), y(rows * hidden);
  MoeRoute(logits.data(), rows, experts, top_k, true, ids.data(), weights.data(), pool);
  MoeGroup(ids.data(), rows, top_k, experts, offsets.data(), place.data());
  MoeGather(x.data(), place.data(), rows, top_k, hidden, grouped.data(), pool);
  // Expert e multiplies by e + 1.
  for (int e = 0; e < experts; ++e) {
    for (int64_t i = offsets[e] * hidden; i < offsets[e + 1] * hidden; ++i)
      grouped[i] *= static_cast<float>(e + 1);
  }
  MoeCombine(grouped.data(), weights.data(), place.data(), rows, top_k, hidden, y.data(), pool);
  std::vector<double> want(y.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int s = 0; s < top_k; ++s) {
      for (int64_t d = 0; d < hidden; ++d) {
        want[r * hidden + d] += double{weights[r * top_k + s]} * (ids[r * top_k + s] + 1) * x[r * hidden + d];
      }
    }
  }
  ExpectNear(y, want, 1e-6, 1e-6);
}

TEST(MoeCombine, ARowsBitsDoNotDependOnTheBatch) {
  ThreadPool one(1), three(3);
  const int64_t rows = 50, hidden = 33;
  const int top_k = 4, experts = 9;
  const std::vector<float> logits = RandomFloats(rows * experts, 5, 4.0f), x = RandomFloats(rows * hidden, 6);
  const auto run = [&](int64_t first, int64_t n, ThreadPool& pool) {
    std::vector<int32_t> ids(n * top_k), offsets(experts + 1), place(n * top_k);
    std::vector<float> weights(n * top_k), grouped(n * top_k * hidden), y(n * hidden);
    MoeRoute(logits.data() + first * experts, n, experts, top_k, false, ids.data(), weights.data(), pool);
    MoeGroup(ids.data(), n, top_k, experts, offsets.data(), place.data());
    MoeGather(x.data() + first * hidden, place.data(), n, top_k, hidden, grouped.data(), pool);
    MoeCombine(grouped.data(), weights.data(), place.data(), n, top_k, hidden, y.data(), pool);
    return y;
  };
  const std::vector<float> all = run(0, rows, three);
  for (int64_t r = 0; r < rows; ++r) {
    ASSERT_TRUE(SameBits(run(r, 1, one).data(), all.data() + r * hidden, hidden)) << "row " << r;
  }
}

}  // namespace
}  // namespace tidepool
