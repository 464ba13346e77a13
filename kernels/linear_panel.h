// Internal: the loop around a register tile, included once by each instruction set's file. That file
// defines a struct Isa with
//   kRows                     most rows of a register tile
//   kSteps                    k elements in one step of Tile
//   Tile<R>(x, x_stride, panel, k, carry, y, y_stride): R rows x 64 columns over k elements;
//                             starts from y where carry, else from zero
//   typename X, typename W    element types of x and the panel
#pragma once

#include "kernels/linear_cpu.h"
#include "kernels/simd.h"

namespace tidepool {
namespace {

// k elements of a panel that are walked for all rows before the next: 64 columns of them stay in L2.
inline constexpr int64_t kDepth = 1024;

template <typename Isa, int R>
void TileOf(int rows, const typename Isa::X* x, int64_t x_stride, const typename Isa::W* panel, int64_t k,
            bool carry, float* y, int64_t y_stride) {
  if constexpr (R > 1) {
    if (rows != R) return TileOf<Isa, R - 1>(rows, x, x_stride, panel, k, carry, y, y_stride);
  }
  Isa::template Tile<R>(x, x_stride, panel, k, carry, y, y_stride);
}

template <typename Isa>
void RunPanel(const GemmPanel& p) {
  const auto* x = static_cast<const typename Isa::X*>(p.x);
  const auto* panel = static_cast<const typename Isa::W*>(p.panel);
  // Tiles of nearly equal height: 7 rows are 4 + 3 rather than 6 + 1.
  const int64_t tiles = (p.m + Isa::kRows - 1) / Isa::kRows;
  // The float32 partial sums wait in y between two depths, which changes no bit of them.
  const int64_t depth = tiles == 1 || p.cols < kPanelCols ? p.k : kDepth;
  for (int64_t k0 = 0; k0 < p.k; k0 += depth) {
    const int64_t k = p.k - k0 < depth ? p.k - k0 : depth;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t r0 = p.m * i / tiles;
      const int rows = static_cast<int>(p.m * (i + 1) / tiles - r0);
      const auto* rows_x = x + r0 * p.x_stride + k0;
      const auto* rows_w = panel + k0 * kPanelCols;
      float* rows_y = p.y + r0 * p.y_stride;
      if (p.cols == kPanelCols) {
        TileOf<Isa, Isa::kRows>(rows, rows_x, p.x_stride, rows_w, k, k0 != 0, rows_y, p.y_stride);
      } else {
        float full[Isa::kRows * kPanelCols];
        TileOf<Isa, Isa::kRows>(rows, rows_x, p.x_stride, rows_w, k, false, full, kPanelCols);
        for (int r = 0; r < rows; ++r) {
          for (int c = 0; c < p.cols; ++c) rows_y[r * p.y_stride + c] = full[r * kPanelCols + c];
        }
      }
    }
  }
  if (p.bias == nullptr) return;
  for (int64_t r = 0; r < p.m; ++r) {
    for (int c = 0; c < p.cols; ++c) p.y[r * p.y_stride + c] += p.bias[c];
  }
}

}  // namespace
}  // namespace tidepool
