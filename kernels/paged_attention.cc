#include "kernels/paged_attention.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kernels/cpu_features.h"
#include "kernels/merge_attention.h"
#include "kernels/paged_attention_cpu.h"
#include "kernels/scratch.h"

namespace tidepool {
namespace {

// Rows (queries x grouped heads) of one task: enough to pay for widening a block's K and V to float32,
// few enough that their outputs stay in the L1 and L2 caches.
constexpr int kRowsPerTask = 32;
// A context is split over threads only in pieces of at least this many blocks.
constexpr int kBlocksPerSplit = 8;

struct Task {
  const AttentionSeq* seq = nullptr;
  int kv_head = 0;
  int q_begin = 0;  // queries [q_begin, q_end) of the sequence
  int q_end = 0;
  int first_block = 0;
  int end_block = 0;
  int64_t partial = -1;  // first row in the partial results; -1: writes to the output itself
};

struct Call {
  const BlockLayout& layout;
  uint32_t layer;
  const float* q;
  int64_t q_row_stride;
  int heads;
  int group;
  const AttentionOptions& options;
  float* out;
  float* lse;  // may be null
  float* partial_out = nullptr;
  float* partial_lse = nullptr;
};

absl::Status Check(const BlockLayout& layout, uint32_t layer, std::span<const AttentionSeq> seqs,
                   int64_t q_row_stride, int heads, const AttentionOptions& options) {
  const auto invalid = [](std::string message) {
    return absl::InvalidArgumentError("attention: " + message);
  };
  if (layout.dtype != DType::kBF16 && layout.dtype != DType::kF32) {
    return invalid("KV dtype is " + std::string(DTypeName(layout.dtype)) + "; it may be bfloat16 or float32");
  }
  if (layer >= layout.layers) {
    return invalid("layer is " + std::to_string(layer) + " of " + std::to_string(layout.layers));
  }
  if (layout.kv_heads == 0 || layout.head_dim == 0 || layout.block_tokens == 0) {
    return invalid("the block layout " + layout.ToString() + " has a zero dimension");
  }
  if (heads <= 0 || heads % static_cast<int>(layout.kv_heads) != 0) {
    return invalid(std::to_string(heads) + " heads are not a multiple of " + std::to_string(layout.kv_heads) +
                   " kv heads");
  }
  if (q_row_stride < int64_t{heads} * layout.head_dim) {
    return invalid("q_row_stride is " + std::to_string(q_row_stride) + ", below " + std::to_string(heads) +
                   " heads of " + std::to_string(layout.head_dim));
  }
  if (options.window < 0 || !(options.softcap >= 0)) {
    return invalid("window is " + std::to_string(options.window) + " and softcap " +
                   std::to_string(options.softcap) + "; neither may be below 0");
  }
  for (size_t i = 0; i < seqs.size(); ++i) {
    const AttentionSeq& s = seqs[i];
    if (s.q_len < 0 || s.q_start < 0 || s.context < s.q_len) {
      return invalid("sequence " + std::to_string(i) + " has context " + std::to_string(s.context) +
                     ", q_start " + std::to_string(s.q_start) + ", q_len " + std::to_string(s.q_len) +
                     "; none may be negative, and context holds the queries' own keys");
    }
    if (s.q_len == 0) continue;
    const int64_t blocks = (int64_t{s.context} + layout.block_tokens - 1) / layout.block_tokens;
    for (int64_t b = 0; b < blocks; ++b) {
      if (s.blocks == nullptr || s.blocks[b] == nullptr) {
        return invalid("sequence " + std::to_string(i) + " has no block " + std::to_string(b) + " of " +
                       std::to_string(blocks));
      }
    }
  }
  return absl::OkStatus();
}

// The first key that a query sees which sees `visible` keys but for its window.
int32_t FirstKey(const AttentionOptions& options, int32_t visible) {
  return options.window == 0 ? 0 : std::max(0, visible - options.window);
}

void RunTask(const Call& call, const Task& task) {
  static const auto run = Cpu().avx512 ? RunAttentionTileAvx512 : RunAttentionTileAvx2;
  thread_local Scratch floats;
  thread_local std::vector<int32_t> visible, start;

  const int dim = static_cast<int>(call.layout.head_dim);
  const int rows = (task.q_end - task.q_begin) * call.group;
  AttentionTile t;
  t.blocks = task.seq->blocks;
  t.k_offset = call.layout.Offset(call.layer, false, static_cast<uint32_t>(task.kv_head), 0);
  t.v_offset = call.layout.Offset(call.layer, true, static_cast<uint32_t>(task.kv_head), 0);
  t.bf16 = call.layout.dtype == DType::kBF16;
  t.block_tokens = static_cast<int>(call.layout.block_tokens);
  t.head_dim = dim;
  t.padded_dim = (dim + 15) / 16 * 16;
  t.first_block = task.first_block;
  t.end_block = task.end_block;
  t.rows = rows;

  const size_t padded_dim = static_cast<size_t>(t.padded_dim);
  const size_t padded_tokens = (call.layout.block_tokens + 15) / 16 * 16;
  const size_t padded_rows = (static_cast<size_t>(rows) + 15) / 16 * 16;
  float* next =
      floats.Get<float>(2 * padded_tokens * padded_dim + padded_rows * (2 * padded_dim + padded_tokens + 4));
  const auto take = [&next](size_t n) { return std::exchange(next, next + n); };
  t.k_tile = take(padded_tokens * padded_dim);
  t.v_tile = take(padded_tokens * padded_dim);
  float* q = take(padded_rows * padded_dim);
  t.out = take(padded_rows * padded_dim);
  t.scores = take(padded_rows * padded_tokens);
  t.correction = take(padded_rows);
  t.max = take(padded_rows);
  t.sum = take(padded_rows);
  t.lse = take(padded_rows);
  t.q = q;

  visible.resize(static_cast<size_t>(rows));
  start.resize(static_cast<size_t>(rows));
  const int first_head = task.kv_head * call.group;
  for (int r = 0; r < rows; ++r) {
    const int query = task.q_begin + r / call.group;
    visible[static_cast<size_t>(r)] = task.seq->context - task.seq->q_len + query + 1;
    start[static_cast<size_t>(r)] = FirstKey(call.options, visible[static_cast<size_t>(r)]);
    const float* src = call.q + (int64_t{task.seq->q_start} + query) * call.q_row_stride +
                       int64_t{first_head + r % call.group} * dim;
    float* dst = q + static_cast<size_t>(r) * padded_dim;
    for (int d = 0; d < dim; ++d) dst[d] = src[d] * call.options.scale;
    std::fill(dst + dim, dst + t.padded_dim, 0.0f);
  }
  t.visible = visible.data();
  // A window longer than the context is none: the cheaper path.
  t.start = start.back() > 0 ? start.data() : nullptr;
  t.softcap = call.options.softcap;
  run(t);

  for (int r = 0; r < rows; ++r) {
    const int64_t row = int64_t{task.seq->q_start} + task.q_begin + r / call.group;
    const int64_t out_row =
        task.partial >= 0 ? task.partial + r : row * call.heads + first_head + r % call.group;
    float* out = task.partial >= 0 ? call.partial_out : call.out;
    float* lse = task.partial >= 0 ? call.partial_lse : call.lse;
    std::memcpy(out + out_row * dim, t.out + static_cast<size_t>(r) * padded_dim,
                static_cast<size_t>(dim) * sizeof(float));
    if (lse != nullptr) lse[out_row] = t.lse[r];
  }
}

// Flash-decoding: parts of one query's context on several threads, then merged in the order of the keys.
void RunSplit(Call call, const std::vector<Task>& tasks, int parts, ThreadPool& pool) {
  thread_local Scratch out_scratch, lse_scratch;
  const int64_t dim = call.layout.head_dim;
  std::vector<Task> pieces;
  int64_t rows = 0;
  for (const Task& task : tasks) {
    for (int p = 0; p < parts; ++p) {
      Task piece = task;
      const int64_t blocks = task.end_block - task.first_block;
      piece.first_block = task.first_block + static_cast<int>(blocks * p / parts);
      piece.end_block = task.first_block + static_cast<int>(blocks * (p + 1) / parts);
      piece.partial = rows;
      rows += int64_t{task.q_end - task.q_begin} * call.group;
      pieces.push_back(piece);
    }
  }
  call.partial_out = out_scratch.Get<float>(static_cast<size_t>(rows * dim));
  call.partial_lse = lse_scratch.Get<float>(static_cast<size_t>(rows));
  pool.ParallelFor(static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) RunTask(call, pieces[static_cast<size_t>(i)]);
  });
  for (size_t i = 0; i < pieces.size(); i += static_cast<size_t>(parts)) {
    const Task& first = pieces[i];
    const int64_t n = int64_t{first.q_end - first.q_begin} * call.group;
    float* out = call.partial_out + first.partial * dim;
    float* lse = call.partial_lse + first.partial;
    for (int p = 1; p < parts; ++p) {
      MergeAttention(out, lse, out + p * n * dim, lse + p * n, n, dim, out, lse, pool);
    }
    // q_len is 1 here: the rows are the group's heads, dense in the output.
    const int64_t out_row =
        (int64_t{first.seq->q_start} + first.q_begin) * call.heads + first.kv_head * call.group;
    std::memcpy(call.out + out_row * dim, out, static_cast<size_t>(n * dim) * sizeof(float));
    if (call.lse != nullptr) std::memcpy(call.lse + out_row, lse, static_cast<size_t>(n) * sizeof(float));
  }
}

}  // namespace

absl::Status PagedAttention(const BlockLayout& layout, uint32_t layer, std::span<const AttentionSeq> seqs,
                            const float* q, int64_t q_row_stride, int heads, const AttentionOptions& options,
                            float* out, float* lse, NumericMode mode, ThreadPool& pool) {
  TP_RETURN_IF_ERROR(Check(layout, layer, seqs, q_row_stride, heads, options));
  const int kv_heads = static_cast<int>(layout.kv_heads);
  const int block_tokens = static_cast<int>(layout.block_tokens);
  const Call call{layout, layer, q, q_row_stride, heads, heads / kv_heads, options, out, lse};
  const int queries_per_task = std::max(1, kRowsPerTask / call.group);

  thread_local std::vector<Task> tasks;
  tasks.clear();
  bool decode_only = true;
  int blocks_min = INT32_MAX;
  for (const AttentionSeq& seq : seqs) {
    if (seq.q_len == 0) continue;
    decode_only = decode_only && seq.q_len == 1;
    for (int h = 0; h < kv_heads; ++h) {
      for (int begin = 0; begin < seq.q_len; begin += queries_per_task) {
        Task task{&seq, h, begin, std::min(begin + queries_per_task, seq.q_len)};
        const int keys = seq.context - seq.q_len + task.q_end;
        task.end_block = (keys + block_tokens - 1) / block_tokens;
        task.first_block = FirstKey(options, seq.context - seq.q_len + begin + 1) / block_tokens;
        blocks_min = std::min(blocks_min, task.end_block - task.first_block);
        tasks.push_back(task);
      }
    }
  }
  if (tasks.empty()) return absl::OkStatus();

  const int idle = static_cast<int>(pool.threads() / static_cast<int64_t>(tasks.size()));
  const int parts = std::min(idle, blocks_min / kBlocksPerSplit);
  if (mode == NumericMode::kFast && decode_only && parts > 1) {
    RunSplit(call, tasks, parts, pool);
    return absl::OkStatus();
  }
  // By reference: workers must not see their own thread_local.
  const std::vector<Task>& all = tasks;
  pool.ParallelFor(static_cast<int64_t>(all.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) RunTask(call, all[static_cast<size_t>(i)]);
  });
  return absl::OkStatus();
}

}  // namespace tidepool
