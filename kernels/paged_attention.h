#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "base/block_layout.h"
#include "kernels/numeric_mode.h"
#include "kernels/thread_pool.h"

namespace tidepool {

// One sequence's share of a batch: q_len consecutive queries over `context` keys (View).
struct AttentionSeq {
  const std::byte* const* blocks = nullptr;  // base of each block, ceil(context / block_tokens) entries
  int32_t context = 0;                       // keys visible to the last query of this sequence
  int32_t q_start = 0;                       // first row in q and out
  int32_t q_len = 0;                         // query i sees keys [0, context - q_len + i]; 0: skipped
};

// What scores go through, and which keys count.
struct AttentionOptions {
  float scale = 1.0f;
  int32_t window = 0;    // >= 0; a query sees this many keys at most, its own included; 0: all before it
  float softcap = 0.0f;  // >= 0; scores become softcap * tanh(score / softcap); 0: none
};

// PagedAttention: causal attention of q over paged KV, grouped-query heads (query head h reads kv head
// h / (heads / kv_heads)):
//   out[r, h, :] = sum_j softmax_j(s_j) V[j,h',:],  lse[r,h] = ln sum_j exp(s_j),
//   s_j = cap(scale * q[r,h,:]·K[j,h',:]),  j in the query's window
// (window: arXiv:2004.05150; cap: arXiv:2408.00118)
//
// q: float32, row r at q + r * q_row_stride elements (>= heads * head_dim, heads dense inside a row: q may
// be part of a fused q|k|v buffer); out: [rows, heads, head_dim] dense, must not overlap q; lse:
// [rows, heads] or null, natural log. Rows of no sequence are left alone. Prefill (q_len > 1) and decode
// (q_len == 1) sequences may be mixed; each sequence's K and V up to `context` were written before
// (KvWrite). Keys past a query's horizon or before its window are never read into its result: garbage there
// is harmless, and blocks that lie wholly before every query's window are not read at all.
//
// One pass over the blocks with a running maximum (online softmax, arXiv:2205.14135), one tile per block,
// in the order of the keys. The arithmetic of one (query, head) depends on its own query and keys only,
// so kBatchInvariant results are bitwise equal for any batch, chunking and thread count. kFast does the
// same, except that a long decode context may be split over threads and merged (merge_attention.h) when
// there are fewer (sequence, kv head) pairs than threads.
// Error against double below 1e-5 * max |V| (KV as stored).
//
// InvalidArgument: layer out of range, heads not a multiple of kv_heads, dtype other than bf16 and
// float32, context < q_len, negative lengths, window or cap, a null block.
absl::Status PagedAttention(const BlockLayout& layout, uint32_t layer, std::span<const AttentionSeq> seqs,
                            const float* q, int64_t q_row_stride, int heads, const AttentionOptions& options,
                            float* out, float* lse, NumericMode mode, ThreadPool& pool);

// The obvious loops in double over the same arguments; lse may be null.
void PagedAttentionRef(const BlockLayout& layout, uint32_t layer, std::span<const AttentionSeq> seqs,
                       const float* q, int64_t q_row_stride, int heads, const AttentionOptions& options,
                       double* out, double* lse);

}  // namespace tidepool
