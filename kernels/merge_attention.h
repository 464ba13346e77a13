#pragma once

#include <cstdint>

#include "kernels/thread_pool.h"

namespace tidepool {

// MergeAttention: joins attention over two disjoint sets of keys into attention over their union:
//   lse = ln(e^lse_a + e^lse_b),  out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b
// out_*: [rows, dim] float32, lse_*: [rows] natural log (rows counts (query, head) pairs). A part without
// keys has lse = -inf, and its out is ignored (NaN there is harmless); two empty parts give 0 and -inf.
// out and lse may be those of a or b. lse may be null. Exact up to float32 rounding; a row's bits depend
// on that row only. Source: arXiv:2501.01005, section 2.2.
void MergeAttention(const float* out_a, const float* lse_a, const float* out_b, const float* lse_b,
                    int64_t rows, int64_t dim, float* out, float* lse, ThreadPool& pool);

}  // namespace tidepool
