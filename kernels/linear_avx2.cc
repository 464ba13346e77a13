#include "kernels/linear_panel.h"

namespace tidepool {
namespace {

struct Isa {
  using X = float;
  using W = float;
  static constexpr int kRows = 6;

  // Sixteen registers: a single row takes all 64 columns at once (8 accumulators), several rows take 16
  // columns at a time (12 accumulators, 2 of the panel, 1 of x).
  template <int R>
  TP_INLINE void Tile(const X* x, int64_t x_stride, const W* panel, int64_t k, bool carry, float* y,
                      int64_t y_stride) {
    constexpr int kVectors = R == 1 ? 8 : 2;
    for (int c0 = 0; c0 < kPanelCols; c0 += kVectors * 8) {
      __m256 acc[R][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) {
          acc[r][c] = carry ? _mm256_loadu_ps(y + r * y_stride + c0 + c * 8) : _mm256_setzero_ps();
        }
      }
      for (int64_t i = 0; i < k; ++i) {
        const W* row = panel + i * kPanelCols + c0;
        __m256 w[kVectors];
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) w[c] = _mm256_loadu_ps(row + c * 8);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m256 xr = _mm256_set1_ps(x[r * x_stride + i]);
#pragma GCC unroll 8
          for (int c = 0; c < kVectors; ++c) acc[r][c] = _mm256_fmadd_ps(xr, w[c], acc[r][c]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) _mm256_storeu_ps(y + r * y_stride + c0 + c * 8, acc[r][c]);
      }
    }
  }
};

}  // namespace

void RunGemmPanelAvx2F32(const GemmPanel& p) { RunPanel<Isa>(p); }

}  // namespace tidepool
