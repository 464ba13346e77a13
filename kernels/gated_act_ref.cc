#include <cmath>
#include <numbers>

#include "kernels/gated_act.h"

namespace tidepool {
namespace {

double Gate(GateFunction function, double v) {
  if (function == GateFunction::kSilu) return v / (1.0 + std::exp(-v));
  return 0.5 * v * (1.0 + std::tanh(std::sqrt(2.0 / std::numbers::pi) * (v + 0.044715 * v * v * v)));
}

}  // namespace

void GatedActRef(GateFunction function, const float* gate_up, int64_t rows, int64_t inter, double* y) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* gate = gate_up + r * 2 * inter;
    for (int64_t i = 0; i < inter; ++i) y[r * inter + i] = Gate(function, gate[i]) * gate[inter + i];
  }
}

}  // namespace tidepool
