#include "kernels/merge_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/status.h"

namespace tidepool {
namespace {

constexpr float kNoKeys = -std::numeric_limits<float>::infinity();

void MergeRow(const float* a, float lse_a, const float* b, float lse_b, int64_t dim, float* out, float* lse) {
  // A part without keys has no output to speak of (0/0): it is left out, not multiplied by zero.
  if (lse_a == kNoKeys || lse_b == kNoKeys) {
    const float* only = lse_a != kNoKeys ? a : lse_b != kNoKeys ? b : nullptr;
    for (int64_t i = 0; i < dim; ++i) out[i] = only != nullptr ? only[i] : 0.0f;
    if (lse != nullptr) *lse = std::max(lse_a, lse_b);
    return;
  }
  const float m = std::max(lse_a, lse_b);
  const float ea = std::exp(lse_a - m), eb = std::exp(lse_b - m);
  const float wa = ea / (ea + eb), wb = eb / (ea + eb);
  for (int64_t i = 0; i < dim; ++i) out[i] = wa * a[i] + wb * b[i];
  if (lse != nullptr) *lse = m + std::log(ea + eb);
}

}  // namespace

void MergeAttention(const float* out_a, const float* lse_a, const float* out_b, const float* lse_b,
                    int64_t rows, int64_t dim, float* out, float* lse, ThreadPool& pool) {
  TP_CHECK(rows >= 0 && dim >= 0);
  pool.ParallelFor(rows, 16384 / (dim + 1) + 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      MergeRow(out_a + r * dim, lse_a[r], out_b + r * dim, lse_b[r], dim, out + r * dim,
               lse == nullptr ? nullptr : lse + r);
    }
  });
}

}  // namespace tidepool
