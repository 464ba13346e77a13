#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace tidepool {

// How the numbers of a KV block are stored in fewer bits. All three are approximate.
//   kFp8   e4m3 (4 bits of exponent, 3 of mantissa, no infinity; arXiv:2209.05433) under one power of two
//   kInt8  8 bits under one scale
//   kInt4  4 bits, asymmetric, as KIVI (arXiv:2402.02750): K per channel over groups of 32 tokens, V per
//   token
//          over groups of 32 channels, because K has channels far larger than the others and V has not
enum class KvQuant : uint8_t { kFp8, kInt8, kInt4 };

// One plane: K (or V) of one head of one layer, [tokens][dim] row-major, dense.
struct KvPlane {
  DType dtype = DType::kBF16;
  uint32_t tokens = 0;
  uint32_t dim = 0;
  bool v = false;

  size_t elems() const { return size_t{tokens} * dim; }
  size_t bytes() const { return elems() * DTypeBytes(dtype); }
};

inline constexpr uint32_t kKvGroup = 32;  // tokens (K) or channels (V) that share a minimum and a maximum
// Groups whose largest magnitude (fp8, int8) or span (int4) is below become constant.
inline constexpr float kKvTiny = 0x1p-100f;
inline constexpr float kKvHuge = 0x1p120f;  // magnitudes from here on, infinities and NaN are not encoded

// Encoded planes, little-endian:
//   fp8, int8 := scale f32 | tokens * dim codes of a byte
//   int4, K   := per group of 32 tokens (the last may be shorter): min dtype[dim] | max dtype[dim] |
//   row[tokens] int4, V   := tokens * (min dtype[groups] | max dtype[groups] | row)       groups = ceil(dim /
//   32) row       := per group of w <= 32 channels, h = ceil(w / 2) bytes: q[j] | q[j + h] << 4
// fp8: x = e4m3(code) * scale; int8: x = code * scale; int4: x = min + q * ((max - min) / 15). Ends of the
// range are kept exactly: of int8 the largest magnitude, of int4 min and max. So encoding what was decoded
// changes nothing more (bf16, up to the rounding of the type). Errors, before rounding to the dtype: fp8 |x|
// / 16 or scale / 1024; int8 scale / 2; int4 (max - min) / 30.
size_t KvQuantBytes(KvQuant quant, const KvPlane& plane);

// KvQuantize: out[0, KvQuantBytes) from src[0, plane.bytes()). False: a number is NaN, infinite or as large
// as kKvHuge; `out` is then all zero bytes, which decode to zeros. A thread of the caller's; no allocation.
bool KvQuantize(KvQuant quant, const KvPlane& plane, const std::byte* src, std::byte* out);

// KvDequantize: the plane back. Whatever the bytes are, it stays within them; bytes that KvQuantize did not
// write decode to some numbers (e4m3's NaN code reads as 480). The same bits on every CPU.
void KvDequantize(KvQuant quant, const KvPlane& plane, const std::byte* in, std::byte* dst);

// n numbers of a dtype as float32, and back (nearest even).
void KvWiden(DType dtype, const std::byte* src, size_t n, float* out);
void KvNarrow(DType dtype, const float* in, size_t n, std::byte* dst);

// The obvious loops, of the same bits.
bool KvQuantizeRef(KvQuant quant, const KvPlane& plane, const std::byte* src, std::byte* out);
void KvDequantizeRef(KvQuant quant, const KvPlane& plane, const std::byte* in, std::byte* dst);
float KvElement(DType dtype, const std::byte* src, size_t i);
void KvSetElement(DType dtype, std::byte* dst, size_t i, float value);

}  // namespace tidepool
