#include "kernels/linear_panel.h"

namespace tidepool {
namespace {

struct Isa {
  using X = float;
  using W = float;
  static constexpr int kRows = 6;

  template <int R>
  TP_INLINE void Tile(const X* x, int64_t x_stride, const W* panel, int64_t k, bool carry, float* y,
                      int64_t y_stride) {
    __m512 acc[R][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        acc[r][c] = carry ? _mm512_loadu_ps(y + r * y_stride + c * 16) : _mm512_setzero_ps();
      }
    }
    for (int64_t i = 0; i < k; ++i) {
      const W* row = panel + i * kPanelCols;
      __m512 w[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) w[c] = _mm512_loadu_ps(row + c * 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 xr = _mm512_set1_ps(x[r * x_stride + i]);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_fmadd_ps(xr, w[c], acc[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) _mm512_storeu_ps(y + r * y_stride + c * 16, acc[r][c]);
    }
  }
};

}  // namespace

void RunGemmPanelAvx512F32(const GemmPanel& p) { RunPanel<Isa>(p); }

}  // namespace tidepool
