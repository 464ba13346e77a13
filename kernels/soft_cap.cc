#include "kernels/soft_cap.h"

#include <cmath>

#include "base/status.h"
#include "kernels/soft_cap_cpu.h"

namespace tidepool {

void SoftCap(float* x, int64_t n, float cap, ThreadPool& pool) {
  TP_CHECK(n >= 0 && cap > 0);
  pool.ParallelFor(n, 16384,
                   [&](int64_t begin, int64_t end, int) { SoftCapCpu(x + begin, end - begin, cap); });
}

void SoftCapRef(const float* x, int64_t n, float cap, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = cap * std::tanh(double{x[i]} / cap);
}

}  // namespace tidepool
