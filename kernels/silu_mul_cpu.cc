#include "kernels/silu_mul_cpu.h"

#include <string.h>

#include "kernels/simd.h"

namespace tidepool {
namespace {

TP_INLINE F16 SiluMulLanes(F16 gate, F16 up) {
  const F16 one = Set1(1.0f);
  return Mul(Div(gate, Add(one, Exp(Sub(Zero(), gate)))), up);
}

}  // namespace

void SiluMulRowCpu(const float* gate, const float* up, int64_t inter, float* y) {
  const int64_t whole = inter / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Store(y + i, SiluMulLanes(Load(gate + i), Load(up + i)));
  if (whole == inter) return;
  // The rest through the same vector code, so that an element's bits do not depend on where it lies.
  float g[kLanes] = {}, u[kLanes] = {}, out[kLanes];
  const size_t rest = static_cast<size_t>(inter - whole);
  memcpy(g, gate + whole, rest * sizeof(float));
  memcpy(u, up + whole, rest * sizeof(float));
  Store(out, SiluMulLanes(Load(g), Load(u)));
  memcpy(y + whole, out, rest * sizeof(float));
}

}  // namespace tidepool
