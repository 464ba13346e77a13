#include <cmath>

#include "kernels/rope.h"

namespace tidepool {

void RopeRef(float* x, int64_t row_stride, int heads, int head_dim, double theta,
             std::span<const int32_t> positions) {
  const int half = head_dim / 2;
  for (size_t t = 0; t < positions.size(); ++t) {
    for (int h = 0; h < heads; ++h) {
      float* row = x + static_cast<int64_t>(t) * row_stride + h * head_dim;
      for (int i = 0; i < half; ++i) {
        const double angle = positions[t] / std::pow(theta, 2.0 * i / head_dim);
        const double a = row[i], b = row[i + half];
        row[i] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
        row[i + half] = static_cast<float>(b * std::cos(angle) + a * std::sin(angle));
      }
    }
  }
}

}  // namespace tidepool
