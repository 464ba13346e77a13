#include "kernels/linear_panel.h"

namespace tidepool {
namespace {

struct Isa {
  using X = uint16_t;
  using W = uint16_t;
  static constexpr int kRows = 6;  // 24 accumulators, 4 of the panel, 1 of x: 29 of 32 registers

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
    for (int64_t i = 0; i < k; i += 2) {
      const W* pairs = panel + i * kPanelCols;
      __m512bh w[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) w[c] = (__m512bh)_mm512_loadu_si512(pairs + c * 32);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int pair;
        __builtin_memcpy(&pair, x + r * x_stride + i, sizeof(pair));
        const __m512bh xr = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], xr, w[c]);
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

void RunGemmPanelAvx512Bf16(const GemmPanel& p) { RunPanel<Isa>(p); }

}  // namespace tidepool
