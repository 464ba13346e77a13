#pragma once

#include <cstdint>

#include "kernels/thread_pool.h"

namespace tidepool {

// RmsNorm: y[r,h] = x[r,h] * w[h] / sqrt(mean_h(x[r,h]^2) + eps)
// x, y: [rows, hidden] row-major float32; w: [hidden] float32. y may be x (exactly), not overlap otherwise.
// Accumulates in float32 in 16 fixed lanes and one fixed tree, so a row's bits depend on the row only.
// rows == 0 or hidden == 0 is a no-op. Relative error below 1e-5. Source: arXiv:1910.07467.
void RmsNorm(const float* x, const float* w, int64_t rows, int64_t hidden, float eps, float* y,
             ThreadPool& pool);

// The obvious loops in double.
void RmsNormRef(const float* x, const float* w, int64_t rows, int64_t hidden, float eps, double* y);

}  // namespace tidepool
