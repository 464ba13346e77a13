#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace tidepool {

inline constexpr int kTopLogprobsMax = 20;

struct TokenLogprob {
  int32_t id = 0;
  float logprob = 0;
  bool operator==(const TokenLogprob&) const = default;
};

// Index of the largest logit; the lowest index wins a tie. NaN never wins; -1 where n == 0 or all are NaN.
int32_t Argmax(const float* logits, int64_t n);

// ln sum_i exp(logits[i]) of a row [n], float32 (double accumulation in a fixed order): subtract it from a
// logit to have its log-probability. -inf where n == 0 or all are -inf; NaN where one is NaN.
float LogSumExp(const float* logits, int64_t n);

// Log-probabilities of one row [n]: chosen[i] = log_softmax(logits)[ids[i]], and top = the top.size()
// largest in falling order (ties: lower id first). InvalidArgument: an id outside [0, n), top.size() above
// kTopLogprobsMax or n, chosen.size() != ids.size(), a NaN logit (outputs untouched).
absl::Status Logprobs(const float* logits, int64_t n, std::span<const int32_t> ids, std::span<float> chosen,
                      std::span<TokenLogprob> top);

}  // namespace tidepool
