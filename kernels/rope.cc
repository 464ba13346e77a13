#include "kernels/rope.h"

#include <cmath>
#include <string>

namespace tidepool {

absl::StatusOr<RopeTable> RopeTable::Create(std::span<const float> inv_freq, int head_dim, int64_t max_pos,
                                            double attention_factor) {
  if (inv_freq.empty() || head_dim < 2 || inv_freq.size() > static_cast<size_t>(head_dim) / 2) {
    return absl::InvalidArgumentError("rope has " + std::to_string(inv_freq.size()) +
                                      " frequencies for heads of " + std::to_string(head_dim) +
                                      " elements; it must be at least one, and one for two elements at most");
  }
  if (max_pos < 1 || max_pos > (int64_t{1} << 24)) {
    return absl::InvalidArgumentError("rope max_pos is " + std::to_string(max_pos) +
                                      "; it must be in [1, 16777216]");
  }
  const size_t half = inv_freq.size();
  RopeTable table(static_cast<int>(half), head_dim, max_pos);
  table.cos_sin_.resize(static_cast<size_t>(max_pos) * 2 * half);
  for (int64_t pos = 0; pos < max_pos; ++pos) {
    float* row = table.cos_sin_.data() + static_cast<size_t>(pos) * 2 * half;
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<float>(pos) * inv_freq[i];
      row[i] = static_cast<float>(std::cos(angle) * attention_factor);
      row[half + i] = static_cast<float>(std::sin(angle) * attention_factor);
    }
  }
  return table;
}

absl::Status RopeTable::Apply(float* x, int64_t row_stride, int heads, std::span<const int32_t> positions,
                              ThreadPool& pool) const {
  for (const int32_t pos : positions) {
    if (pos < 0 || pos >= max_pos_) {
      return absl::InvalidArgumentError("position " + std::to_string(pos) + " is outside the model's [0, " +
                                        std::to_string(max_pos_) + "); send a shorter prompt");
    }
  }
  const int64_t half = half_, dim = head_dim_;
  if (heads < 0 || row_stride < heads * dim) {
    return absl::InvalidArgumentError("rope row_stride is " + std::to_string(row_stride) + ", below " +
                                      std::to_string(heads) + " heads of " + std::to_string(dim));
  }
  const int64_t grain = 16384 / (heads * dim + 1) + 1;
  pool.ParallelFor(static_cast<int64_t>(positions.size()), grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const float* __restrict cos = cos_sin_.data() + positions[static_cast<size_t>(t)] * 2 * half;
      const float* __restrict sin = cos + half;
      for (int h = 0; h < heads; ++h) {
        float* __restrict lo = x + t * row_stride + h * dim;
        float* __restrict hi = lo + half;
        // Plain loop: the compiler vectorises it, and element-wise arithmetic has one order only.
        for (int64_t i = 0; i < half; ++i) {
          const float a = lo[i], b = hi[i];
          lo[i] = a * cos[i] - b * sin[i];
          hi[i] = b * cos[i] + a * sin[i];
        }
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace tidepool
