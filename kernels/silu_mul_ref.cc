#include <cmath>

#include "kernels/silu_mul.h"

namespace tidepool {

void SiluMulRef(const float* gate_up, int64_t rows, int64_t inter, double* y) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* gate = gate_up + r * 2 * inter;
    for (int64_t i = 0; i < inter; ++i) {
      y[r * inter + i] = gate[i] / (1.0 + std::exp(-double{gate[i]})) * gate[inter + i];
    }
  }
}

}  // namespace tidepool
