#include "kernels/logits.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(Argmax, LowestIndexWinsATie) {
  std::vector<float> x(100, -1.0f);
  x[37] = x[90] = x[99] = 2.0f;
  EXPECT_EQ(Argmax(x.data(), 100), 37);
  EXPECT_EQ(Argmax(x.data() + 38, 62), 90 - 38);
  EXPECT_EQ(Argmax(x.data(), 1), 0);
}

TEST(Argmax, NanNeverWins) {
  std::vector<float> x(40, std::nanf(""));
  EXPECT_EQ(Argmax(x.data(), 40), -1);
  EXPECT_EQ(Argmax(x.data(), 0), -1);
  x[5] = -kInf;
  EXPECT_EQ(Argmax(x.data(), 40), 5);
  x[33] = -3;
  EXPECT_EQ(Argmax(x.data(), 40), 33);
}

TEST(LogSumExp, MatchesDouble) {
  for (const int64_t n : {1, 2, 15, 16, 17, 1000, 128256}) {
    const std::vector<float> x = RandomFloats(n, static_cast<uint64_t>(n), 20.0f);
    double sum = 0;
    for (const float v : x) sum += std::exp(double{v});
    EXPECT_NEAR(LogSumExp(x.data(), n), std::log(sum), 3e-6) << n;
  }
  EXPECT_EQ(LogSumExp(nullptr, 0), -kInf);
  const std::vector<float> nan = {1.0f, std::nanf(""), 2.0f};
  EXPECT_TRUE(std::isnan(LogSumExp(nan.data(), 3)));
}

TEST(Logprobs, TopAndChosenMatchAFullSort) {
  const int64_t n = 777;
  std::vector<float> x = RandomFloats(n, 4, 6.0f);
  x[500] = x[100] = 9.0f;  // a tie at the top
  const std::vector<int32_t> ids = {100, 776, 0};
  std::vector<float> chosen(3);
  std::vector<TokenLogprob> top(kTopLogprobsMax);
  ASSERT_TRUE(Logprobs(x.data(), n, ids, chosen, top).ok());
  double sum = 0;
  for (const float v : x) sum += std::exp(double{v});
  for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(chosen[i], x[static_cast<size_t>(ids[i])] - std::log(sum), 2e-6);
  std::vector<int32_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)];
  });
  for (size_t i = 0; i < top.size(); ++i) EXPECT_EQ(top[i].id, order[i]);
  EXPECT_EQ(top[0].id, 100);
  EXPECT_EQ(top[0].logprob, chosen[0]);
}

TEST(Logprobs, MaskedTokensAreMinusInfinity) {
  const std::vector<float> x = {-kInf, 0.0f, -kInf};
  const std::vector<int32_t> ids = {0, 1};
  std::vector<float> chosen(2);
  std::vector<TokenLogprob> top(3);
  ASSERT_TRUE(Logprobs(x.data(), 3, ids, chosen, top).ok());
  EXPECT_EQ(chosen, (std::vector<float>{-kInf, 0.0f}));
  EXPECT_EQ(top[0], (TokenLogprob{1, 0.0f}));
  EXPECT_EQ(top[1], (TokenLogprob{0, -kInf}));
  EXPECT_EQ(top[2], (TokenLogprob{2, -kInf}));
}

TEST(Logprobs, RefusesBadArguments) {
  const std::vector<float> x(30, 0.0f);
  std::vector<float> chosen(1);
  std::vector<TokenLogprob> top(kTopLogprobsMax + 1);
  const std::vector<int32_t> bad = {30}, good = {29};
  EXPECT_EQ(Logprobs(x.data(), 30, bad, chosen, {}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Logprobs(x.data(), 30, good, chosen, top).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Logprobs(x.data(), 30, good, {}, {}).code(), absl::StatusCode::kInvalidArgument);
  std::vector<float> nan = x;
  nan[3] = std::nanf("");
  EXPECT_EQ(Logprobs(nan.data(), 30, good, chosen, {}).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tidepool
