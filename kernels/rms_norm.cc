#include "kernels/rms_norm.h"

#include "base/status.h"
#include "kernels/rms_norm_cpu.h"

namespace tidepool {

void RmsNorm(const float* x, const float* w, int64_t rows, int64_t hidden, float eps, float* y,
             ThreadPool& pool) {
  TP_CHECK(rows >= 0 && hidden >= 0);
  if (rows == 0 || hidden == 0) return;
  // About 16 Ki elements a piece: below that a hand-over between threads costs more than the work.
  const int64_t grain = 16384 / hidden + 1;
  pool.ParallelFor(rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) RmsNormRowCpu(x + r * hidden, w, hidden, eps, y + r * hidden);
  });
}

void RmsNormHeads(float* x, int64_t row_stride, int64_t rows, int64_t heads, const float* w, int64_t head_dim,
                  float eps, ThreadPool& pool) {
  TP_CHECK(rows >= 0 && heads >= 0 && head_dim >= 0 && row_stride >= heads * head_dim);
  if (rows == 0 || heads == 0 || head_dim == 0) return;
  const int64_t grain = 16384 / (heads * head_dim) + 1;
  pool.ParallelFor(rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t h = 0; h < heads; ++h) {
        float* head = x + r * row_stride + h * head_dim;
        RmsNormRowCpu(head, w, head_dim, eps, head);
      }
    }
  });
}

}  // namespace tidepool
