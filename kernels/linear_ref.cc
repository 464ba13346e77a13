#include "base/dtype.h"
#include "kernels/linear.h"

namespace tidepool {

void LinearRef(const float* x, int64_t m, const float* w, int64_t n, int64_t k, const float* bias,
               bool round_x, double* y) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias != nullptr ? bias[j] : 0.0;
      for (int64_t l = 0; l < k; ++l) {
        const float v = round_x ? ToFloat(ToBF16(x[i * k + l])) : x[i * k + l];
        sum += double{v} * w[j * k + l];
      }
      y[i * n + j] = sum;
    }
  }
}

}  // namespace tidepool
