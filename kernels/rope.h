#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/thread_pool.h"

namespace tidepool {

// RopeTable: cos and sin of the angles position * inv_freq[i] (immutable, thread-safe, movable). Rotary
// position embedding in the "rotate half" convention of the Hugging Face checkpoints: of the first
// rotary_dim = 2 * inv_freq.size() elements of a head, element i is paired with element i + rotary_dim/2;
// the rest of the head stays.
//   y[i]       = x[i] * cos - x[i + r/2] * sin
//   y[i + r/2] = x[i + r/2] * cos + x[i] * sin
// An angle is rounded to float32, as the reference implementations have it (`transformers`, vLLM): exact
// angles would differ from theirs by up to position * inv_freq * 2^-24. cos and sin of it are computed in
// double and rounded once. Source: arXiv:2104.09864.
class RopeTable {
 public:
  // Positions [0, max_pos), of heads of head_dim elements. `attention_factor` multiplies cos and sin (YaRN;
  // 1 otherwise). InvalidArgument: no frequency, more than head_dim / 2 of them, max_pos outside
  // [1, 2^24].
  static absl::StatusOr<RopeTable> Create(std::span<const float> inv_freq, int head_dim, int64_t max_pos,
                                          double attention_factor = 1.0);

  int head_dim() const { return head_dim_; }
  int rotary_dim() const { return 2 * half_; }
  int64_t max_pos() const { return max_pos_; }

  // Rotates in place x[t, h, :] for t < positions.size(), h < heads. Row t starts at x + t * row_stride
  // (elements; >= heads * head_dim), heads are dense inside a row: q and k may be parts of one fused
  // q|k|v buffer. InvalidArgument (and x untouched) where a position is outside [0, max_pos).
  absl::Status Apply(float* x, int64_t row_stride, int heads, std::span<const int32_t> positions,
                     ThreadPool& pool) const;

 private:
  RopeTable(int half, int head_dim, int64_t max_pos) : half_(half), head_dim_(head_dim), max_pos_(max_pos) {}

  int half_;
  int head_dim_;
  int64_t max_pos_;
  std::vector<float> cos_sin_;  // [max_pos][cos: half_ | sin: half_]
};

// The obvious loops in double, from the float32 angles on.
void RopeRef(float* x, int64_t row_stride, int heads, int head_dim, std::span<const float> inv_freq,
             double attention_factor, std::span<const int32_t> positions);

}  // namespace tidepool
