// Internal to linear: the packed format and the GEMM kernels over it. Plain data only (see simd.h).
#pragma once

#include <cstdint>

namespace tidepool {

// Packed weights: panels of 64 columns (rows of W), each contiguous, columns past n zero.
//   bf16: [k/2][64][2]   k rounded up to 32: the pairs that one bf16 dot product takes
//   f32:  [k][64]        k rounded up to 16
// These are oneDNN's blocked formats BA16a64b2a and BA16a64b of a [k,n] matrix, so that oneDNN and the
// kernels below read the same copy.
inline constexpr int kPanelCols = 64;

// One panel times m rows: y[r][c] = bias[c] + sum_k x[r][k] * panel[k][c], r < m, c < cols.
struct GemmPanel {
  const void* x = nullptr;  // bf16 (padded with zeros to the panel's k) or float32
  int64_t x_stride = 0;     // elements
  const void* panel = nullptr;
  int64_t k = 0;  // bf16: even; f32: any
  float* y = nullptr;
  int64_t y_stride = 0;  // elements
  int64_t m = 0;
  int cols = 0;                 // [1, 64]
  const float* bias = nullptr;  // [64] or null
};

// Each output is one chain of fused multiply-adds over k in rising order, then + bias: the same bits
// whatever m, and whichever rows it is computed with.
void RunGemmPanelAvx2F32(const GemmPanel& p);
void RunGemmPanelAvx512F32(const GemmPanel& p);
void RunGemmPanelAvx512Bf16(const GemmPanel& p);

}  // namespace tidepool
