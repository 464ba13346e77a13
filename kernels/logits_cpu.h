#pragma once

#include <cstdint>

namespace tidepool {

// Pieces of logits.h; internal.
// Largest of a row, NaN and an empty row counting as -inf.
float MaxCpu(const float* x, int64_t n);
// sum_i exp(x[i] - max) in double, in a fixed order.
double SumExpCpu(const float* x, int64_t n, float max);

}  // namespace tidepool
