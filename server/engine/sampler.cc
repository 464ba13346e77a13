#include "server/engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/rng.h"
#include "base/status.h"
#include "kernels/logit_blocks.h"
#include "kernels/logits.h"

namespace tidepool {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMaxLogit = std::numeric_limits<float>::max();
// vLLM's: below it 1 / temperature says no more than the largest logit does.
constexpr float kGreedyTemperature = 1e-5f;

int64_t Size(std::span<const float> row) { return static_cast<int64_t>(row.size()); }

// Calls f(id) for the logits of at least `least`, rising ids, looking into those blocks only that have one.
template <typename F>
void ForEachAtLeast(std::span<const float> row, std::span<const float> maxima, float least, F f) {
  for (size_t b = 0; b < maxima.size(); ++b) {
    if (maxima[b] < least) continue;
    const size_t end = std::min(row.size(), (b + 1) * kLogitBlock);
    for (size_t i = b * kLogitBlock; i < end; ++i) {
      if (row[i] >= least) f(static_cast<int32_t>(i));
    }
  }
}

// Keys in rising order fall into buckets in rising order: by sign, exponent and three bits of a float.
constexpr size_t kBuckets = 4096;
size_t BucketOf(double key) {
  const auto bits = std::bit_cast<uint32_t>(static_cast<float>(key));
  return ((bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u) >> 20;
}

// A word of the mask is mostly all or nothing: the first costs nothing, the second a store.
void ApplyMask(std::span<const uint32_t> mask, std::span<float> logits) {
  for (size_t w = 0; w < mask.size(); ++w) {
    const uint32_t word = mask[w];
    if (word == ~uint32_t{0}) continue;
    const size_t begin = w * 32, n = std::min<size_t>(32, logits.size() - begin);
    float* row = logits.data() + begin;
    if (word == 0) {
      std::fill_n(row, n, -kInf);
      continue;
    }
    for (size_t i = 0; i < n; ++i) row[i] = (word >> i & 1) != 0 ? row[i] : -kInf;
  }
}

bool EndsWith(std::span<const int32_t> outputs, std::span<const int32_t> tail) {
  return outputs.size() >= tail.size() &&
         std::equal(tail.begin(), tail.end(), outputs.end() - static_cast<std::ptrdiff_t>(tail.size()));
}

}  // namespace

double SamplingDraw(uint64_t seed, uint32_t index) {
  // Two rounds: neighbouring seeds and neighbouring indices must not give related draws.
  return static_cast<double>(Mix64(Mix64(seed) + index) >> 11) * 0x1.0p-53;
}

absl::Status Sampler::FindMaxima(std::span<const float> logits) {
  maxima_.resize(static_cast<size_t>(LogitBlocks(Size(logits))));
  if (BlockMaxima(logits.data(), Size(logits), maxima_.data())) return absl::OkStatus();
  const auto bad = std::find_if(logits.begin(), logits.end(), [](float l) { return !(l < kInf); });
  return absl::InternalError(absl::StrCat("the model's logit of token ", bad - logits.begin(), " is ", *bad));
}

float Sampler::Max() const {
  return maxima_.empty() ? -kInf : *std::max_element(maxima_.begin(), maxima_.end());
}

int32_t Sampler::GreedyMasked(std::span<const float> logits, std::span<const uint32_t> mask) const {
  constexpr size_t kWords = kLogitBlock / 32;  // of a block
  static_assert(kLogitBlock % 32 == 0);
  float best = -kInf;
  int32_t id = -1;
  for (size_t b = 0; b < maxima_.size(); ++b) {
    // What is allowed of a block is not above its maximum: most blocks need no look.
    if (maxima_[b] <= best) continue;
    for (size_t w = b * kWords; w < std::min(mask.size(), (b + 1) * kWords); ++w) {
      for (uint32_t word = mask[w]; word != 0; word &= word - 1) {
        const size_t i = w * 32 + static_cast<size_t>(std::countr_zero(word));
        if (i >= logits.size()) break;
        if (logits[i] > best) {
          best = logits[i];
          id = static_cast<int32_t>(i);
        }
      }
    }
  }
  return id;
}

void Sampler::Modify(std::span<float> logits, const SamplingParams& params, const SampleInput& input) {
  if (!params.allowed_token_ids.empty()) {
    allowed_.clear();
    for (int32_t id : params.allowed_token_ids) allowed_.push_back(logits[id]);
    std::fill(logits.begin(), logits.end(), -kInf);
    for (size_t i = 0; i < allowed_.size(); ++i) logits[params.allowed_token_ids[i]] = allowed_[i];
  }
  ApplyMask(input.mask, logits);
  for (const std::vector<int32_t>& word : params.bad_words) {
    if (EndsWith(input.outputs, std::span(word).first(word.size() - 1))) logits[word.back()] = -kInf;
  }
  for (int32_t id : input.banned) logits[id] = -kInf;
  for (const LogitBias& b : params.logit_bias) logits[b.id] += b.bias;
  if (!params.penalises()) return;
  for (const TokenCounts::Entry& seen : input.counts->entries()) {
    float& l = logits[seen.id];
    l = l > 0 ? l / params.repetition_penalty : l * params.repetition_penalty;
    if (seen.outputs > 0) {
      l -= params.frequency_penalty * static_cast<float>(seen.outputs);
      l -= params.presence_penalty;
    }
    // An extreme penalty must not make a logit that the next step takes for a damaged one.
    l = std::min(l, kMaxLogit);
  }
}

void Sampler::CollectTop(std::span<const float> logits, size_t k) {
  candidates_.clear();
  if (k == 0) return;
  float least = -kInf;
  if (k <= maxima_.size()) {
    // The k largest maxima are k logits: none of the k largest logits is below the least of them.
    scratch_maxima_ = maxima_;
    const auto at = scratch_maxima_.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(scratch_maxima_.begin(), at, scratch_maxima_.end(), std::greater<>());
    least = *at;
  }
  ForEachAtLeast(logits, maxima_, least, [&](int32_t id) {
    candidates_.push_back({.key = -static_cast<double>(logits[id]), .weight = 0, .id = id});
  });
  if (candidates_.size() <= k) return;
  std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(k),
                   candidates_.end(), Before);
  candidates_.resize(k);
}

void Sampler::ReadTop(std::span<const float> logits, int32_t count, float lse, TopLogprobs& out) {
  CollectTop(logits, std::min(static_cast<size_t>(count), logits.size()));
  std::sort(candidates_.begin(), candidates_.end(), Before);
  for (const Candidate& c : candidates_) out.push_back({c.id, logits[c.id] - lse});
}

int32_t Sampler::DrawFromAll(std::span<const float> logits, const SamplingParams& params, float max,
                             uint32_t index) {
  weights_.resize(logits.size());
  sums_.resize(maxima_.size());
  const double total =
      ExpBlocks(logits.data(), Size(logits), max, 1 / params.temperature, weights_.data(), sums_.data());
  double left = SamplingDraw(params.seed, index) * total;
  int32_t last = 0;
  for (size_t b = 0; b < sums_.size(); ++b) {
    if (left >= sums_[b]) {
      left -= sums_[b];
      continue;
    }
    const size_t end = std::min(weights_.size(), (b + 1) * kLogitBlock);
    for (size_t i = b * kLogitBlock; i < end; ++i) {
      if (weights_[i] == 0) continue;
      last = static_cast<int32_t>(i);
      left -= weights_[i];
      if (left < 0) return last;
    }
    // A block's sum and the sum of its weights differ by rounding: the draw fell into that hair.
    return last;
  }
  // As above, at the row's end: the last that has any weight.
  for (size_t i = weights_.size(); i-- > 0;) {
    if (weights_[i] > 0) return static_cast<int32_t>(i);
  }
  return last;
}

double Sampler::CollectWeights(std::span<const float> logits, const SamplingParams& params, float max) {
  const double scale = 1.0 / params.temperature;
  const auto weigh = [&](float logit) { return std::exp((static_cast<double>(logit) - max) * scale); };
  const bool cut_k = params.top_k > 0 && static_cast<size_t>(params.top_k) < logits.size();
  if (cut_k || params.min_p > 0) {
    if (cut_k) {
      CollectTop(logits, static_cast<size_t>(params.top_k));
      std::sort(candidates_.begin(), candidates_.end(),
                [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
      for (Candidate& c : candidates_) c.weight = weigh(logits[c.id]);
    } else {
      // A little low, then exactly: rounding must not decide.
      const double least =
          max + std::log(double{params.min_p}) * params.temperature * 1.001 - 1e-3 * std::abs(max);
      candidates_.clear();
      ForEachAtLeast(logits, maxima_, static_cast<float>(least), [&](int32_t id) {
        candidates_.push_back({.key = 0, .weight = weigh(logits[id]), .id = id});
      });
    }
    // The largest weight is 1. Both cuts keep the front of one order, so it does not matter which is first.
    std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < params.min_p || c.weight == 0; });
    return CandidateSum();
  }
  weights_.resize(logits.size());
  sums_.resize(maxima_.size());
  const double total =
      ExpBlocks(logits.data(), Size(logits), max, static_cast<float>(scale), weights_.data(), sums_.data());
  // What top_p drops has at most (1 - p) of the mass. All that is lighter than an equal share of that is
  // dropped therefore, without looking for where exactly the cut falls; the factor is for rounding.
  const double least =
      params.top_p < 1 ? (1.0 - params.top_p) * total / static_cast<double>(logits.size()) * 0.999 : 0.0;
  candidates_.clear();
  for (size_t b = 0; b < sums_.size(); ++b) {
    if (sums_[b] < least) continue;
    const size_t end = std::min(weights_.size(), (b + 1) * kLogitBlock);
    for (size_t i = b * kLogitBlock; i < end; ++i) {
      if (weights_[i] > least) {
        candidates_.push_back({.key = 0, .weight = weights_[i], .id = static_cast<int32_t>(i)});
      }
    }
  }
  return total;
}

double Sampler::CandidateSum() const {
  double sum = 0;
  for (const Candidate& c : candidates_) sum += c.weight;
  return sum;
}

void Sampler::CutByMass(double mass) {
  // One pass finds the bucket of keys that the cut lies in; only what is in there is put in order.
  bucket_mass_.assign(kBuckets, 0.0);
  for (const Candidate& c : candidates_) bucket_mass_[BucketOf(c.key)] += c.weight;
  size_t cut_bucket = 0;
  double running = 0, left = mass;
  for (size_t b = 0; b < kBuckets && running < mass; ++b) {
    if (bucket_mass_[b] == 0) continue;
    cut_bucket = b;
    left = mass - running;  // by rounding more than the last bucket has: then all of it is kept
    running += bucket_mass_[b];
  }
  scratch_.clear();
  for (const Candidate& c : candidates_) {
    if (BucketOf(c.key) == cut_bucket) scratch_.push_back(c);
  }
  // Selection by weight: halves the range that the cut lies in, so the whole is linear.
  auto begin = scratch_.begin(), end = scratch_.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, Before);
    double front = 0;
    for (auto it = begin; it != middle; ++it) front += it->weight;
    if (front >= left) {
      end = middle;
    } else {
      left -= front;
      begin = middle;
    }
  }
  const Candidate cut = *begin;
  std::erase_if(candidates_, [&](const Candidate& c) { return Before(cut, c); });
}

int32_t Sampler::DrawFromCut(std::span<const float> logits, const SamplingParams& params, float max,
                             uint32_t index) {
  const double total = CollectWeights(logits, params, max);
  if (params.top_p < 1) {
    for (Candidate& c : candidates_) c.key = -c.weight;
    CutByMass(params.top_p * total);
  }
  if (params.typical_p < 1) {
    const double sum = CandidateSum(), log_sum = std::log(sum);
    double entropy = 0;
    for (Candidate& c : candidates_) {
      c.key = log_sum - (static_cast<double>(logits[c.id]) - max) / params.temperature;  // -ln q
      entropy += c.weight / sum * c.key;
    }
    for (Candidate& c : candidates_) c.key = std::abs(c.key - entropy);
    CutByMass(params.typical_p * sum);
  }
  double left = SamplingDraw(params.seed, index) * CandidateSum();
  for (const Candidate& c : candidates_) {
    left -= c.weight;
    if (left < 0) return c.id;
  }
  // Rounding may leave a hair over.
  return candidates_.back().id;
}

absl::StatusOr<OutputToken> Sampler::Sample(std::span<float> logits, const SamplingParams& params,
                                            const SampleInput& input) {
  TP_CHECK(input.mask.empty() || input.mask.size() == (logits.size() + 31) / 32);
  TP_RETURN_IF_ERROR(FindMaxima(logits));
  if (Max() == -kInf) return absl::InternalError("the model's logits are all -inf");
  OutputToken out;
  out.index = input.index;
  const bool others = !params.allowed_token_ids.empty() || !params.bad_words.empty() ||
                      !input.banned.empty() || !params.logit_bias.empty() || params.penalises();
  // A constraint alone needs no row of its own where the largest logit is all that is asked for.
  const bool greedy = params.temperature < kGreedyTemperature;
  const bool modified = others || (!input.mask.empty() && !greedy);
  float lse = 0;
  if (input.top_logprobs >= 0) {
    lse = LogSumExp(logits.data(), Size(logits));
    ReadTop(logits, input.top_logprobs, lse, out.top);
    if (modified) raw_.assign(logits.begin(), logits.end());
  }
  const auto nothing = [&] {
    return absl::InvalidArgumentError(
        input.mask.empty()
            ? "allowed_token_ids, bad_words and min_tokens leave no token to draw"
            : "the answer's grammar, allowed_token_ids, bad_words and min_tokens leave no token to draw");
  };
  if (!modified && !input.mask.empty()) {
    out.id = GreedyMasked(logits, input.mask);
    if (out.id < 0) return nothing();
    if (input.top_logprobs >= 0) out.logprob = logits[out.id] - lse;
    return out;
  }
  if (modified) {
    Modify(logits, params, input);
    TP_RETURN_IF_ERROR(FindMaxima(logits));
  }
  const float max = Max();
  if (max == -kInf) return nothing();
  if (greedy) {
    const auto block = std::find(maxima_.begin(), maxima_.end(), max) - maxima_.begin();
    out.id = static_cast<int32_t>(std::find(logits.begin() + block * kLogitBlock, logits.end(), max) -
                                  logits.begin());
  } else if (params.top_k == 0 && params.top_p == 1 && params.min_p == 0 && params.typical_p == 1) {
    out.id = DrawFromAll(logits, params, max, input.index);
  } else {
    out.id = DrawFromCut(logits, params, max, input.index);
  }
  if (input.top_logprobs >= 0) out.logprob = (modified ? raw_[out.id] : logits[out.id]) - lse;
  return out;
}

absl::StatusOr<PromptLogprob> Sampler::Score(std::span<const float> logits, int32_t id, int32_t top) {
  TP_RETURN_IF_ERROR(FindMaxima(logits));
  if (Max() == -kInf) return absl::InternalError("the model's logits are all -inf");
  PromptLogprob out;
  const float lse = LogSumExp(logits.data(), Size(logits)), own = logits[id];
  out.logprob = own - lse;
  for (size_t i = 0; i < logits.size(); ++i) {
    out.rank += logits[i] > own || (logits[i] == own && i < static_cast<size_t>(id)) ? 1u : 0u;
  }
  ReadTop(logits, top, lse, out.top);
  return out;
}

}  // namespace tidepool
