// The sampler against its contract read plainly (sampler_reference.h), and its draws against the
// distribution that this gives. Everything is seeded: a failure repeats.
#include "tests/server/engine/sampler_reference.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "base/rng.h"

namespace tidepool {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> RandomLogits(size_t n, uint64_t seed, double spread = 8) {
  Rng rng(seed);
  std::vector<float> logits(n);
  for (float& l : logits) l = static_cast<float>((rng.Uniform() + rng.Uniform() - 1) * spread);
  return logits;
}

struct Context {
  std::vector<int32_t> prompt, outputs, banned;
};

OutputToken Draw(Sampler& sampler, const std::vector<float>& logits, const SamplingParams& p,
                 const Context& c, uint32_t index, int32_t top_logprobs = -1) {
  TokenCounts counts(c.prompt, c.outputs.size());
  for (int32_t id : c.outputs) counts.AddOutput(id);
  std::vector<float> row = logits;
  auto token = sampler.Sample(std::span(row), p,
                              {.index = index,
                               .outputs = c.outputs,
                               .counts = &counts,
                               .banned = c.banned,
                               .top_logprobs = top_logprobs});
  EXPECT_TRUE(token.ok()) << token.status();
  return token.ok() ? *std::move(token) : OutputToken{.id = -1};
}

// What the draw has to be: the reference's distribution run through in the order of ids. Draws so close to
// a boundary between two ids that float weights may see it the other way are skipped (-1).
int32_t ReferenceDraw(const std::vector<double>& q, uint64_t seed, uint32_t index) {
  const double u = SamplingDraw(seed, index);
  double running = 0;
  for (size_t i = 0; i < q.size(); ++i) {
    if (q[i] == 0) continue;
    running += q[i];
    if (std::abs(running - u) < 1e-6) return -1;
    if (running > u) return static_cast<int32_t>(i);
  }
  return -1;
}

struct Case {
  const char* name;
  SamplingParams params;
  Context context;
};

std::vector<Case> Cases() {
  const Context seen{.prompt = {1, 2, 3, 3, 7}, .outputs = {4, 4, 4, 2, 9, 4, 5}};
  return {
      {"plain", {}, {}},
      {"greedy", {.temperature = 0}, {}},
      {"cool", {.temperature = 0.3f}, {}},
      {"hot", {.temperature = 1.9f}, {}},
      {"top_k", {.top_k = 7}, {}},
      {"top_k_1", {.top_k = 1}, {}},
      {"top_k_of_more_than_there_are", {.top_k = 1 << 20}, {}},
      {"top_p", {.top_p = 0.83f}, {}},
      {"top_p_small", {.top_p = 0.01f}, {}},
      {"top_p_nearly_1", {.top_p = 0.9999f}, {}},
      {"min_p", {.min_p = 0.07f}, {}},
      {"typical_p", {.typical_p = 0.6f}, {}},
      {"typical_p_small", {.typical_p = 0.02f}, {}},
      {"repetition_penalty", {.repetition_penalty = 1.7f}, seen},
      {"repetition_reward", {.repetition_penalty = 0.4f}, seen},
      {"presence_penalty", {.presence_penalty = 1.5f}, seen},
      {"presence_reward", {.presence_penalty = -2.0f}, seen},
      {"frequency_penalty", {.frequency_penalty = 0.9f}, seen},
      {"greedy_with_penalties",
       {.temperature = 0, .repetition_penalty = 2.0f, .presence_penalty = 1, .frequency_penalty = 1},
       seen},
      {"logit_bias", {.logit_bias = {{3, 4.5f}, {0, -100.0f}, {11, 1.0f}}}, {}},
      {"allowed_token_ids", {.allowed_token_ids = {9, 2, 5, 31}}, {}},
      {"bad_word_of_one_token", {.bad_words = {{6}, {8}}}, {}},
      {"bad_word_at_its_end", {.bad_words = {{9, 4, 5, 10}, {4, 5, 1}}}, seen},
      {"min_tokens", {}, {.banned = {0, 12, 30}}},
      {"top_k_top_p", {.top_k = 12, .top_p = 0.7f}, {}},
      {"min_p_top_k_top_p_typical_p",
       {.temperature = 1.3f, .top_k = 25, .top_p = 0.9f, .min_p = 0.01f, .typical_p = 0.8f},
       {}},
      {"everything",
       {.temperature = 0.8f,
        .top_k = 20,
        .top_p = 0.95f,
        .min_p = 0.001f,
        .typical_p = 0.9f,
        .repetition_penalty = 1.2f,
        .presence_penalty = 0.3f,
        .frequency_penalty = -0.2f,
        .logit_bias = {{2, 3.0f}, {13, -1.0f}},
        .bad_words = {{4, 5, 14}}},
       {.prompt = seen.prompt, .outputs = seen.outputs, .banned = {0}}},
  };
}

class SamplerAgainstReference : public ::testing::TestWithParam<Case> {};

TEST_P(SamplerAgainstReference, EveryDrawIsTheReferences) {
  Sampler sampler;
  // One block of logits, a few, and enough for a cut to look into few of them.
  for (const size_t n : {size_t{32}, size_t{700}, size_t{20000}}) {
    SamplingParams p = GetParam().params;
    int judged = 0;
    for (uint64_t seed = 0; seed < 40; ++seed) {
      const std::vector<float> logits = RandomLogits(n, seed * 31 + n, n > 1000 ? 20 : 8);
      p.seed = seed;
      const auto index = static_cast<uint32_t>(seed % 5);
      const std::vector<double> q =
          ReferenceDistribution({logits.begin(), logits.end()}, p, GetParam().context.prompt,
                                GetParam().context.outputs, GetParam().context.banned);
      const int32_t expected = ReferenceDraw(q, seed, index);
      if (expected < 0) continue;
      ++judged;
      EXPECT_EQ(Draw(sampler, logits, p, GetParam().context, index).id, expected)
          << "vocabulary " << n << ", seed " << seed;
    }
    EXPECT_GT(judged, 30);
  }
}

// Pearson's chi-square of 20,000 draws against the reference's distribution. The seeds are fixed: what passes
// once passes always.
TEST_P(SamplerAgainstReference, FrequenciesFollowTheReferencesDistribution) {
  constexpr int kDraws = 20000;
  Sampler sampler;
  SamplingParams p = GetParam().params;
  p.seed = 12345;
  const std::vector<float> logits = RandomLogits(32, 5, 4);
  const std::vector<double> q =
      ReferenceDistribution({logits.begin(), logits.end()}, p, GetParam().context.prompt,
                            GetParam().context.outputs, GetParam().context.banned);
  std::vector<int> seen(logits.size());
  for (int i = 0; i < kDraws; ++i) {
    ++seen[Draw(sampler, logits, p, GetParam().context, static_cast<uint32_t>(i)).id];
  }
  double chi_square = 0, rare = 0, rare_seen = 0;
  int cells = 0;
  for (size_t i = 0; i < q.size(); ++i) {
    if (q[i] == 0) {
      EXPECT_EQ(seen[i], 0) << "token " << i << " was cut";
      continue;
    }
    const double expected = q[i] * kDraws;
    if (expected < 10) {  // too few for the approximation: counted together
      rare += expected;
      rare_seen += seen[i];
      continue;
    }
    chi_square += (seen[i] - expected) * (seen[i] - expected) / expected;
    ++cells;
  }
  if (rare >= 10) {
    chi_square += (rare_seen - rare) * (rare_seen - rare) / rare;
    ++cells;
  }
  // Wilson and Hilferty's approximation of the 99.9 % quantile, for cells - 1 degrees of freedom.
  const double k = std::max(1, cells - 1), z = 3.09;
  const double limit = k * std::pow(1 - 2 / (9 * k) + z * std::sqrt(2 / (9 * k)), 3);
  if (cells > 1) {
    EXPECT_LT(chi_square, limit) << cells << " cells";
  }
}

INSTANTIATE_TEST_SUITE_P(Parameters, SamplerAgainstReference, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return std::string(info.param.name); });

// n choices draw with neighbouring seeds: they must be as unrelated as any.
TEST(SamplerDraws, NeighbouringSeedsAreUnrelated) {
  constexpr int kDraws = 20000, kBins = 16;
  std::vector<int> joint(kBins * kBins);
  for (int i = 0; i < kDraws; ++i) {
    const int a = static_cast<int>(SamplingDraw(777, static_cast<uint32_t>(i)) * kBins);
    const int b = static_cast<int>(SamplingDraw(778, static_cast<uint32_t>(i)) * kBins);
    ++joint[a * kBins + b];
  }
  double chi_square = 0;
  const double expected = double{kDraws} / (kBins * kBins);
  for (int seen : joint) chi_square += (seen - expected) * (seen - expected) / expected;
  EXPECT_LT(chi_square, 330.5);  // 99.9 % of 255 degrees of freedom
}

TEST(SamplerDraws, SamplersThatHaveDrawnOtherThingsDrawTheSame) {
  Sampler used;
  const std::vector<float> large = RandomLogits(5000, 1), small = RandomLogits(50, 2);
  for (const Case& c : Cases()) {
    Draw(used, large, c.params, c.context, 3, 20);
    Sampler fresh;
    EXPECT_EQ(Draw(used, small, c.params, c.context, 0).id, Draw(fresh, small, c.params, c.context, 0).id)
        << c.name;
  }
}

TEST(SamplerLogprobs, AreOfTheRawDistributionWhateverIsApplied) {
  const std::vector<float> logits = RandomLogits(3000, 9);
  double sum = 0;
  for (float l : logits) sum += std::exp(double{l});
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  Sampler sampler;
  for (const Case& c : Cases()) {
    const OutputToken token = Draw(sampler, logits, c.params, c.context, 0, 20);
    EXPECT_NEAR(token.logprob, logits[token.id] - std::log(sum), 1e-4) << c.name;
    ASSERT_EQ(token.top.size(), 20u);
    for (size_t i = 0; i < 20; ++i) {
      EXPECT_EQ(token.top[i].id, static_cast<int32_t>(order[i])) << c.name;
      EXPECT_NEAR(token.top[i].logprob, logits[order[i]] - std::log(sum), 1e-4);
    }
  }
}

TEST(SamplerLogprobs, ScoresATokenOfThePromptWithItsRank) {
  Sampler sampler;
  const std::vector<float> logits = {1, 3, 2, 3, -kInf};
  const double lse = std::log(std::exp(1) + 2 * std::exp(3) + std::exp(2));
  const struct {
    int32_t id;
    uint32_t rank;
  } cases[] = {{1, 1}, {3, 2}, {2, 3}, {0, 4}};
  for (const auto& c : cases) {
    const auto score = sampler.Score(logits, c.id, 2);
    ASSERT_TRUE(score.ok()) << score.status();
    EXPECT_EQ(score->rank, c.rank);
    EXPECT_NEAR(score->logprob, logits[c.id] - lse, 1e-5);
    ASSERT_EQ(score->top.size(), 2u);
    EXPECT_EQ(score->top[0].id, 1);
    EXPECT_EQ(score->top[1].id, 3) << "equals rank by id";
  }
  EXPECT_EQ(sampler.Score(logits, 4, 0)->logprob, -kInf);
  const std::vector<float> broken = {1, std::nanf("")};
  EXPECT_EQ(sampler.Score(broken, 0, 0).status().code(), absl::StatusCode::kInternal);
}

TEST(SamplerPenalties, ExtremeOnesNeitherOverflowNorDrawWhatIsBanned) {
  Sampler sampler;
  const Context seen{.prompt = {0, 1}, .outputs = {2, 2}, .banned = {3}};
  const std::vector<float> logits = {50, 40, -30, 60, -kInf};
  for (const float repetition : {1e-6f, 100.0f}) {
    for (uint32_t i = 0; i < 200; ++i) {
      const int32_t id =
          Draw(sampler, logits, {.repetition_penalty = repetition, .presence_penalty = 2}, seen, i).id;
      EXPECT_TRUE(id == 0 || id == 1 || id == 2) << id;
    }
  }
}

TEST(SamplerErrors, NothingLeftToDraw) {
  Sampler sampler;
  std::vector<float> logits = {1, 2, 3};
  SamplingParams p;
  p.allowed_token_ids = {1};
  p.bad_words = {{1}};
  EXPECT_EQ(sampler.Sample(std::span(logits), p, {}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(TokenCounts, CountsTheAnswerApartFromThePrompt) {
  const std::vector<int32_t> prompt = {5, 5, 8};
  TokenCounts counts(prompt, 3);
  counts.AddOutput(8);
  counts.AddOutput(9);
  counts.AddOutput(8);
  std::map<int32_t, uint32_t> seen;
  for (const auto& entry : counts.entries()) seen[entry.id] = entry.outputs;
  EXPECT_EQ(seen, (std::map<int32_t, uint32_t>{{5, 0}, {8, 2}, {9, 1}}));
}

}  // namespace
}  // namespace tidepool
