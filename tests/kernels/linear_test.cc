#include "kernels/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "kernels/cpu_features.h"
#include "kernels/linear_cpu.h"
#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

using Compute = Linear::Compute;

struct Case {
  DType dtype;
  Compute compute;
};

// A layer with weights that bf16 holds exactly, so that all computes answer the same question.
struct Layer {
  Layer(Case c, int64_t n, int64_t k, bool with_bias, uint64_t seed) : n(n), k(k) {
    const std::vector<BF16> bf16 = ToBF16s(RandomFloats(n * k, seed));
    w = ToFloats(bf16);
    if (with_bias) bias = RandomFloats(n, seed + 1);
    auto made = Linear::Create(c.dtype, n, k,
                               c.dtype == DType::kBF16 ? static_cast<const void*>(bf16.data()) : w.data(),
                               with_bias ? bias.data() : nullptr, c.compute);
    if (made.ok()) linear = std::make_unique<Linear>(*std::move(made));
    status = made.status();
  }
  int64_t n, k;
  std::vector<float> w, bias;
  std::unique_ptr<Linear> linear;
  absl::Status status;
};

std::vector<float> Forward(const Layer& layer, const std::vector<float>& x, int64_t m, NumericMode mode,
                           ThreadPool& pool) {
  std::vector<float> y(static_cast<size_t>(m * layer.n), -7.0f);
  const absl::Status status = layer.linear->Forward(x.data(), m, y.data(), mode, pool);
  EXPECT_TRUE(status.ok()) << status;
  return y;
}

class LinearTest : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (GetParam().compute != Compute::kF32 && GetParam().compute != Compute::kAuto && !Cpu().avx512_bf16) {
      GTEST_SKIP() << "this CPU has no AVX512-BF16";
    }
  }
};

INSTANTIATE_TEST_SUITE_P(All, LinearTest,
                         testing::Values(Case{DType::kBF16, Compute::kAuto},
                                         Case{DType::kBF16, Compute::kBF16},
                                         Case{DType::kBF16, Compute::kF32},
                                         Case{DType::kBF16, Compute::kOneDnn},
                                         Case{DType::kF32, Compute::kAuto}));

TEST_P(LinearTest, MatchesReferenceAtOddSizes) {
  ThreadPool pool(2);
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 64}, {64, 64}, {65, 33}, {172, 64}, {300, 416}, {33, 2080}}) {
    if (GetParam().compute == Compute::kOneDnn && k % 32 != 0) continue;
    for (const bool with_bias : {false, true}) {
      const Layer layer(GetParam(), n, k, with_bias, static_cast<uint64_t>(n * 1000 + k));
      ASSERT_TRUE(layer.status.ok()) << layer.status;
      for (const int64_t m : {1, 2, 5, 7, 16, 33, 130}) {
        const std::vector<float> x = RandomFloats(m * k, static_cast<uint64_t>(m));
        std::vector<double> want(static_cast<size_t>(m * n));
        LinearRef(x.data(), m, layer.w.data(), n, k, with_bias ? layer.bias.data() : nullptr,
                  GetParam().dtype == DType::kBF16, want.data());
        // Against an equally rounded x: only float32 sums differ. |x w| < 1, errors grow like k * 2^-24
        // times partial sums of about sqrt(k).
        const double tolerance = 1e-6 * static_cast<double>(k) / 16 + 1e-6;
        for (const NumericMode mode : {NumericMode::kFast, NumericMode::kBatchInvariant}) {
          SCOPED_TRACE(testing::Message() << "m " << m << " n " << n << " k " << k);
          ExpectNear(Forward(layer, x, m, mode, pool), want, tolerance, 1e-5);
        }
      }
    }
  }
}

TEST_P(LinearTest, BatchInvariantRowsAreBitwiseIndependentOfBatchPositionAndThreads) {
  // k spans several depths of the GEMM, n ends in a partial panel.
  const Layer layer(GetParam(), 200, 2112, true, 5);
  ASSERT_TRUE(layer.status.ok()) << layer.status;
  ThreadPool one(1), two(2), three(3);
  ThreadPool* const pools[] = {&one, &two, &three};
  const int64_t rows = 70;
  const std::vector<float> x = RandomFloats(rows * layer.k, 6);
  std::vector<float> alone;
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<float> row(x.begin() + r * layer.k, x.begin() + (r + 1) * layer.k);
    const std::vector<float> y = Forward(layer, row, 1, NumericMode::kBatchInvariant, one);
    alone.insert(alone.end(), y.begin(), y.end());
  }
  Rng rng(7);
  for (int64_t m = 1; m <= rows; ++m) {
    std::vector<int64_t> order(static_cast<size_t>(m));
    std::vector<float> batch;
    for (int64_t& r : order) {
      r = static_cast<int64_t>(rng.Below(static_cast<uint64_t>(rows)));
      batch.insert(batch.end(), x.begin() + r * layer.k, x.begin() + (r + 1) * layer.k);
    }
    const std::vector<float> y =
        Forward(layer, batch, m, NumericMode::kBatchInvariant, *pools[static_cast<size_t>(m % 3)]);
    for (int64_t i = 0; i < m; ++i) {
      ASSERT_TRUE(
          SameBits(y.data() + i * layer.n, alone.data() + order[static_cast<size_t>(i)] * layer.n, layer.n))
          << "m " << m << " row " << i;
    }
  }
}

TEST_P(LinearTest, BatchInvariantAcrossThePassLimit) {
  const Layer layer(GetParam(), 70, 96, false, 8);
  ThreadPool pool(2);
  const int64_t m = 1100;  // three passes
  const std::vector<float> x = RandomFloats(m * layer.k, 9);
  const std::vector<float> all = Forward(layer, x, m, NumericMode::kBatchInvariant, pool);
  for (int64_t first = 0; first < m; first += 137) {
    const int64_t rows = std::min<int64_t>(137, m - first);
    const std::vector<float> part(x.begin() + first * layer.k, x.begin() + (first + rows) * layer.k);
    EXPECT_TRUE(SameBits(Forward(layer, part, rows, NumericMode::kBatchInvariant, pool).data(),
                         all.data() + first * layer.n, rows * layer.n));
  }
}

TEST_P(LinearTest, ZeroRowsTouchNothing) {
  const Layer layer(GetParam(), 3, 32, false, 1);
  ThreadPool pool(1);
  float y = 42;
  EXPECT_TRUE(layer.linear->Forward(nullptr, 0, &y, NumericMode::kFast, pool).ok());
  EXPECT_EQ(y, 42);
  EXPECT_EQ(layer.linear->Forward(nullptr, -1, &y, NumericMode::kFast, pool).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_P(LinearTest, IsThreadSafeWithAPoolEach) {
  const Layer layer(GetParam(), 130, 96, true, 11);
  const std::vector<float> x = RandomFloats(40 * layer.k, 12);
  ThreadPool main_pool(1);
  const std::vector<float> want = Forward(layer, x, 40, NumericMode::kFast, main_pool);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      ThreadPool pool(2);
      for (int i = 0; i < 20; ++i) {
        EXPECT_TRUE(
            SameBits(Forward(layer, x, 40, NumericMode::kFast, pool).data(), want.data(), 40 * layer.n));
      }
    });
  }
  for (std::thread& t : threads) t.join();
}

TEST(Linear, RefusesWhatItCannotHold) {
  const std::vector<float> w(64);
  EXPECT_EQ(Linear::Create(DType::kF32, 0, 8, w.data()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Linear::Create(DType::kF32, 8, -1, w.data()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Linear::Create(DType::kF16, 8, 8, w.data()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Linear::Create(DType::kF32, 8, 8, w.data(), nullptr, Compute::kBF16).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Linear::Create(DType::kBF16, 8, 8, w.data(), nullptr, Compute::kOneDnn).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(Linear, PacksOnceAndKeepsNoPointerToTheSource) {
  std::vector<float> w = RandomFloats(64 * 48, 3), x = RandomFloats(48, 4);
  auto linear = Linear::Create(DType::kF32, 64, 48, w.data());
  ASSERT_TRUE(linear.ok());
  ThreadPool pool(1);
  std::vector<float> before(64), after(64);
  ASSERT_TRUE(linear->Forward(x.data(), 1, before.data(), NumericMode::kFast, pool).ok());
  std::fill(w.begin(), w.end(), 0.0f);
  Linear moved = *std::move(linear);
  ASSERT_TRUE(moved.Forward(x.data(), 1, after.data(), NumericMode::kFast, pool).ok());
  EXPECT_EQ(before, after);
  EXPECT_EQ(moved.packed_bytes(), 64 * 48 * 4);
}

TEST(Linear, Avx2AndAvx512PanelsAgreeBitForBit) {
  if (!Cpu().avx512) GTEST_SKIP() << "this CPU has no AVX-512";
  const std::vector<float> panel = RandomFloats(64 * 1500, 1), x = RandomFloats(13 * 1500, 2);
  for (const int cols : {1, 63, 64}) {
    for (const int64_t m : {1, 2, 6, 13}) {
      std::vector<float> a(static_cast<size_t>(m * cols)), b = a;
      GemmPanel p{x.data(), 1500, panel.data(), 1500, a.data(), cols, m, cols, nullptr};
      RunGemmPanelAvx2F32(p);
      p.y = b.data();
      RunGemmPanelAvx512F32(p);
      EXPECT_EQ(a, b) << "m " << m << " cols " << cols;
    }
  }
}

}  // namespace
}  // namespace tidepool
