#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "server/engine/token_counts.h"
#include "server/engine/types.h"

namespace tidepool {

// Uniform in [0, 1), a pure function of its arguments: the draw for output `index` of a request.
double SamplingDraw(uint64_t seed, uint32_t index);

// What a draw looks at beside the logits and the request's SamplingParams (View).
struct SampleInput {
  uint32_t index = 0;                // of the output, from 0
  std::span<const int32_t> outputs;  // the answer so far, for bad_words
  // The prompt and the answer so far; not null where SamplingParams::penalises(). The prompt may be left
  // out of it where repetition_penalty is 1.
  const TokenCounts* counts = nullptr;
  std::span<const int32_t> banned;  // not to be drawn now: stop tokens before min_tokens
  // What the request's constraint allows now, stop tokens included: bit i % 32 of mask[i / 32] for token i,
  // ceil(vocab / 32) words. Empty: there is none.
  std::span<const uint32_t> mask = {};
  int32_t top_logprobs = -1;  // as SequenceSpec::top_logprobs
};

// Sampler: next token from logits. Holds scratch only, so equal arguments give equal results whatever was
// drawn before; that grows to the vocabulary's size and is kept: steps allocate nothing. Not thread-safe.
//
// Definitions and order are those of vLLM's V1 sampler (vllm/v1/sample/sampler.py), with typical_p, which
// vLLM does not have, where transformers' generate() has it: last. l: logits, one row.
//
//    1. logprobs     log_softmax(l) as the model gave it: nothing below changes what is reported
//    2. allowed      l[i] = -inf for i outside allowed_token_ids, where there are any
//    3. constraint   l[i] = -inf where bit i of `mask` is not set, where there is a mask
//    4. bad words    l[w_n] = -inf where the answer so far ends with w_1 .. w_n-1 of a bad word w
//    5. min_tokens   l[i] = -inf for i in `banned`
//    6. logit bias   l[i] += bias[i]
//    7. penalties    of tokens in prompt or answer: l = l / r where l > 0, else l * r (arXiv:1909.05858);
//                    then of tokens in the answer: l -= frequency * count + presence (OpenAI's API)
//    8. greedy       temperature < 1e-5: the largest l, of equals the lowest id; the rest does not apply
//    9. temperature  weights w = exp((l - max l) / temperature)
//   10. min_p        drop w < min_p * max w (arXiv:2407.01082)
//   11. top_k        keep the k largest w
//   12. top_p        keep the fewest of the largest whose sum reaches p times what is left (arXiv:1904.09751)
//   13. typical_p    with q = w / sum w and H = -sum q ln q: keep the fewest with the smallest |-ln q - H|
//                    whose q sum up to typical_p (arXiv:2202.00666)
//   14. draw         u = SamplingDraw(seed, index): in the order of ids, the first whose running sum of
//                    weights exceeds u times their sum
//
// Each of 10 to 13 keeps at least one token; where weights (or distances in 13) are equal, the lower id comes
// first. Cuts are exact: no approximation of a nucleus by a threshold. Time is linear in the vocabulary, and
// where a cut leaves few tokens only those are looked at twice.
class Sampler {
 public:
  // `logits`: one row [vocab], float32; overwritten. Ids in `params` and `input` are in [0, vocab).
  // Internal: a NaN or +inf logit, or only -inf. InvalidArgument: steps 2 to 5 leave nothing to draw. The
  // sequence cannot go on then.
  absl::StatusOr<OutputToken> Sample(std::span<float> logits, const SamplingParams& params,
                                     const SampleInput& input);

  // Logprob and rank of `id` in [0, vocab), and the `top` likeliest, of a row as the model gave it.
  // Internal: a NaN or +inf logit, or only -inf.
  absl::StatusOr<PromptLogprob> Score(std::span<const float> logits, int32_t id, int32_t top);

 private:
  // Ordered by (key, id) rising; the key is what the cut at hand goes by.
  struct Candidate {
    double key;
    double weight;
    int32_t id;
  };
  static bool Before(const Candidate& a, const Candidate& b) {
    return a.key != b.key ? a.key < b.key : a.id < b.id;
  }

  absl::Status FindMaxima(std::span<const float> logits);
  float Max() const;
  // The largest logit whose bit is set, of equals the lowest id; -1: none is above -inf. Needs FindMaxima.
  int32_t GreedyMasked(std::span<const float> logits, std::span<const uint32_t> mask) const;
  void Modify(std::span<float> logits, const SamplingParams& params, const SampleInput& input);
  // candidates_ = the `k` largest logits, k <= vocab, unordered; the key is minus the logit.
  void CollectTop(std::span<const float> logits, size_t k);
  void ReadTop(std::span<const float> logits, int32_t count, float lse, TopLogprobs& out);
  int32_t DrawFromAll(std::span<const float> logits, const SamplingParams& params, float max, uint32_t index);
  int32_t DrawFromCut(std::span<const float> logits, const SamplingParams& params, float max, uint32_t index);
  // candidates_ = what min_p and top_k leave (less some of what top_p is sure to drop), rising ids, with
  // their weights; returns the sum of all that min_p and top_k leave.
  double CollectWeights(std::span<const float> logits, const SamplingParams& params, float max);
  double CandidateSum() const;
  // Keeps the candidates up to the one, in order, with which the sum of weights reaches `mass`; the order of
  // ids stays.
  void CutByMass(double mass);

  std::vector<float> maxima_;  // of each block of the row
  std::vector<float> scratch_maxima_;
  std::vector<float> raw_;      // the row as it came, where it is modified and reported
  std::vector<float> allowed_;  // logits of allowed_token_ids
  std::vector<float> weights_, sums_;
  std::vector<Candidate> candidates_, scratch_;
  std::vector<double> bucket_mass_;
};

}  // namespace tidepool
