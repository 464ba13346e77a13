#include "kernels/kv_write.h"

#include <cstring>
#include <string>

#include "base/status.h"

namespace tidepool {
namespace {

void StoreRow(DType dtype, const float* src, uint32_t n, std::byte* dst) {
  if (dtype == DType::kF32) {
    std::memcpy(dst, src, n * sizeof(float));
    return;
  }
  BF16* out = reinterpret_cast<BF16*>(dst);
  for (uint32_t i = 0; i < n; ++i) out[i] = ToBF16(src[i]);
}

absl::Status Check(const BlockLayout& layout, uint32_t layer, std::span<const KvSlot> slots,
                   int64_t row_stride) {
  if (layout.dtype != DType::kBF16 && layout.dtype != DType::kF32) {
    return absl::InvalidArgumentError("KV dtype is " + std::string(DTypeName(layout.dtype)) +
                                      "; it may be bfloat16 or float32");
  }
  if (layer >= layout.layers) {
    return absl::InvalidArgumentError("KV layer is " + std::to_string(layer) + " of " +
                                      std::to_string(layout.layers));
  }
  if (row_stride < int64_t{layout.kv_heads} * layout.head_dim) {
    return absl::InvalidArgumentError("KV row_stride is " + std::to_string(row_stride) + ", below " +
                                      std::to_string(layout.kv_heads) + " heads of " +
                                      std::to_string(layout.head_dim));
  }
  for (size_t t = 0; t < slots.size(); ++t) {
    if (slots[t].block == nullptr || slots[t].offset >= layout.block_tokens) {
      return absl::InvalidArgumentError("KV slot of token " + std::to_string(t) +
                                        (slots[t].block == nullptr
                                             ? " has no block"
                                             : " has offset " + std::to_string(slots[t].offset) +
                                                   " in a block of " + std::to_string(layout.block_tokens)));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status KvWrite(const BlockLayout& layout, uint32_t layer, std::span<const KvSlot> slots, const float* k,
                     const float* v, int64_t row_stride, ThreadPool& pool) {
  TP_RETURN_IF_ERROR(Check(layout, layer, slots, row_stride));
  const int64_t grain = 8192 / (int64_t{layout.kv_heads} * layout.head_dim + 1) + 1;
  pool.ParallelFor(static_cast<int64_t>(slots.size()), grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const KvSlot& slot = slots[static_cast<size_t>(t)];
      for (uint32_t h = 0; h < layout.kv_heads; ++h) {
        const int64_t from = t * row_stride + int64_t{h} * layout.head_dim;
        StoreRow(layout.dtype, k + from, layout.head_dim,
                 slot.block + layout.Offset(layer, false, h, slot.offset));
        StoreRow(layout.dtype, v + from, layout.head_dim,
                 slot.block + layout.Offset(layer, true, h, slot.offset));
      }
    }
  });
  return absl::OkStatus();
}

void KvRead(const BlockLayout& layout, uint32_t layer, bool v, uint32_t kv_head, const std::byte* block,
            uint32_t offset, float* out) {
  const std::byte* src = block + layout.Offset(layer, v, kv_head, offset);
  if (layout.dtype == DType::kF32) {
    std::memcpy(out, src, layout.head_dim * sizeof(float));
    return;
  }
  const BF16* row = reinterpret_cast<const BF16*>(src);
  for (uint32_t i = 0; i < layout.head_dim; ++i) out[i] = ToFloat(row[i]);
}

}  // namespace tidepool
