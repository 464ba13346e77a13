#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/engine/types.h"

namespace tidepool {

// Uniform in [0, 1), a pure function of its arguments: the draw for output `index` of a request.
double SamplingDraw(uint64_t seed, uint32_t index);

// Sampler: next token from logits. Holds scratch only, so equal arguments give equal results whatever was
// drawn before. Not thread-safe.
class Sampler {
 public:
  // `logits`: one row [vocab], float32; overwritten. `banned` ids in [0, vocab) are not drawn.
  //
  // Log-probabilities are those of log_softmax(logits) as they came, before bans, temperature and cuts.
  // The draw: ids are weighed w = exp((logit - max) / temperature); min_p drops w < min_p * max w; top_k
  // keeps the k largest, top_p then the fewest of the largest whose sum reaches p of what is left (at least
  // one); equal weights rank by id. Of those, one is drawn by its share, with SamplingDraw(seed, index).
  // temperature == 0: the largest logit, the lowest id of equals.
  //
  // Internal: a NaN or +inf logit, or nothing left to draw; the sequence cannot go on.
  absl::StatusOr<OutputToken> Sample(std::span<float> logits, const SamplingParams& params, uint32_t index,
                                     std::span<const int32_t> banned, int32_t top_logprobs);

 private:
  struct Candidate {
    double weight;
    int32_t id;
  };

  absl::StatusOr<int32_t> Draw(std::span<const float> logits, const SamplingParams& params, uint32_t index);

  std::vector<Candidate> candidates_;
};

}  // namespace tidepool
