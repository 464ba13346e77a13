#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/thread_pool.h"

namespace tidepool {

// RopeTable: cos and sin of position * inv_freq[i], float32 computed from double (immutable, thread-safe,
// movable). Rotary position embedding in the "rotate half" convention of the Hugging Face checkpoints:
// element i is paired with element i + head_dim/2.
//   y[i]       = x[i] * cos - x[i + d/2] * sin
//   y[i + d/2] = x[i + d/2] * cos + x[i] * sin
// Source: arXiv:2104.09864; inv_freq[i] = theta^(-2i/d).
class RopeTable {
 public:
  // head_dim even, >= 2; theta > 0; max_pos in [1, 2^24]. Otherwise InvalidArgument. Positions [0, max_pos).
  static absl::StatusOr<RopeTable> Create(int head_dim, double theta, int64_t max_pos);

  // Frequencies given by the caller (rope scaling): head_dim = 2 * inv_freq.size(). `attention_factor`
  // multiplies cos and sin (YaRN; 1 otherwise).
  static absl::StatusOr<RopeTable> CreateFromInvFreq(std::span<const double> inv_freq, int64_t max_pos,
                                                     double attention_factor = 1.0);

  int head_dim() const { return 2 * half_; }
  int64_t max_pos() const { return max_pos_; }

  // Rotates in place x[t, h, :] for t < positions.size(), h < heads. Row t starts at x + t * row_stride
  // (elements; >= heads * head_dim), heads are dense inside a row: q and k may be parts of one fused
  // q|k|v buffer. InvalidArgument (and x untouched) where a position is outside [0, max_pos).
  absl::Status Apply(float* x, int64_t row_stride, int heads, std::span<const int32_t> positions,
                     ThreadPool& pool) const;

 private:
  RopeTable(int half, int64_t max_pos) : half_(half), max_pos_(max_pos) {}

  int half_;
  int64_t max_pos_;
  std::vector<float> cos_sin_;  // [max_pos][cos: half_ | sin: half_]
};

// The obvious loops in double, from theta alone.
void RopeRef(float* x, int64_t row_stride, int heads, int head_dim, double theta,
             std::span<const int32_t> positions);

}  // namespace tidepool
