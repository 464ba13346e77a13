#include <cmath>

#include "kernels/rope.h"

namespace tidepool {

void RopeRef(float* x, int64_t row_stride, int heads, int head_dim, std::span<const float> inv_freq,
             double attention_factor, std::span<const int32_t> positions) {
  const size_t half = inv_freq.size();
  for (size_t t = 0; t < positions.size(); ++t) {
    for (int h = 0; h < heads; ++h) {
      float* row = x + static_cast<int64_t>(t) * row_stride + h * head_dim;
      for (size_t i = 0; i < half; ++i) {
        const double angle = static_cast<float>(positions[t]) * inv_freq[i];
        const double cos = std::cos(angle) * attention_factor, sin = std::sin(angle) * attention_factor;
        const double a = row[i], b = row[i + half];
        row[i] = static_cast<float>(a * cos - b * sin);
        row[i + half] = static_cast<float>(b * cos + a * sin);
      }
    }
  }
}

}  // namespace tidepool
