// Internal: the body of RunAttentionTile*, included once by each instruction set's file. Every sum below
// has one order, the same in all register tilings, so that a row's bits depend on its own query and keys
// only (and are equal on AVX2 and AVX-512).
#pragma once

#include "kernels/paged_attention_cpu.h"
#include "kernels/simd.h"

namespace tidepool {
namespace {

#if defined(__AVX512F__)
inline constexpr int kRowTile = 4, kKeyTile = 4, kChunkTile = 4, kRowlessKeyTile = 8, kRowlessChunkTile = 8;
#else
// Half the registers, each half as wide.
inline constexpr int kRowTile = 2, kKeyTile = 2, kChunkTile = 2, kRowlessKeyTile = 4, kRowlessChunkTile = 4;
#endif

TP_INLINE int RoundUp16(int n) { return (n + 15) / 16 * 16; }
TP_INLINE F16 Load(const uint16_t* p) { return LoadBf16(p); }
TP_INLINE int MinInt(int a, int b) { return a < b ? a : b; }
TP_INLINE int MaxInt(int a, int b) { return a > b ? a : b; }

// Starts loading `bytes` at p into L2: a tile is two short runs far from the last one's, which the
// hardware's prefetchers do not foresee.
TP_INLINE void Prefetch(const std::byte* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

// `count` rows of head_dim elements as float32 rows of padded_dim, the padding zero.
void WidenTile(const AttentionTile& t, const std::byte* src, int count, float* __restrict dst) {
  const int dim = t.head_dim, padded_dim = t.padded_dim;
  const int whole = dim / kLanes * kLanes;
  const bool bf16 = t.bf16;
  for (int j = 0; j < count; ++j) {
    float* out = dst + j * padded_dim;
    if (bf16) {
      const uint16_t* in = reinterpret_cast<const uint16_t*>(src) + j * dim;
      for (int i = 0; i < whole; i += kLanes) Store(out + i, LoadBf16(in + i));
      for (int i = whole; i < dim; ++i) {
        const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
        __builtin_memcpy(out + i, &bits, sizeof(bits));
      }
    } else {
      const float* in = reinterpret_cast<const float*>(src) + j * dim;
      for (int i = 0; i < whole; i += kLanes) Store(out + i, Load(in + i));
      for (int i = whole; i < dim; ++i) out[i] = in[i];
    }
    for (int i = dim; i < padded_dim; ++i) out[i] = 0.0f;
  }
}

// scores[r][j] = q[r] . k[j] for R rows and K keys.
template <int R, int K, typename T>
TP_INLINE void ScoreTile(const float* q, const T* k, int dim, float* scores, int score_stride) {
  F16 acc[R][K];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) acc[r][j] = Zero();
  }
  for (int i = 0; i < dim; i += kLanes) {
    F16 key[K];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) key[j] = Load(k + j * dim + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16 query = Load(q + r * dim + i);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) acc[r][j] = Fma(query, key[j], acc[r][j]);
    }
  }
  if constexpr (K % 4 == 0) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < K; j += 4) {
        _mm_storeu_ps(scores + r * score_stride + j,
                      ReduceAdd4(acc[r][j], acc[r][j + 1], acc[r][j + 2], acc[r][j + 3]));
      }
    }
  } else {
    static_assert(R == 2 && K == 2);
    const __m128 s = ReduceAdd4(acc[0][0], acc[0][1], acc[1][0], acc[1][1]);
    _mm_storel_pi(reinterpret_cast<__m64*>(scores), s);
    _mm_storeh_pi(reinterpret_cast<__m64*>(scores + score_stride), s);
  }
}

// The part of one block that some rows see: rows [first_row, end_row) of the tile; the block's keys count
// from first_key.
struct BlockRows {
  int first_row, end_row;
  int first_key;
};

// The keys of the block that row r sees, counted inside it: [KeyBegin, KeyEnd).
TP_INLINE int KeyBegin(const AttentionTile& t, const BlockRows& b, int r) {
  return t.start == nullptr ? 0 : MaxInt(0, t.start[r] - b.first_key);
}
TP_INLINE int KeyEnd(const AttentionTile& t, const BlockRows& b, int r) {
  return MinInt(t.block_tokens, t.visible[r] - b.first_key);
}

template <typename T>
void Scores(const AttentionTile& t, const T* k, const BlockRows& b, int keys) {
  const int stride = RoundUp16(t.block_tokens);
  int r = b.first_row;
  // The tile has room for a multiple of 16 keys: what lies outside a row's own is computed and then masked.
  for (; r + kRowTile <= b.end_row; r += kRowTile) {
    for (int j = 0; j < keys; j += kKeyTile) {
      ScoreTile<kRowTile, kKeyTile>(t.q + r * t.padded_dim, k + j * t.padded_dim, t.padded_dim,
                                    t.scores + r * stride + j, stride);
    }
  }
  for (; r < b.end_row; ++r) {
    for (int j = 0; j < keys; j += kRowlessKeyTile) {
      ScoreTile<1, kRowlessKeyTile>(t.q + r * t.padded_dim, k + j * t.padded_dim, t.padded_dim,
                                    t.scores + r * stride + j, stride);
    }
  }
}

// Out of the way of rows without a cap.
__attribute__((noinline)) void CapScores(float* s, int padded, float softcap) {
  const F16 cap = Set1(softcap);
  for (int j = 0; j < padded; j += kLanes) Store(s + j, CapLanes(Load(s + j), cap));
}

// Turns a row's scores of keys [begin, end) into weights exp(s - max), and moves its maximum, sum and
// correction on.
void SoftmaxRow(const AttentionTile& t, int r, int begin, int end) {
  const int padded = RoundUp16(end);
  float* s = t.scores + r * RoundUp16(t.block_tokens);
  if (t.softcap > 0) CapScores(s, padded, t.softcap);
  for (int j = 0; j < begin; ++j) s[j] = -INFINITY;
  for (int j = end; j < padded; ++j) s[j] = -INFINITY;
  F16 m = Load(s);
  for (int j = kLanes; j < padded; j += kLanes) m = Max(Load(s + j), m);
  const float tile_max = ReduceMax(m);
  const float max = tile_max > t.max[r] ? tile_max : t.max[r];
  const F16 shift = Set1(max);
  F16 sum = Zero();
  for (int j = 0; j < padded; j += kLanes) {
    const F16 p = Exp(Sub(Load(s + j), shift));
    Store(s + j, p);
    sum = Add(sum, p);
  }
  float lanes[kLanes];
  Store(lanes, Exp(Sub(Set1(t.max[r]), shift)));
  t.correction[r] = lanes[0];
  t.sum[r] = t.sum[r] * lanes[0] + ReduceAdd(sum);
  t.max[r] = max;
}

// out[r][c] = out[r][c] * correction[r] + sum over keys [begin, end) of weight[r][j] * v[j][c], key by key.
template <int R, int C, typename T>
TP_INLINE void ValueTile(const float* weights, int weight_stride, const float* correction, const T* v,
                         int dim, int begin, int end, float* out) {
  F16 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const F16 scale = Set1(correction[r]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = Mul(Load(out + r * dim + c * kLanes), scale);
  }
  for (int j = begin; j < end; ++j) {
    F16 value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) value[c] = Load(v + j * dim + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16 p = Set1(weights[r * weight_stride + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = Fma(p, value[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) Store(out + r * dim + c * kLanes, acc[r][c]);
  }
}

template <int R, int C, typename T>
TP_INLINE void ValueRows(const float* weights, int weight_stride, const float* correction, const T* v,
                         int dim, int begin, int end, float* out) {
  int i = 0;
  for (; i + C * kLanes <= dim; i += C * kLanes) {
    ValueTile<R, C>(weights, weight_stride, correction, v + i, dim, begin, end, out + i);
  }
  for (; i < dim; i += kLanes) {
    ValueTile<R, 1>(weights, weight_stride, correction, v + i, dim, begin, end, out + i);
  }
}

// One row alone over keys [begin, end).
template <typename T>
void ValueRow(const AttentionTile& t, const T* v, int r, const float* correction, int begin, int end) {
  const int stride = RoundUp16(t.block_tokens), dim = t.padded_dim;
  ValueRows<1, kRowlessChunkTile>(t.scores + r * stride, stride, correction, v, dim, begin, end,
                                  t.out + r * dim);
}

template <typename T>
void Values(const AttentionTile& t, const T* v, const BlockRows& b) {
  const int stride = RoundUp16(t.block_tokens);
  const int dim = t.padded_dim;
  const float unchanged = 1.0f;
  int r = b.first_row;
  for (; r + kRowTile <= b.end_row; r += kRowTile) {
    // Together over the keys that all of them see, each row alone over its own before and after, in the
    // order of the keys: a masked key is never multiplied in, because 0 * NaN would not be 0.
    const int begin = KeyBegin(t, b, r + kRowTile - 1), end = KeyEnd(t, b, r);
    if (begin > end) {
      for (int i = r; i < r + kRowTile; ++i) {
        ValueRow(t, v, i, t.correction + i, KeyBegin(t, b, i), KeyEnd(t, b, i));
      }
      continue;
    }
    for (int i = r; begin > 0 && i < r + kRowTile - 1; ++i) {
      if (KeyBegin(t, b, i) == begin) continue;
      ValueRow(t, v, i, t.correction + i, KeyBegin(t, b, i), begin);
      t.correction[i] = unchanged;
    }
    ValueRows<kRowTile, kChunkTile>(t.scores + r * stride, stride, t.correction + r, v, dim, begin, end,
                                    t.out + r * dim);
    for (int i = r + 1; i < r + kRowTile; ++i) {
      if (KeyEnd(t, b, i) != end) ValueRow(t, v, i, &unchanged, end, KeyEnd(t, b, i));
    }
  }
  for (; r < b.end_row; ++r) ValueRow(t, v, r, t.correction + r, KeyBegin(t, b, r), KeyEnd(t, b, r));
}

// One block's keys and values, as they are stored or widened.
template <typename T>
void RunBlock(const AttentionTile& t, const T* k, const T* v, const BlockRows& b, int keys) {
  Scores(t, k, b, keys);
  for (int r = b.first_row; r < b.end_row; ++r) SoftmaxRow(t, r, KeyBegin(t, b, r), KeyEnd(t, b, r));
  Values(t, v, b);
}

void RunTile(const AttentionTile& t) {
  for (int r = 0; r < t.rows; ++r) {
    t.max[r] = -INFINITY;
    t.sum[r] = 0.0f;
    for (int i = 0; i < t.padded_dim; i += kLanes) Store(t.out + r * t.padded_dim + i, Zero());
  }
  // Few rows read a block where it lies: a widened copy pays only when it is read several times. (Scores
  // are computed for whole key tiles of at most 8 keys, which must lie in the block.)
  const bool in_place =
      t.head_dim == t.padded_dim && t.block_tokens % 8 == 0 && (!t.bf16 || t.rows <= 2 * kRowTile);
  int first_row = 0;
  for (int b = t.first_block; b < t.end_block; ++b) {
    const int first_key = b * t.block_tokens;
    while (first_row < t.rows && t.visible[first_row] <= first_key) ++first_row;
    if (first_row == t.rows) break;
    int end_row = t.rows;
    if (t.start != nullptr) {
      while (end_row > first_row && t.start[end_row - 1] >= first_key + t.block_tokens) --end_row;
      if (end_row == first_row) continue;
    }
    const BlockRows rows{first_row, end_row, first_key};
    const int keys = KeyEnd(t, rows, end_row - 1);
    if (b + 1 < t.end_block) {
      const size_t bytes = static_cast<size_t>(t.block_tokens) * t.head_dim * (t.bf16 ? 2 : 4);
      Prefetch(t.blocks[b + 1] + t.k_offset, bytes);
      Prefetch(t.blocks[b + 1] + t.v_offset, bytes);
    }
    const std::byte* k = t.blocks[b] + t.k_offset;
    const std::byte* v = t.blocks[b] + t.v_offset;
    // Widening is exact: which way an element comes in changes no bit.
    if (!in_place) {
      WidenTile(t, k, keys, t.k_tile);
      WidenTile(t, v, keys, t.v_tile);
      RunBlock(t, t.k_tile, t.v_tile, rows, keys);
    } else if (t.bf16) {
      RunBlock(t, reinterpret_cast<const uint16_t*>(k), reinterpret_cast<const uint16_t*>(v), rows, keys);
    } else {
      RunBlock(t, reinterpret_cast<const float*>(k), reinterpret_cast<const float*>(v), rows, keys);
    }
  }
  for (int r = 0; r < t.rows; ++r) {
    if (t.max[r] == -INFINITY) {
      t.lse[r] = -INFINITY;
      continue;
    }
    const F16 scale = Set1(1.0f / t.sum[r]);
    float* out = t.out + r * t.padded_dim;
    for (int i = 0; i < t.padded_dim; i += kLanes) Store(out + i, Mul(Load(out + i), scale));
    t.lse[r] = t.max[r] + logf(t.sum[r]);
  }
}

}  // namespace
}  // namespace tidepool
