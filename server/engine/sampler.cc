#include "server/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/rng.h"
#include "base/status.h"

namespace tidepool {

double SamplingDraw(uint64_t seed, uint32_t index) {
  // Two rounds: neighbouring seeds and neighbouring indices must not give related draws.
  return static_cast<double>(Mix64(Mix64(seed) + index) >> 11) * 0x1.0p-53;
}

absl::StatusOr<int32_t> Sampler::Draw(std::span<const float> logits, const SamplingParams& params,
                                      uint32_t index) {
  const float max = *std::max_element(logits.begin(), logits.end());
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    const double w = std::exp((static_cast<double>(logits[i]) - max) / params.temperature);
    // The largest weight is 1.
    if (w > 0 && w >= params.min_p) candidates_.push_back({w, static_cast<int32_t>(i)});
  }
  // Larger first; equal weights by id, so that the cut does not depend on the sorting algorithm.
  auto before = [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
  };
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + params.top_k, candidates_.end(), before);
    candidates_.resize(static_cast<size_t>(params.top_k));
    // nth_element leaves the kept ones in any order; the sums below need one.
    std::sort(candidates_.begin(), candidates_.end(), before);
  }
  if (params.top_p < 1.0f) {
    double total = 0;
    for (const Candidate& c : candidates_) total += c.weight;
    // A heap gives the largest first without sorting a vocabulary of which a few are kept.
    auto after = [&](const Candidate& a, const Candidate& b) { return before(b, a); };
    std::make_heap(candidates_.begin(), candidates_.end(), after);
    auto end = candidates_.end();
    double kept = 0;
    while (end != candidates_.begin() && kept < params.top_p * total) {
      std::pop_heap(candidates_.begin(), end, after);
      kept += (--end)->weight;
    }
    candidates_.erase(candidates_.begin(), end);
  }

  double total = 0;
  for (const Candidate& c : candidates_) total += c.weight;
  double left = SamplingDraw(params.seed, index) * total;
  for (const Candidate& c : candidates_) {
    left -= c.weight;
    if (left < 0) return c.id;
  }
  // Rounding may leave a hair over.
  return candidates_.back().id;
}

absl::StatusOr<OutputToken> Sampler::Sample(std::span<float> logits, const SamplingParams& params,
                                            uint32_t index, std::span<const int32_t> banned,
                                            int32_t top_logprobs) {
  const int64_t n = static_cast<int64_t>(logits.size());
  for (int64_t i = 0; i < n; ++i) {
    // False for NaN too.
    if (!(logits[i] < std::numeric_limits<float>::infinity())) {
      return absl::InternalError(absl::StrCat("the model's logit of token ", i, " is ", logits[i]));
    }
  }
  OutputToken out;
  out.index = index;
  const float lse = top_logprobs >= 0 ? LogSumExp(logits.data(), n) : 0.0f;
  if (top_logprobs > 0) {
    out.top.resize(std::min<size_t>(static_cast<size_t>(top_logprobs), logits.size()));
    TP_RETURN_IF_ERROR(Logprobs(logits.data(), n, {}, {}, std::span(out.top)));
  }
  // The bans below change the drawn token's logit never, but the others': keep what was asked for first.
  for (int32_t id : banned) logits[id] = -std::numeric_limits<float>::infinity();
  const int32_t greedy = Argmax(logits.data(), n);
  if (greedy < 0 || logits[greedy] == -std::numeric_limits<float>::infinity()) {
    return absl::InternalError("no token is left to draw: every logit is -inf or banned");
  }
  out.id = greedy;
  if (params.temperature > 0) {
    TP_ASSIGN_OR_RETURN(out.id, Draw(logits, params, index));
  }
  if (top_logprobs >= 0) out.logprob = logits[out.id] - lse;
  return out;
}

}  // namespace tidepool
