#include "server/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/embedding.h"
#include "kernels/gated_act.h"
#include "kernels/moe.h"
#include "kernels/rms_norm.h"
#include "kernels/soft_cap.h"

namespace tidepool {
namespace {

constexpr size_t kAlignFloats = 16;  // of each buffer's start: one cache line

size_t RoundUp(size_t n) { return (n + kAlignFloats - 1) / kAlignFloats * kAlignFloats; }

// x += y, n elements. Below the grain it is not worth waking a thread.
void AddInto(float* x, const float* y, int64_t n, ThreadPool& pool) {
  pool.ParallelFor(n, 16384, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) x[i] += y[i];
  });
}

}  // namespace

Workspace::Workspace(const ModelSpec& spec, uint32_t max_tokens, uint32_t max_sequences)
    : max_tokens_(max_tokens), max_sequences_(max_sequences) {
  size_t inter = 0, experts = 0, chosen = 0;
  for (const LayerSpec& l : spec.layer_specs) {
    inter = std::max<size_t>(inter, l.intermediate);
    experts = std::max<size_t>(experts, l.experts);
    chosen = std::max<size_t>(chosen, l.experts_per_token);
  }
  const size_t t = max_tokens, q = size_t{spec.heads} * spec.head_dim,
               kv = size_t{spec.kv_heads} * spec.head_dim, hidden = spec.hidden;
  const size_t sizes[] = {
      RoundUp(t * hidden),    RoundUp(t * hidden),          RoundUp(t * (q + 2 * kv)),   RoundUp(t * q),
      RoundUp(t * 2 * inter), RoundUp(t * inter),           RoundUp(t * hidden),         RoundUp(t * experts),
      RoundUp(t * chosen),    RoundUp(t * chosen * hidden), RoundUp(t * chosen * hidden)};
  size_t total = kAlignFloats;
  for (size_t n : sizes) total += n;
  data_.resize(total);
  const size_t misaligned = reinterpret_cast<uintptr_t>(data_.data()) / sizeof(float) % kAlignFloats;
  float* p = data_.data() + (misaligned == 0 ? 0 : kAlignFloats - misaligned);
  float** const buffers[] = {&x_,    &norm_,   &qkv_,     &attn_,      &gate_up_,   &act_,
                             &rows_, &router_, &weights_, &expert_in_, &expert_out_};
  static_assert(std::size(buffers) == std::size(sizes));
  for (size_t i = 0; i < std::size(sizes); ++i) {
    *buffers[i] = p;
    p += sizes[i];
  }
  slots_.reserve(max_tokens);
  attention_.reserve(max_sequences);
  expert_ids_.resize(t * chosen);
  expert_place_.resize(t * chosen);
  expert_offsets_.resize(experts + 1);
}

Transformer::Transformer(const ModelSpec& spec, Weights weights, std::vector<RopeTable> ropes)
    : spec_(spec), weights_(std::move(weights)), ropes_(std::move(ropes)) {
  if (!spec_.architecture->scale_embeddings) return;
  // The families that do this round the factor to the type they compute in (transformers, Gemma*Model).
  const float scale = std::sqrt(static_cast<float>(spec_.hidden));
  embedding_scale_ = weights_.dtype == DType::kBF16 ? ToFloat(ToBF16(scale)) : scale;
}

absl::StatusOr<Transformer> Transformer::Create(const ModelSpec& spec, Weights weights,
                                                uint32_t max_positions) {
  std::vector<RopeTable> ropes;
  for (const RopeSpec& r : spec.ropes) {
    TP_ASSIGN_OR_RETURN(RopeTable table,
                        RopeTable::Create(RopeFrequencies(r, max_positions), static_cast<int>(spec.head_dim),
                                          max_positions, r.attention_factor));
    ropes.push_back(std::move(table));
  }
  return Transformer(spec, std::move(weights), std::move(ropes));
}

absl::Status Transformer::CheckBatch(const ForwardBatch& batch, const BlockLayout& layout,
                                     const Workspace& ws) const {
  const size_t rows = batch.tokens.size();
  if (batch.positions.size() != rows || rows > ws.max_tokens_ || batch.sequences.size() > ws.max_sequences_ ||
      batch.logit_rows.size() > rows || batch.hidden_rows.size() > rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("a step of ", rows, " tokens, ", batch.positions.size(), " positions, ",
                     batch.sequences.size(), " sequences, ", batch.logit_rows.size(), " logit rows and ",
                     batch.hidden_rows.size(), " hidden rows; the workspace holds ", ws.max_tokens_,
                     " tokens and ", ws.max_sequences_, " sequences"));
  }
  if (layout != LayoutFor(spec_, layout.block_tokens, layout.dtype) || layout.block_tokens == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("block layout ", layout.ToString(), " is not the model's"));
  }
  for (int32_t t : batch.tokens) {
    if (t < 0 || static_cast<uint32_t>(t) >= spec_.vocab) {
      return absl::InvalidArgumentError(absl::StrCat("token ", t, " is not in [0, ", spec_.vocab, ")"));
    }
  }
  for (int32_t r : batch.logit_rows) {
    if (r < 0 || static_cast<size_t>(r) >= rows) {
      return absl::InvalidArgumentError(absl::StrCat("logit row ", r, " is not in [0, ", rows, ")"));
    }
  }
  for (int32_t r : batch.hidden_rows) {
    if (r < 0 || static_cast<size_t>(r) >= rows) {
      return absl::InvalidArgumentError(absl::StrCat("hidden row ", r, " is not in [0, ", rows, ")"));
    }
  }
  int64_t next_row = 0;
  for (const ForwardSequence& s : batch.sequences) {
    if (s.first_row != next_row || s.q_len < 1 || s.context < s.q_len ||
        s.q_len > static_cast<int64_t>(rows) - next_row) {
      return absl::InvalidArgumentError(absl::StrCat("a sequence with rows [", s.first_row, ", +", s.q_len,
                                                     ") of context ", s.context, " where row ", next_row,
                                                     " is due"));
    }
    for (int32_t i = 0; i < s.q_len; ++i) {
      if (batch.positions[s.first_row + i] != s.context - s.q_len + i) {
        return absl::InvalidArgumentError(
            absl::StrCat("row ", s.first_row + i, " has position ", batch.positions[s.first_row + i],
                         "; its sequence puts it at ", s.context - s.q_len + i));
      }
    }
    next_row += s.q_len;
  }
  if (next_row != static_cast<int64_t>(rows)) {
    return absl::InvalidArgumentError(absl::StrCat("sequences cover ", next_row, " of ", rows, " rows"));
  }
  return absl::OkStatus();
}

absl::Status Transformer::AttentionBlock(uint32_t layer, const Step& step) const {
  const LayerWeights& w = weights_.layers[layer];
  const LayerSpec& l = spec_.layer_specs[layer];
  Workspace& ws = step.ws;
  const int64_t rows = step.rows, hidden = spec_.hidden, head_dim = spec_.head_dim;
  const int heads = static_cast<int>(spec_.heads), kv_heads = static_cast<int>(spec_.kv_heads);
  const int64_t q = heads * head_dim, kv = kv_heads * head_dim;
  const int64_t stride = q + 2 * kv;
  const float eps = static_cast<float>(spec_.rms_eps);
  const AttentionOptions options{.scale = static_cast<float>(spec_.attention_scale),
                                 .window = static_cast<int32_t>(l.window),
                                 .softcap = static_cast<float>(spec_.attention_softcap)};

  RmsNorm(ws.x_, w.attention_norm.data(), rows, hidden, eps, ws.norm_, step.pool);
  TP_RETURN_IF_ERROR(w.qkv.Forward(ws.norm_, rows, ws.qkv_, step.mode, step.pool));
  if (!w.q_norm.empty()) {
    RmsNormHeads(ws.qkv_, stride, rows, heads, w.q_norm.data(), head_dim, eps, step.pool);
    RmsNormHeads(ws.qkv_ + q, stride, rows, kv_heads, w.k_norm.data(), head_dim, eps, step.pool);
  }
  // q and k heads lie side by side in a row: one rotation does both.
  TP_RETURN_IF_ERROR(
      ropes_[l.rope].Apply(ws.qkv_, stride, heads + kv_heads, step.batch.positions, step.pool));
  TP_RETURN_IF_ERROR(
      KvWrite(step.layout, layer, ws.slots_, ws.qkv_ + q, ws.qkv_ + q + kv, stride, step.pool));
  if (step.batch.on_layer != nullptr) (*step.batch.on_layer)(layer + 1);
  TP_RETURN_IF_ERROR(PagedAttention(step.layout, layer, ws.attention_, ws.qkv_, stride, heads, options,
                                    ws.attn_, nullptr, step.mode, step.pool));
  TP_RETURN_IF_ERROR(w.o.Forward(ws.attn_, rows, ws.norm_, step.mode, step.pool));
  if (!w.post_attention_norm.empty()) {
    RmsNorm(ws.norm_, w.post_attention_norm.data(), rows, hidden, eps, ws.norm_, step.pool);
  }
  AddInto(ws.x_, ws.norm_, rows * hidden, step.pool);
  return absl::OkStatus();
}

absl::Status Transformer::Mlp(const MlpWeights& mlp, const float* x, int64_t m, float* y,
                              const Step& step) const {
  const GateFunction gate =
      spec_.architecture->activation == Activation::kSilu ? GateFunction::kSilu : GateFunction::kGeluTanh;
  TP_RETURN_IF_ERROR(mlp.gate_up.Forward(x, m, step.ws.gate_up_, step.mode, step.pool));
  GatedAct(gate, step.ws.gate_up_, m, mlp.down.k(), step.ws.act_, step.pool);
  return mlp.down.Forward(step.ws.act_, m, y, step.mode, step.pool);
}

absl::Status Transformer::Experts(uint32_t layer, const Step& step) const {
  const LayerWeights& w = weights_.layers[layer];
  const LayerSpec& l = spec_.layer_specs[layer];
  Workspace& ws = step.ws;
  const int64_t rows = step.rows, hidden = spec_.hidden;
  const int experts = static_cast<int>(l.experts), chosen = static_cast<int>(l.experts_per_token);
  TP_RETURN_IF_ERROR(w.router->Forward(ws.norm_, rows, ws.router_, step.mode, step.pool));
  MoeRoute(ws.router_, rows, experts, chosen, l.renormalise_experts, ws.expert_ids_.data(), ws.weights_,
           step.pool);
  MoeGroup(ws.expert_ids_.data(), rows, chosen, experts, ws.expert_offsets_.data(), ws.expert_place_.data());
  MoeGather(ws.norm_, ws.expert_place_.data(), rows, chosen, hidden, ws.expert_in_, step.pool);
  for (int e = 0; e < experts; ++e) {
    const int64_t first = ws.expert_offsets_[static_cast<size_t>(e)];
    const int64_t m = ws.expert_offsets_[static_cast<size_t>(e) + 1] - first;
    if (m == 0) continue;
    TP_RETURN_IF_ERROR(Mlp(w.mlps[static_cast<size_t>(e)], ws.expert_in_ + first * hidden, m,
                           ws.expert_out_ + first * hidden, step));
  }
  MoeCombine(ws.expert_out_, ws.weights_, ws.expert_place_.data(), rows, chosen, hidden, ws.norm_, step.pool);
  return absl::OkStatus();
}

absl::Status Transformer::MlpBlock(uint32_t layer, const Step& step) const {
  const LayerWeights& w = weights_.layers[layer];
  Workspace& ws = step.ws;
  const int64_t rows = step.rows, hidden = spec_.hidden;
  const float eps = static_cast<float>(spec_.rms_eps);
  RmsNorm(ws.x_, w.mlp_norm.data(), rows, hidden, eps, ws.norm_, step.pool);
  TP_RETURN_IF_ERROR(w.router ? Experts(layer, step) : Mlp(w.mlps[0], ws.norm_, rows, ws.norm_, step));
  if (!w.post_mlp_norm.empty()) {
    RmsNorm(ws.norm_, w.post_mlp_norm.data(), rows, hidden, eps, ws.norm_, step.pool);
  }
  AddInto(ws.x_, ws.norm_, rows * hidden, step.pool);
  return absl::OkStatus();
}

absl::Status Transformer::Forward(const ForwardBatch& batch, const BlockLayout& layout, NumericMode mode,
                                  ThreadPool& pool, Workspace& ws, float* logits) const {
  TP_RETURN_IF_ERROR(CheckBatch(batch, layout, ws));
  if (batch.tokens.empty()) return absl::OkStatus();

  ws.slots_.clear();
  ws.attention_.clear();
  const int32_t block_tokens = static_cast<int32_t>(layout.block_tokens);
  for (const ForwardSequence& s : batch.sequences) {
    ws.attention_.push_back(
        {.blocks = s.blocks, .context = s.context, .q_start = s.first_row, .q_len = s.q_len});
    for (int32_t p = s.context - s.q_len; p < s.context; ++p) {
      ws.slots_.push_back(
          {.block = s.blocks[p / block_tokens], .offset = static_cast<uint32_t>(p % block_tokens)});
    }
  }

  const int64_t hidden = spec_.hidden;
  Embedding(weights_.dtype, weights_.embedding(), hidden, batch.tokens, embedding_scale_, ws.x_, pool);
  const Step step{batch, layout, mode, pool, ws, static_cast<int64_t>(batch.tokens.size())};
  for (uint32_t l = 0; l < spec_.layers; ++l) {
    TP_RETURN_IF_ERROR(AttentionBlock(l, step));
    TP_RETURN_IF_ERROR(MlpBlock(l, step));
  }

  const auto final_states = [&](std::span<const int32_t> rows, float* out) {
    for (size_t i = 0; i < rows.size(); ++i) {
      std::memcpy(out + static_cast<int64_t>(i) * hidden, ws.x_ + rows[i] * hidden, hidden * sizeof(float));
    }
    RmsNorm(out, weights_.final_norm.data(), static_cast<int64_t>(rows.size()), hidden,
            static_cast<float>(spec_.rms_eps), out, pool);
  };
  final_states(batch.hidden_rows, batch.hidden);
  const int64_t wanted = static_cast<int64_t>(batch.logit_rows.size());
  if (wanted == 0) return absl::OkStatus();
  final_states(batch.logit_rows, ws.rows_);
  TP_RETURN_IF_ERROR(weights_.lm_head[0].Forward(ws.rows_, wanted, logits, mode, pool));
  if (spec_.final_softcap > 0) {
    SoftCap(logits, wanted * spec_.vocab, static_cast<float>(spec_.final_softcap), pool);
  }
  return absl::OkStatus();
}

}  // namespace tidepool
