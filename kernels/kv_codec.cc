#include "kernels/kv_codec.h"

#include "kernels/cpu_features.h"
#include "kernels/kv_codec_cpu.h"

namespace tidepool {
namespace {

const KvCodecOps& Ops() { return Cpu().avx512 ? kKvCodecAvx512 : kKvCodecAvx2; }

KvPlaneView ViewOf(const KvPlane& p) {
  return {static_cast<int>(p.dtype), static_cast<int>(p.tokens), static_cast<int>(p.dim), p.v};
}
const uint8_t* Bytes(const std::byte* p) { return reinterpret_cast<const uint8_t*>(p); }
uint8_t* Bytes(std::byte* p) { return reinterpret_cast<uint8_t*>(p); }

}  // namespace

size_t KvQuantBytes(KvQuant quant, const KvPlane& plane) {
  if (quant != KvQuant::kInt4) return sizeof(float) + plane.elems();
  const size_t row = size_t{plane.dim / kKvGroup} * (kKvGroup / 2) + (plane.dim % kKvGroup + 1) / 2;
  const size_t pair = 2 * DTypeBytes(plane.dtype);
  const auto groups = [](size_t n) { return (n + kKvGroup - 1) / kKvGroup; };
  const size_t pairs = plane.v ? plane.tokens * groups(plane.dim) : groups(plane.tokens) * plane.dim;
  return pairs * pair + plane.tokens * row;
}

bool KvQuantize(KvQuant quant, const KvPlane& plane, const std::byte* src, std::byte* out) {
  if (Ops().quantize(static_cast<int>(quant), ViewOf(plane), Bytes(src), Bytes(out))) return true;
  return KvQuantizeRef(quant, plane, src, out);  // settles what is in there, and zeroes
}

void KvDequantize(KvQuant quant, const KvPlane& plane, const std::byte* in, std::byte* dst) {
  Ops().dequantize(static_cast<int>(quant), ViewOf(plane), Bytes(in), Bytes(dst));
}

void KvWiden(DType dtype, const std::byte* src, size_t n, float* out) {
  Ops().widen(static_cast<int>(dtype), Bytes(src), n, out);
}

void KvNarrow(DType dtype, const float* in, size_t n, std::byte* dst) {
  Ops().narrow(static_cast<int>(dtype), in, n, Bytes(dst));
}

}  // namespace tidepool
