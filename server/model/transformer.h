#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/block_layout.h"
#include "kernels/kv_write.h"
#include "kernels/numeric_mode.h"
#include "kernels/paged_attention.h"
#include "kernels/rope.h"
#include "kernels/thread_pool.h"
#include "server/model/model_config.h"
#include "server/model/weights.h"

namespace tidepool {

// One sequence's share of a step (View): its rows [first_row, first_row + q_len) of the batch are the
// last q_len of its first `context` tokens.
struct ForwardSequence {
  std::byte* const* blocks = nullptr;  // base of each KV block, ceil(context / block_tokens) entries
  int32_t context = 0;                 // tokens in KV after this step
  int32_t first_row = 0;
  int32_t q_len = 0;
};

// What one step computes (View): a flat batch of T rows, prefill chunks and decodes mixed.
struct ForwardBatch {
  std::span<const int32_t> tokens;     // [T], each in [0, vocab)
  std::span<const int32_t> positions;  // [T], each in [0, max_positions of the transformer)
  std::span<const ForwardSequence> sequences;
  std::span<const int32_t> logit_rows;  // [R] rows in [0, T) whose next-token logits are wanted, R <= T
  // [H] rows in [0, T) whose hidden state after the final norm is wanted, H <= T, and where it goes: float32
  // [H, hidden], row-major.
  std::span<const int32_t> hidden_rows = {};
  float* hidden = nullptr;
  // Called on the caller's thread as soon as the KV of layers [0, n) of all rows is in the blocks, for n = 1,
  // 2,
  // ... layers: they are not written again. Null: nobody asks.
  const std::function<void(uint32_t n)>* on_layer = nullptr;
};

// Workspace: the activations of one Forward at a time, allocated once (Handle). One per engine thread.
class Workspace {
 public:
  // For steps of at most `max_tokens` rows and `max_sequences` sequences (and so as many logit rows).
  Workspace(const ModelSpec& spec, uint32_t max_tokens, uint32_t max_sequences);

  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  size_t bytes() const { return data_.size() * sizeof(float); }

 private:
  friend class Transformer;
  uint32_t max_tokens_, max_sequences_;
  std::vector<float> data_;
  float* x_;        // [T, hidden] residual stream
  float* norm_;     // [T, hidden] normalised, then the output of o and down
  float* qkv_;      // [T, (heads + 2 kv_heads) * head_dim]
  float* attn_;     // [T, heads * head_dim]
  float* gate_up_;  // [T, 2 * intermediate], of the widest layer
  float* act_;      // [T, intermediate]
  float* rows_;     // [R, hidden] gathered for the head
  // Of sparse layers, K experts a token:
  float* router_;                                   // [T, experts]
  float* weights_;                                  // [T, K]
  float* expert_in_;                                // [T * K, hidden]
  float* expert_out_;                               // [T * K, hidden]
  std::vector<int32_t> expert_ids_, expert_place_;  // [T, K]
  std::vector<int32_t> expert_offsets_;             // [experts + 1]
  std::vector<KvSlot> slots_;
  std::vector<AttentionSeq> attention_;
};

// Transformer: a decoder-only transformer with RMSNorm, rotary positions, grouped-query attention and gated
// feed-forward blocks, dense or sparse, computing over paged KV on the CPU. What differs between families
// and between layers comes from ModelSpec: there is one forward pass. Immutable and thread-safe; movable.
//
// Activations are float32 between ops. With kBatchInvariant the logits of a row depend on its own sequence
// only, bit for bit; see numeric_mode.h.
class Transformer {
 public:
  // max_positions: rows of the RoPE tables, [1, spec.max_positions_scaled]; also what rotations that depend
  // on the length are made for (RopeFrequencies).
  static absl::StatusOr<Transformer> Create(const ModelSpec& spec, Weights weights, uint32_t max_positions);

  // Writes the KV of the batch's tokens into the sequences' blocks, which lie as `layout` says
  // (LayoutFor(spec, ...)), logits[i, :] (float32 [R, vocab], row-major) for logit_rows[i], and the hidden
  // states that are wanted. KV of earlier tokens must be in the blocks. Two sequences must not write to one
  // block. Steady state allocates nothing. T == 0 is a no-op.
  // InvalidArgument: a token, position or row out of range, sequences that do not cover the rows, a batch
  // larger than the workspace, another model's layout; KV and logits are then unspecified.
  absl::Status Forward(const ForwardBatch& batch, const BlockLayout& layout, NumericMode mode,
                       ThreadPool& pool, Workspace& ws, float* logits) const;

  const ModelSpec& spec() const { return spec_; }
  uint32_t max_positions() const { return static_cast<uint32_t>(ropes_[0].max_pos()); }
  const Weights& weights() const { return weights_; }

 private:
  // One step as a layer sees it.
  struct Step {
    const ForwardBatch& batch;
    const BlockLayout& layout;
    NumericMode mode;
    ThreadPool& pool;
    Workspace& ws;
    int64_t rows;
  };

  Transformer(const ModelSpec& spec, Weights weights, std::vector<RopeTable> ropes);

  absl::Status CheckBatch(const ForwardBatch& batch, const BlockLayout& layout, const Workspace& ws) const;
  // ws.x_ += what the block gives; through ws.norm_.
  absl::Status AttentionBlock(uint32_t layer, const Step& step) const;
  absl::Status MlpBlock(uint32_t layer, const Step& step) const;
  // ws.norm_ = the chosen experts of ws.norm_.
  absl::Status Experts(uint32_t layer, const Step& step) const;
  // y = mlp(x), m rows.
  absl::Status Mlp(const MlpWeights& mlp, const float* x, int64_t m, float* y, const Step& step) const;

  ModelSpec spec_;
  Weights weights_;
  std::vector<RopeTable> ropes_;
  float embedding_scale_ = 1.0f;
};

}  // namespace tidepool
