#pragma once

#include <cstdint>

#include "kernels/thread_pool.h"

namespace tidepool {

// What the gate goes through:
//   kSilu      v / (1 + exp(-v))                                             arXiv:2002.05202
//   kGeluTanh  v/2 * (1 + tanh(sqrt(2/pi) * (v + 0.044715 v^3)))             arXiv:1606.08415, section 2
enum class GateFunction : uint8_t { kSilu, kGeluTanh };

// GatedAct: y[t,i] = f(gate[t,i]) * up[t,i].
// gate_up: [rows, 2 * inter] float32 row-major, gate first, so that gate and up are one fused Linear;
// y: [rows, inter], must not overlap gate_up. Element-wise: bits depend on the element only. rows == 0 or
// inter == 0 is a no-op. Error below 1e-6 relative plus, for kSilu, the underflow of exp; for kGeluTanh
// 1e-7 * |gate * up| (1 + tanh cancels where the gate is far below zero, as in every float32 version).
void GatedAct(GateFunction function, const float* gate_up, int64_t rows, int64_t inter, float* y,
              ThreadPool& pool);

// The obvious loops in double.
void GatedActRef(GateFunction function, const float* gate_up, int64_t rows, int64_t inter, double* y);

}  // namespace tidepool
