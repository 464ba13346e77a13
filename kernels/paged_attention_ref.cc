#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/kv_write.h"
#include "kernels/paged_attention.h"

namespace tidepool {

void PagedAttentionRef(const BlockLayout& layout, uint32_t layer, std::span<const AttentionSeq> seqs,
                       const float* q, int64_t q_row_stride, int heads, const AttentionOptions& options,
                       double* out, double* lse) {
  const int dim = static_cast<int>(layout.head_dim);
  const int group = heads / static_cast<int>(layout.kv_heads);
  std::vector<float> row(layout.head_dim);
  for (const AttentionSeq& seq : seqs) {
    for (int i = 0; i < seq.q_len; ++i) {
      const int keys = seq.context - seq.q_len + i + 1;
      for (int h = 0; h < heads; ++h) {
        const uint32_t kv_head = static_cast<uint32_t>(h / group);
        const float* query = q + (seq.q_start + i) * q_row_stride + h * dim;
        const auto read = [&](bool v, int j) {
          const uint32_t token = static_cast<uint32_t>(j);
          KvRead(layout, layer, v, kv_head, seq.blocks[token / layout.block_tokens],
                 token % layout.block_tokens, row.data());
        };
        std::vector<double> s(static_cast<size_t>(keys));
        const int first = options.window > 0 ? std::max(0, keys - options.window) : 0;
        double max = -INFINITY, sum = 0;
        for (int j = first; j < keys; ++j) {
          read(false, j);
          double dot = 0;
          for (int d = 0; d < dim; ++d) dot += double{query[d]} * row[static_cast<size_t>(d)];
          double& score = s[static_cast<size_t>(j)];
          score = dot * options.scale;
          if (options.softcap > 0) score = options.softcap * std::tanh(score / options.softcap);
          max = std::max(max, score);
        }
        for (int j = first; j < keys; ++j) {
          double& v = s[static_cast<size_t>(j)];
          sum += v = std::exp(v - max);
        }
        double* o = out + (int64_t{seq.q_start} + i) * heads * dim + h * dim;
        for (int d = 0; d < dim; ++d) o[d] = 0;
        for (int j = first; j < keys; ++j) {
          read(true, j);
          for (int d = 0; d < dim; ++d) o[d] += s[static_cast<size_t>(j)] / sum * row[static_cast<size_t>(d)];
        }
        if (lse != nullptr) lse[(int64_t{seq.q_start} + i) * heads + h] = max + std::log(sum);
      }
    }
  }
}

}  // namespace tidepool
