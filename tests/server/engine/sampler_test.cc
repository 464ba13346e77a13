#include "server/engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "base/rng.h"

namespace tidepool {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

OutputToken Draw(std::vector<float> logits, const SamplingParams& p, uint32_t index = 0,
                 std::vector<int32_t> banned = {}, int32_t top = -1) {
  Sampler sampler;
  auto t = sampler.Sample(std::span(logits), p, {.index = index, .banned = banned, .top_logprobs = top});
  EXPECT_TRUE(t.ok()) << t.status();
  return *t;
}

// The ids that 2000 draws give, with how often.
std::map<int32_t, int> Histogram(const std::vector<float>& logits, SamplingParams p) {
  std::map<int32_t, int> out;
  for (uint32_t i = 0; i < 2000; ++i) ++out[Draw(logits, p, i).id];
  return out;
}

std::set<int32_t> Support(const std::vector<float>& logits, const SamplingParams& p) {
  std::set<int32_t> out;
  for (const auto& [id, n] : Histogram(logits, p)) out.insert(id);
  return out;
}

TEST(Sampler, GreedyTakesTheLargestAndTheLowestIdOfEquals) {
  EXPECT_EQ(Draw({1, 5, 3, 5}, {.temperature = 0}).id, 1);
  EXPECT_EQ(Draw({-kInf, -3, -kInf}, {.temperature = 0}).id, 1);
}

TEST(Sampler, DrawDependsOnSeedAndIndexOnly) {
  std::vector<float> logits(200);
  Rng rng(1);
  for (float& v : logits) v = static_cast<float>(rng.Uniform() * 4);
  Sampler used;
  for (uint32_t i = 0; i < 50; ++i) {
    std::vector<float> row = logits;
    const int32_t id = used.Sample(std::span(row), {.seed = 7}, {.index = i})->id;
    EXPECT_EQ(id, Draw(logits, {.seed = 7}, i).id);
  }
  int differ = 0;
  for (uint32_t i = 0; i < 50; ++i)
    differ += Draw(logits, {.seed = 7}, i).id != Draw(logits, {.seed = 8}, i).id;
  EXPECT_GT(differ, 30);
}

TEST(Sampler, DrawsAreUniformAndUnrelated) {
  double sum = 0, product = 0;
  for (uint32_t i = 0; i < 20000; ++i) {
    const double a = SamplingDraw(42, i), b = SamplingDraw(42, i + 1);
    ASSERT_GE(a, 0);
    ASSERT_LT(a, 1);
    sum += a;
    product += (a - 0.5) * (b - 0.5);
  }
  EXPECT_NEAR(sum / 20000, 0.5, 0.01);
  EXPECT_NEAR(product / 20000, 0, 0.003);
}

TEST(Sampler, FrequenciesFollowTheTemperedDistribution) {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(4.0f)};
  auto h = Histogram(logits, {.temperature = 1, .seed = 3});
  EXPECT_NEAR(h[0], 2000.0 / 7, 80);
  EXPECT_NEAR(h[2], 2000.0 * 4 / 7, 100);
  // Temperature 1/2 squares the odds: 1 : 4 : 16.
  h = Histogram(logits, {.temperature = 0.5f, .seed = 3});
  EXPECT_NEAR(h[0], 2000.0 / 21, 50);
  EXPECT_NEAR(h[2], 2000.0 * 16 / 21, 100);
}

TEST(Sampler, TinyTemperatureIsGreedyWithoutOverflow) {
  EXPECT_EQ(Support({1, 50, 49}, {.temperature = 1e-30f}), (std::set<int32_t>{1}));
  EXPECT_EQ(Support({1e30f, -1e30f}, {.temperature = 1}), (std::set<int32_t>{0}));
}

TEST(Sampler, TopKKeepsTheLikeliestAndLowIdsOfEquals) {
  EXPECT_EQ(Support({1, 3, 2, 3.1f}, {.top_k = 2}), (std::set<int32_t>{1, 3}));
  EXPECT_EQ(Support({1, 1, 1, 1}, {.top_k = 2}), (std::set<int32_t>{0, 1}));
  EXPECT_EQ(Support({1, 1}, {.top_k = 100}), (std::set<int32_t>{0, 1}));
}

TEST(Sampler, TopPKeepsTheFewestThatReachTheMass) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.5f), std::log(0.15f), std::log(0.25f)};
  EXPECT_EQ(Support(logits, {.top_p = 0.4f}), (std::set<int32_t>{1}));
  EXPECT_EQ(Support(logits, {.top_p = 0.7f}), (std::set<int32_t>{1, 3}));
  EXPECT_EQ(Support(logits, {.top_p = 0.8f}), (std::set<int32_t>{1, 2, 3}));
  EXPECT_EQ(Support(logits, {.top_p = 1e-6f}), (std::set<int32_t>{1}));
  // After top_k = 2 the mass left is 0.75, of which the first has two thirds.
  EXPECT_EQ(Support(logits, {.top_k = 2, .top_p = 0.6f}), (std::set<int32_t>{1}));
}

TEST(Sampler, MinPIsRelativeToTheLikeliest) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.5f), std::log(0.15f), std::log(0.25f)};
  EXPECT_EQ(Support(logits, {.min_p = 0.4f}), (std::set<int32_t>{1, 3}));
  EXPECT_EQ(Support(logits, {.min_p = 1.0f}), (std::set<int32_t>{1}));
}

TEST(Sampler, BannedIdsAreNotDrawn) {
  EXPECT_EQ(Draw({1, 5, 3}, {.temperature = 0}, 0, {1}).id, 2);
  for (uint32_t i = 0; i < 200; ++i) EXPECT_NE(Draw({1, 5, 3}, {}, i, {1}).id, 1);
}

TEST(Sampler, MaskedIdsAreNotDrawn) {
  // 70 tokens: two whole words and a part of a third.
  std::vector<float> logits(70);
  Rng rng(3);
  for (float& v : logits) v = static_cast<float>(rng.Uniform());
  logits[5] = 9;
  Sampler sampler;
  for (const std::set<int32_t>& allowed : {std::set<int32_t>{0}, {31, 32}, {69}, {5, 6, 63, 64, 68}}) {
    std::vector<uint32_t> mask(3);
    for (int32_t id : allowed) mask[id / 32] |= 1u << (id % 32);
    const auto best = *std::max_element(allowed.begin(), allowed.end(),
                                        [&](int32_t a, int32_t b) { return logits[a] < logits[b]; });
    std::vector<float> row = logits;
    const auto greedy = sampler.Sample(row, {.temperature = 0}, {.mask = mask, .top_logprobs = 1});
    ASSERT_TRUE(greedy.ok());
    EXPECT_EQ(greedy->id, best);
    EXPECT_EQ(greedy->top[0].id, 5) << "what the model thought, allowed or not";
    std::set<int32_t> seen;
    for (uint32_t i = 0; i < 500; ++i) {
      row = logits;
      seen.insert(sampler.Sample(row, {}, {.index = i, .mask = mask})->id);
    }
    EXPECT_TRUE(std::ranges::includes(allowed, seen));
    // One of the five has nearly all the weight.
    EXPECT_GE(seen.size(), std::min<size_t>(allowed.size(), allowed.contains(5) ? 1 : 2));
  }
}

TEST(Sampler, MaskOfAllOnesChangesNothing) {
  std::vector<float> logits(70);
  Rng rng(4);
  for (float& v : logits) v = static_cast<float>(rng.Uniform());
  const std::vector<uint32_t> mask(3, ~0u);
  Sampler sampler;
  for (uint32_t i = 0; i < 100; ++i) {
    std::vector<float> row = logits;
    EXPECT_EQ(sampler.Sample(row, {.seed = 5}, {.index = i, .mask = mask})->id,
              Draw(logits, {.seed = 5}, i).id);
  }
}

TEST(Sampler, MaskThatLeavesNothingIsAnErrorThatNamesTheGrammar) {
  Sampler sampler;
  std::vector<float> logits = {1, 2, 3};
  const std::vector<uint32_t> mask = {0b100};
  const std::vector<int32_t> banned = {2};
  const auto t = sampler.Sample(logits, {}, {.banned = banned, .mask = mask});
  EXPECT_EQ(t.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(t.status().message()).find("grammar"), std::string::npos);
}

TEST(Sampler, LogprobsAreOfTheRawDistribution) {
  const std::vector<float> logits = {0, 1, 2, 3};
  double sum = 0;
  for (float v : logits) sum += std::exp(v);
  const OutputToken t = Draw(logits, {.temperature = 0.1f, .top_k = 1}, 5, {3}, 2);
  EXPECT_EQ(t.id, 2);
  EXPECT_EQ(t.index, 5u);
  EXPECT_NEAR(t.logprob, 2 - std::log(sum), 1e-5);
  ASSERT_EQ(t.top.size(), 2u);
  EXPECT_EQ(t.top[0].id, 3);  // banned, and still what the model thought
  EXPECT_NEAR(t.top[0].logprob, 3 - std::log(sum), 1e-5);
  EXPECT_EQ(t.top[1].id, 2);
  EXPECT_TRUE(Draw(logits, {}, 0, {}, 0).top.empty());
  EXPECT_LT(Draw(logits, {}, 0, {}, 0).logprob, 0);
  EXPECT_EQ(Draw(logits, {}, 0, {}, -1).logprob, 0);
}

TEST(Sampler, LogitsThatAreNoNumbersAreAnError) {
  Sampler sampler;
  for (const float bad : {std::nanf(""), kInf}) {
    for (const float temperature : {0.0f, 1.0f}) {
      std::vector<float> logits = {1, bad, 2};
      const auto t = sampler.Sample(std::span(logits), {.temperature = temperature}, {.top_logprobs = 0});
      EXPECT_EQ(t.status().code(), absl::StatusCode::kInternal);
    }
  }
  std::vector<float> none = {-kInf, -kInf};
  EXPECT_EQ(sampler.Sample(std::span(none), {}, {}).status().code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace tidepool
