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

// RmsNormHeads: RmsNorm of each head in place: x[t,h,:] for t < rows, h < heads, over its head_dim elements,
// with one w: [head_dim] for all. Row t starts at x + t * row_stride (elements; >= heads * head_dim), heads
// are dense inside a row: q or k of a fused q|k|v buffer.
void RmsNormHeads(float* x, int64_t row_stride, int64_t rows, int64_t heads, const float* w, int64_t head_dim,
                  float eps, ThreadPool& pool);

// The obvious loops in double.
void RmsNormRef(const float* x, const float* w, int64_t rows, int64_t hidden, float eps, double* y);

}  // namespace tidepool
