#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/kv_codec.h"
#include "kernels/kv_codec_cpu.h"

namespace tidepool {
namespace {

uint8_t ToE4m3(float y) {
  const float a = std::fabs(y);
  const uint8_t sign = std::signbit(y) ? 0x80 : 0;
  if (a < 0x1p-6f) return sign | static_cast<uint8_t>(std::nearbyint(a * 0x1p9f));  // 2^-9 is the last step
  int exponent;
  const float mantissa = std::frexp(a, &exponent);  // 16 * mantissa is in [8, 16)
  int code = static_cast<int>(std::nearbyint(mantissa * 16.0f)) - 8 + ((exponent + 6) << 3);
  return sign | static_cast<uint8_t>(code);
}

float FromE4m3(uint8_t code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  const float a = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (code & 0x80) != 0 ? -a : a;
}

float LoadF32(const std::byte* p) {
  float out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

// w channels' 4-bit codes of one row, as kv_codec.h has them.
template <typename Code>
void PackRow(uint32_t w, std::byte* out, Code code) {
  const uint32_t h = (w + 1) / 2;
  for (uint32_t j = 0; j < h; ++j) {
    const int low = code(j), high = j + h < w ? code(j + h) : 0;
    out[j] = static_cast<std::byte>(low | (high << 4));
  }
}
template <typename Take>
void UnpackRow(uint32_t w, const std::byte* in, Take take) {
  const uint32_t h = (w + 1) / 2;
  for (uint32_t j = 0; j < h; ++j) {
    take(j, std::to_integer<int>(in[j]) & 15);
    if (j + h < w) take(j + h, std::to_integer<int>(in[j]) >> 4);
  }
}

size_t RowBytes(uint32_t dim) { return size_t{dim / kKvGroup} * (kKvGroup / 2) + (dim % kKvGroup + 1) / 2; }

int Quantize4(float x, float min, float max) {
  const float range = max - min;
  return range < kKvTiny ? 0 : static_cast<int>(std::nearbyint((x - min) * (15.0f / range)));
}
float Dequantize4(int q, float min, float max) {
  return std::fma(static_cast<float>(q), (max - min) * (1.0f / 15.0f), min);
}

void QuantizeInt4K(const KvPlane& p, const std::byte* src, std::byte* out) {
  const size_t elem = DTypeBytes(p.dtype), row_bytes = RowBytes(p.dim);
  for (uint32_t first = 0; first < p.tokens; first += kKvGroup) {
    const uint32_t count = std::min(kKvGroup, p.tokens - first);
    std::byte *min = out, *max = out + p.dim * elem, *rows = out + 2 * p.dim * elem;
    for (uint32_t c = 0; c < p.dim; ++c) {
      float lo = INFINITY, hi = -INFINITY;
      for (uint32_t t = first; t < first + count; ++t) {
        const float x = KvElement(p.dtype, src, size_t{t} * p.dim + c);
        lo = std::min(lo, x);
        hi = std::max(hi, x);
      }
      KvSetElement(p.dtype, min, c, lo);
      KvSetElement(p.dtype, max, c, hi);
    }
    for (uint32_t t = 0; t < count; ++t) {
      for (uint32_t c = 0, at = 0; c < p.dim; c += kKvGroup, at += kKvGroup / 2) {
        PackRow(std::min(kKvGroup, p.dim - c), rows + t * row_bytes + at, [&](uint32_t j) {
          return Quantize4(KvElement(p.dtype, src, size_t{first + t} * p.dim + c + j),
                           KvElement(p.dtype, min, c + j), KvElement(p.dtype, max, c + j));
        });
      }
    }
    out = rows + count * row_bytes;
  }
}

void DequantizeInt4K(const KvPlane& p, const std::byte* in, std::byte* dst) {
  const size_t elem = DTypeBytes(p.dtype), row_bytes = RowBytes(p.dim);
  for (uint32_t first = 0; first < p.tokens; first += kKvGroup) {
    const uint32_t count = std::min(kKvGroup, p.tokens - first);
    const std::byte *min = in, *max = in + p.dim * elem, *rows = in + 2 * p.dim * elem;
    for (uint32_t t = 0; t < count; ++t) {
      for (uint32_t c = 0, at = 0; c < p.dim; c += kKvGroup, at += kKvGroup / 2) {
        UnpackRow(std::min(kKvGroup, p.dim - c), rows + t * row_bytes + at, [&](uint32_t j, int q) {
          KvSetElement(p.dtype, dst, size_t{first + t} * p.dim + c + j,
                       Dequantize4(q, KvElement(p.dtype, min, c + j), KvElement(p.dtype, max, c + j)));
        });
      }
    }
    in = rows + count * row_bytes;
  }
}

void QuantizeInt4V(const KvPlane& p, const std::byte* src, std::byte* out) {
  const size_t elem = DTypeBytes(p.dtype), groups = (p.dim + kKvGroup - 1) / kKvGroup;
  for (uint32_t t = 0; t < p.tokens; ++t) {
    std::byte *min = out, *max = out + groups * elem, *row = out + 2 * groups * elem;
    for (uint32_t g = 0; g < groups; ++g) {
      const uint32_t c = g * kKvGroup, w = std::min(kKvGroup, p.dim - c);
      const auto x = [&](uint32_t j) { return KvElement(p.dtype, src, size_t{t} * p.dim + c + j); };
      float lo = INFINITY, hi = -INFINITY;
      for (uint32_t j = 0; j < w; ++j) {
        lo = std::min(lo, x(j));
        hi = std::max(hi, x(j));
      }
      lo += 0.0f;  // -0 becomes 0
      hi += 0.0f;
      KvSetElement(p.dtype, min, g, lo);
      KvSetElement(p.dtype, max, g, hi);
      PackRow(w, row + g * (kKvGroup / 2), [&](uint32_t j) { return Quantize4(x(j), lo, hi); });
    }
    out = row + RowBytes(p.dim);
  }
}

void DequantizeInt4V(const KvPlane& p, const std::byte* in, std::byte* dst) {
  const size_t elem = DTypeBytes(p.dtype), groups = (p.dim + kKvGroup - 1) / kKvGroup;
  for (uint32_t t = 0; t < p.tokens; ++t) {
    const std::byte *min = in, *max = in + groups * elem, *row = in + 2 * groups * elem;
    for (uint32_t g = 0; g < groups; ++g) {
      const uint32_t c = g * kKvGroup;
      const float lo = KvElement(p.dtype, min, g), hi = KvElement(p.dtype, max, g);
      UnpackRow(std::min(kKvGroup, p.dim - c), row + g * (kKvGroup / 2), [&](uint32_t j, int q) {
        KvSetElement(p.dtype, dst, size_t{t} * p.dim + c + j, Dequantize4(q, lo, hi));
      });
    }
    in = row + RowBytes(p.dim);
  }
}

}  // namespace

float KvElement(DType dtype, const std::byte* src, size_t i) {
  if (dtype == DType::kF32) return LoadF32(src + i * sizeof(float));
  uint16_t bits;
  std::memcpy(&bits, src + i * sizeof bits, sizeof bits);
  return dtype == DType::kBF16 ? ToFloat(BF16{bits}) : HalfToFloat(bits);
}

void KvSetElement(DType dtype, std::byte* dst, size_t i, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(dst + i * sizeof value, &value, sizeof value);
    return;
  }
  const uint16_t bits = dtype == DType::kBF16
                            ? ToBF16(value).bits
                            : _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(dst + i * sizeof bits, &bits, sizeof bits);
}

bool KvQuantizeRef(KvQuant quant, const KvPlane& plane, const std::byte* src, std::byte* out) {
  float amax = 0.0f;
  for (size_t i = 0; i < plane.elems(); ++i) {
    const float a = std::fabs(KvElement(plane.dtype, src, i));
    if (!(a < kKvHuge)) {
      std::memset(out, 0, KvQuantBytes(quant, plane));
      return false;
    }
    amax = std::max(amax, a);
  }
  if (quant == KvQuant::kInt4) {
    plane.v ? QuantizeInt4V(plane, src, out) : QuantizeInt4K(plane, src, out);
    return true;
  }
  const bool tiny = amax < kKvTiny;
  const float scale = tiny ? 0.0f : quant == KvQuant::kFp8 ? Fp8Scale(amax) : amax / 127.0f;
  const float inverse = tiny ? 0.0f : quant == KvQuant::kFp8 ? 1.0f / scale : 127.0f / amax;
  std::memcpy(out, &scale, sizeof scale);
  out += sizeof scale;
  for (size_t i = 0; i < plane.elems(); ++i) {
    const float y = KvElement(plane.dtype, src, i) * inverse;
    out[i] = quant == KvQuant::kFp8 ? std::byte{ToE4m3(y)}
                                    : static_cast<std::byte>(static_cast<int>(std::nearbyint(y)));
  }
  return true;
}

void KvDequantizeRef(KvQuant quant, const KvPlane& plane, const std::byte* in, std::byte* dst) {
  if (quant == KvQuant::kInt4) {
    plane.v ? DequantizeInt4V(plane, in, dst) : DequantizeInt4K(plane, in, dst);
    return;
  }
  const float scale = LoadF32(in);
  in += sizeof scale;
  for (size_t i = 0; i < plane.elems(); ++i) {
    const auto code = std::to_integer<uint8_t>(in[i]);
    const float y = quant == KvQuant::kFp8 ? FromE4m3(code) : static_cast<float>(static_cast<int8_t>(code));
    KvSetElement(plane.dtype, dst, i, y * scale);
  }
}

}  // namespace tidepool
