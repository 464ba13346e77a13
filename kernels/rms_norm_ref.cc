#include <cmath>

#include "kernels/rms_norm.h"

namespace tidepool {

void RmsNormRef(const float* x, const float* w, int64_t rows, int64_t hidden, float eps, double* y) {
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < hidden; ++i) sum += double{x[r * hidden + i]} * x[r * hidden + i];
    const double scale = 1.0 / std::sqrt(sum / static_cast<double>(hidden) + eps);
    for (int64_t i = 0; i < hidden; ++i) y[r * hidden + i] = x[r * hidden + i] * scale * w[i];
  }
}

}  // namespace tidepool
