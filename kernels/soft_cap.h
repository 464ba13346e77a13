#pragma once

#include <cstdint>

#include "kernels/thread_pool.h"

namespace tidepool {

// SoftCap: x[i] = cap * tanh(x[i] / cap) in place, n elements; the result lies in [-cap, cap]. cap > 0.
// Element-wise: bits depend on the element only. n == 0 is a no-op. Relative error below 1e-6.
// Source: arXiv:2408.00118, section 2.
void SoftCap(float* x, int64_t n, float cap, ThreadPool& pool);

// The obvious loop in double.
void SoftCapRef(const float* x, int64_t n, float cap, double* y);

}  // namespace tidepool
