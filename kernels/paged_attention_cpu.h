// Internal to paged_attention: what one task computes. Plain data only, because the kernels behind it are
// compiled for other instruction sets (see simd.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace tidepool {

// Queries that share one kv head: rows = some queries x their grouped heads, query-major.
struct AttentionTile {
  const std::byte* const* blocks = nullptr;
  size_t k_offset = 0;  // byte offset of this layer's and head's K in a block: [token][head_dim]
  size_t v_offset = 0;
  bool bf16 = true;  // else float32
  int block_tokens = 0;
  int head_dim = 0;
  int padded_dim = 0;   // head_dim rounded up to 16; the padding of q is zero
  int first_block = 0;  // blocks [first_block, end_block) are visited
  int end_block = 0;
  int rows = 0;
  // Keys [start[r], visible[r]) are those that row r sees; neither falls from row to row. start may be null:
  // all from key 0 on.
  const int32_t* start = nullptr;    // [rows], start[r] < visible[r]
  const int32_t* visible = nullptr;  // [rows]
  float softcap = 0;                 // 0: none
  const float* q = nullptr;          // [rows][padded_dim], scaled already
  // Working memory of one worker, each 64-byte aligned:
  float* k_tile = nullptr;      // [block_tokens rounded up to 16][padded_dim]; any finite or stale contents
  float* v_tile = nullptr;      // the same
  float* scores = nullptr;      // [rows][block_tokens rounded up to 16]
  float* correction = nullptr;  // [rows]
  float* max = nullptr;         // [rows]
  float* sum = nullptr;         // [rows]
  // Results: normalised output and ln of the sum of exponentials (-inf and 0 where a row saw no key).
  float* out = nullptr;  // [rows][padded_dim]
  float* lse = nullptr;  // [rows]
};

void RunAttentionTileAvx2(const AttentionTile& tile);
void RunAttentionTileAvx512(const AttentionTile& tile);

}  // namespace tidepool
