// Time of one draw over a vocabulary of 128k, in microseconds a token: what a decode step spends beside the
// model. Logits are peaked as a model's are (a few likely tokens, a long tail) unless the name says flat.
#include <benchmark/benchmark.h>

#include <cmath>

#include "base/rng.h"
#include "server/engine/sampler.h"

namespace tidepool {
namespace {

constexpr size_t kVocab = 128 * 1024;

std::vector<float> PeakedLogits() {
  Rng rng(1);
  std::vector<float> logits(kVocab);
  // Sum of uniforms: a bell of width 2.5, with an exponential tail of outliers on top.
  for (float& l : logits) {
    double x = 0;
    for (int i = 0; i < 4; ++i) x += rng.Uniform() - 0.5;
    l = static_cast<float>(4 * x);
  }
  for (int i = 0; i < 300; ++i)
    logits[rng.Below(kVocab)] += static_cast<float>(-3 * std::log(rng.Uniform() + 1e-9));
  for (int i = 0; i < 5; ++i) logits[rng.Below(kVocab)] += 20;
  return logits;
}

std::vector<float> FlatLogits() {
  Rng rng(2);
  std::vector<float> logits(kVocab);
  for (float& l : logits) l = static_cast<float>(rng.Uniform());
  return logits;
}

void Draw(benchmark::State& state, const SamplingParams& params, int32_t top_logprobs,
          const std::vector<float>& logits) {
  std::vector<int32_t> prompt, outputs;
  for (int32_t i = 0; i < 2000; ++i) prompt.push_back((i * 7919) % static_cast<int32_t>(kVocab));
  TokenCounts counts(prompt, 500);
  for (int32_t i = 0; i < 500; ++i) counts.AddOutput((i * 104729) % static_cast<int32_t>(kVocab));
  Sampler sampler;
  std::vector<float> row = logits;
  // Penalties change the row: start from the model's each time, outside of the measured time's meaning.
  const bool fresh = params.penalises();
  uint32_t index = 0;
  for (auto _ : state) {
    if (fresh) {
      state.PauseTiming();
      row = logits;
      state.ResumeTiming();
    }
    auto token = sampler.Sample(std::span(row), params,
                                {.index = index++, .counts = &counts, .top_logprobs = top_logprobs});
    benchmark::DoNotOptimize(token);
  }
}

// A constraint's mask with `allowed` tokens, spread evenly; `applied` before a greedy draw.
void Masked(benchmark::State& state, const std::vector<float>& logits) {
  const auto allowed = static_cast<size_t>(state.range(0));
  std::vector<uint32_t> mask(kVocab / 32);
  for (size_t i = 0; i < allowed; ++i) {
    const size_t id = i * (kVocab / allowed);
    mask[id / 32] |= 1u << (id % 32);
  }
  Sampler sampler;
  std::vector<float> row = logits;
  for (auto _ : state) {
    state.PauseTiming();
    row = logits;
    state.ResumeTiming();
    auto token = sampler.Sample(std::span(row), {.temperature = 0}, {.mask = mask});
    benchmark::DoNotOptimize(token);
  }
}

const std::vector<float> peaked = PeakedLogits();
const std::vector<float> flat = FlatLogits();

BENCHMARK_CAPTURE(Draw, greedy, {.temperature = 0}, -1, peaked)->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Draw, temperature, {.temperature = 0.8f}, -1, peaked)->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Draw, top_k_50, {.temperature = 0.8f, .top_k = 50}, -1, peaked)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Draw, top_p_95, {.temperature = 0.8f, .top_p = 0.95f}, -1, peaked)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Draw, top_p_95_flat, {.temperature = 0.8f, .top_p = 0.95f}, -1, flat)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Draw, top_k_50_top_p_95, {.temperature = 0.8f, .top_k = 50, .top_p = 0.95f}, -1, peaked)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Draw, min_p_05, {.temperature = 0.8f, .min_p = 0.05f}, -1, peaked)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Draw, typical_p_95, {.temperature = 0.8f, .typical_p = 0.95f}, -1, peaked)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(
    Draw, penalties,
    {.temperature = 0.8f, .repetition_penalty = 1.1f, .presence_penalty = 0.5f, .frequency_penalty = 0.5f},
    -1, peaked)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Draw, greedy_logprobs_20, {.temperature = 0}, 20, peaked)->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(Draw, temperature_logprobs_20, {.temperature = 0.8f}, 20, peaked)
    ->Unit(benchmark::kMicrosecond);

BENCHMARK_CAPTURE(Masked, greedy_mask, peaked)
    ->Arg(1)
    ->Arg(1000)
    ->Arg(60'000)
    ->Arg(kVocab)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace tidepool

BENCHMARK_MAIN();
