#pragma once

#include <cstdint>

namespace tidepool {

// A row of logits [n], float32, seen in blocks of kLogitBlock: what a sampler needs to look at a large
// vocabulary once and at few of its logits twice. The last block may be shorter; there are LogitBlocks(n).
inline constexpr int64_t kLogitBlock = 256;
inline constexpr int64_t LogitBlocks(int64_t n) { return (n + kLogitBlock - 1) / kLogitBlock; }

// maxima[b] = the largest logit of block b (-inf where all are). False where a logit is NaN or +inf: such a
// row has no distribution (maxima are unspecified then). n == 0 is true and writes nothing.
bool BlockMaxima(const float* logits, int64_t n, float* maxima);

// weights[i] = exp((logits[i] - max) * scale), sums[b] = their sum over block b; returns the sum of sums.
// max is the largest logit, finite; scale > 0, finite. float32, relative error below 1e-5 (0
// where the weight is below e^-87); sums in a fixed order. -inf gives 0.
double ExpBlocks(const float* logits, int64_t n, float max, float scale, float* weights, float* sums);

}  // namespace tidepool
