#include "kernels/merge_attention.h"

#include <limits>

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(MergeAttention, TwoHalvesOfASoftmaxMakeTheWhole) {
  ThreadPool pool(2);
  const int64_t rows = 9, dim = 13;
  const int keys = 20, split = 7;
  const std::vector<float> scores = RandomFloats(rows * keys, 1, 10.0f), values = RandomFloats(keys * dim, 2);
  const auto attend = [&](int from, int to, std::vector<float>& out, std::vector<float>& lse) {
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      std::vector<double> acc(static_cast<size_t>(dim));
      for (int j = from; j < to; ++j) {
        const double p = std::exp(double{scores[static_cast<size_t>(r * keys + j)]});
        sum += p;
        for (int64_t d = 0; d < dim; ++d)
          acc[static_cast<size_t>(d)] += p * values[static_cast<size_t>(j * dim + d)];
      }
      for (const double v : acc) out.push_back(static_cast<float>(v / sum));
      lse.push_back(static_cast<float>(std::log(sum)));
    }
  };
  std::vector<float> a, b, all, lse_a, lse_b, lse_all;
  attend(0, split, a, lse_a);
  attend(split, keys, b, lse_b);
  attend(0, keys, all, lse_all);
  // In place over the first part.
  MergeAttention(a.data(), lse_a.data(), b.data(), lse_b.data(), rows, dim, a.data(), lse_a.data(), pool);
  for (size_t i = 0; i < all.size(); ++i) EXPECT_NEAR(a[i], all[i], 2e-6);
  for (size_t i = 0; i < lse_all.size(); ++i) EXPECT_NEAR(lse_a[i], lse_all[i], 2e-6);
}

TEST(MergeAttention, APartWithoutKeysChangesNoBit) {
  ThreadPool pool(1);
  const std::vector<float> a = RandomFloats(4, 1);
  const std::vector<float> nan(4, std::nanf(""));
  const float lse_a = 3.25f, none = -kInf;
  std::vector<float> out(4);
  float lse;
  MergeAttention(a.data(), &lse_a, nan.data(), &none, 1, 4, out.data(), &lse, pool);
  EXPECT_EQ(out, a);
  EXPECT_EQ(lse, lse_a);
  MergeAttention(nan.data(), &none, a.data(), &lse_a, 1, 4, out.data(), nullptr, pool);
  EXPECT_EQ(out, a);
  MergeAttention(nan.data(), &none, nan.data(), &none, 1, 4, out.data(), &lse, pool);
  EXPECT_EQ(out, std::vector<float>(4, 0.0f));
  EXPECT_EQ(lse, -kInf);
}

TEST(MergeAttention, LargeLogSumsDoNotOverflow) {
  ThreadPool pool(1);
  const float a = 1, b = 3, lse_a = 500, lse_b = 500;
  float out, lse;
  MergeAttention(&a, &lse_a, &b, &lse_b, 1, 1, &out, &lse, pool);
  EXPECT_FLOAT_EQ(out, 2);
  EXPECT_FLOAT_EQ(lse, 500 + std::log(2.0f));
}

}  // namespace
}  // namespace tidepool
