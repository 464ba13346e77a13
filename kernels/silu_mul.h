#pragma once

#include <cstdint>

#include "kernels/thread_pool.h"

namespace tidepool {

// SiluMul: y[t,i] = silu(gate[t,i]) * up[t,i], silu(v) = v / (1 + exp(-v)).
// gate_up: [rows, 2 * inter] float32 row-major, gate first, so that gate and up are one fused Linear;
// y: [rows, inter], must not overlap gate_up. Element-wise: bits depend on the element only. rows == 0 or
// inter == 0 is a no-op. Relative error below 1e-6 plus the underflow of exp. Source: arXiv:2002.05202.
void SiluMul(const float* gate_up, int64_t rows, int64_t inter, float* y, ThreadPool& pool);

// The obvious loops in double.
void SiluMulRef(const float* gate_up, int64_t rows, int64_t inter, double* y);

}  // namespace tidepool
