#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "base/block_layout.h"
#include "kernels/thread_pool.h"

namespace tidepool {

// Where one token's KV goes: base of its block, and its place in it, [0, block_tokens).
struct KvSlot {
  std::byte* block = nullptr;
  uint32_t offset = 0;
};

// KvWrite: block(t)[layer][K][h][offset(t)][:] = k[t, h, :] and the same for V, for all kv heads,
// converted to layout.dtype (bf16: nearest even). k, v: float32, row t at k + t * row_stride elements
// (>= kv_heads * head_dim), heads dense inside a row. Two tokens of one call must not share a slot.
// InvalidArgument (nothing written): layer or an offset out of range, a null block, a dtype other than
// bf16 or float32.
absl::Status KvWrite(const BlockLayout& layout, uint32_t layer, std::span<const KvSlot> slots, const float* k,
                     const float* v, int64_t row_stride, ThreadPool& pool);

// Reads back one token's K (or V) of one layer and head as float32 into out[head_dim]: tests and tools.
void KvRead(const BlockLayout& layout, uint32_t layer, bool v, uint32_t kv_head, const std::byte* block,
            uint32_t offset, float* out);

}  // namespace tidepool
