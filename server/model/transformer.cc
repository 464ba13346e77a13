#include "server/model/transformer.h"

#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/embedding.h"
#include "kernels/rms_norm.h"
#include "kernels/silu_mul.h"

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
  const size_t t = max_tokens, q = size_t{spec.heads} * spec.head_dim,
               kv = size_t{spec.kv_heads} * spec.head_dim;
  const size_t sizes[] = {
      RoundUp(t * spec.hidden), RoundUp(t * spec.hidden),           RoundUp(t * (q + 2 * kv)),
      RoundUp(t * q),           RoundUp(t * 2 * spec.intermediate), RoundUp(t * spec.intermediate),
      RoundUp(t * spec.hidden)};
  size_t total = kAlignFloats;
  for (size_t n : sizes) total += n;
  data_.resize(total);
  const size_t misaligned = reinterpret_cast<uintptr_t>(data_.data()) / sizeof(float) % kAlignFloats;
  float* p = data_.data() + (misaligned == 0 ? 0 : kAlignFloats - misaligned);
  float** const buffers[] = {&x_, &norm_, &qkv_, &attn_, &gate_up_, &act_, &rows_};
  for (size_t i = 0; i < std::size(sizes); ++i) {
    *buffers[i] = p;
    p += sizes[i];
  }
  slots_.reserve(max_tokens);
  attention_.reserve(max_sequences);
}

Transformer::Transformer(const ModelSpec& spec, Weights weights, RopeTable rope)
    : spec_(spec), weights_(std::move(weights)), rope_(std::move(rope)) {}

absl::StatusOr<Transformer> Transformer::Create(const ModelSpec& spec, Weights weights,
                                                uint32_t max_positions) {
  TP_ASSIGN_OR_RETURN(RopeTable rope,
                      RopeTable::Create(static_cast<int>(spec.head_dim), spec.rope_theta, max_positions));
  return Transformer(spec, std::move(weights), std::move(rope));
}

absl::Status Transformer::CheckBatch(const ForwardBatch& batch, const BlockLayout& layout,
                                     const Workspace& ws) const {
  const size_t rows = batch.tokens.size();
  if (batch.positions.size() != rows || rows > ws.max_tokens_ || batch.sequences.size() > ws.max_sequences_ ||
      batch.logit_rows.size() > rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a step of ", rows, " tokens, ", batch.positions.size(), " positions, ", batch.sequences.size(),
        " sequences and ", batch.logit_rows.size(), " logit rows; the workspace holds ", ws.max_tokens_,
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

absl::Status Transformer::Layer(uint32_t layer, const ForwardBatch& batch, const BlockLayout& layout,
                                NumericMode mode, ThreadPool& pool, Workspace& ws) const {
  const LayerWeights& w = weights_.layers[layer];
  const int64_t rows = static_cast<int64_t>(batch.tokens.size());
  const int64_t hidden = spec_.hidden;
  const int heads = static_cast<int>(spec_.heads), kv_heads = static_cast<int>(spec_.kv_heads);
  const int64_t q = int64_t{spec_.heads} * spec_.head_dim, kv = int64_t{spec_.kv_heads} * spec_.head_dim;
  const int64_t stride = q + 2 * kv;
  const float eps = static_cast<float>(spec_.rms_eps);
  const float scale = 1.0f / std::sqrt(static_cast<float>(spec_.head_dim));

  RmsNorm(ws.x_, w.attention_norm.data(), rows, hidden, eps, ws.norm_, pool);
  TP_RETURN_IF_ERROR(w.qkv.Forward(ws.norm_, rows, ws.qkv_, mode, pool));
  // q and k heads lie side by side in a row: one rotation does both.
  TP_RETURN_IF_ERROR(rope_.Apply(ws.qkv_, stride, heads + kv_heads, batch.positions, pool));
  TP_RETURN_IF_ERROR(KvWrite(layout, layer, ws.slots_, ws.qkv_ + q, ws.qkv_ + q + kv, stride, pool));
  TP_RETURN_IF_ERROR(PagedAttention(layout, layer, ws.attention_, ws.qkv_, stride, heads, scale, ws.attn_,
                                    nullptr, mode, pool));
  TP_RETURN_IF_ERROR(w.o.Forward(ws.attn_, rows, ws.norm_, mode, pool));
  AddInto(ws.x_, ws.norm_, rows * hidden, pool);

  RmsNorm(ws.x_, w.mlp_norm.data(), rows, hidden, eps, ws.norm_, pool);
  TP_RETURN_IF_ERROR(w.gate_up.Forward(ws.norm_, rows, ws.gate_up_, mode, pool));
  SiluMul(ws.gate_up_, rows, spec_.intermediate, ws.act_, pool);
  TP_RETURN_IF_ERROR(w.down.Forward(ws.act_, rows, ws.norm_, mode, pool));
  AddInto(ws.x_, ws.norm_, rows * hidden, pool);
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
  Embedding(weights_.dtype, weights_.embedding(), hidden, batch.tokens, ws.x_, pool);
  for (uint32_t l = 0; l < spec_.layers; ++l) TP_RETURN_IF_ERROR(Layer(l, batch, layout, mode, pool, ws));

  const int64_t wanted = static_cast<int64_t>(batch.logit_rows.size());
  for (int64_t i = 0; i < wanted; ++i) {
    std::memcpy(ws.rows_ + i * hidden, ws.x_ + batch.logit_rows[i] * hidden, hidden * sizeof(float));
  }
  RmsNorm(ws.rows_, weights_.final_norm.data(), wanted, hidden, static_cast<float>(spec_.rms_eps), ws.rows_,
          pool);
  return weights_.lm_head[0].Forward(ws.rows_, wanted, logits, mode, pool);
}

}  // namespace tidepool
