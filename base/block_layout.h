#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/dtype.h"

namespace tidepool {

// BlockLayout: where each number of a KV block lies. One block is the KV of `block_tokens` consecutive
// tokens for all layers, one contiguous extent
//
//   [layer][K,V][kv_head][token][head_dim]
//
// the same in every tier and on the wire, so that a layer, or a range of heads in a layer, is a
// contiguous sub-range. Two processes exchange KV only when their layouts are equal.
struct BlockLayout {
  uint32_t layers = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t block_tokens = 32;
  DType dtype = DType::kBF16;

  bool operator==(const BlockLayout&) const = default;

  // Elements of one head's K (or V): [token][head_dim].
  size_t head_elems() const { return size_t{block_tokens} * head_dim; }
  // Elements of one layer's K (or V): [kv_head][token][head_dim].
  size_t plane_elems() const { return size_t{kv_heads} * head_elems(); }
  size_t layer_bytes() const { return 2 * plane_elems() * DTypeBytes(dtype); }
  size_t block_bytes() const { return layers * layer_bytes(); }
  size_t bytes_per_token() const { return block_bytes() / block_tokens; }

  // Byte offset of [layer][v ? V : K][kv_head][token][0] in a block.
  size_t Offset(uint32_t layer, bool v, uint32_t kv_head, uint32_t token) const {
    return layer * layer_bytes() +
           ((v ? plane_elems() : 0) + kv_head * head_elems() + size_t{token} * head_dim) * DTypeBytes(dtype);
  }

  // "l5 h4 d8 b32 bfloat16": enters block keys, HELLO and error messages.
  std::string ToString() const {
    std::string out("l");
    out += std::to_string(layers) + " h" + std::to_string(kv_heads) + " d" + std::to_string(head_dim) + " b" +
           std::to_string(block_tokens) + " ";
    return out += DTypeName(dtype);
  }
};

}  // namespace tidepool
