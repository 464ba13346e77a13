#include "kernels/gated_act_cpu.h"

#include <string.h>

#include "kernels/simd.h"

namespace tidepool {
namespace {

struct SiluMul {
  TP_INLINE F16 Of(F16 gate, F16 up) {
    const F16 one = Set1(1.0f);
    return Mul(Div(gate, Add(one, Exp(Sub(Zero(), gate)))), up);
  }
};

struct GeluTanhMul {
  TP_INLINE F16 Of(F16 gate, F16 up) {
    const F16 cube = Mul(Mul(gate, gate), gate);
    const F16 inner = Mul(Set1(0.7978845608028654f), Fma(Set1(0.044715f), cube, gate));
    const F16 half = Mul(Set1(0.5f), gate);
    return Mul(Mul(half, Add(Set1(1.0f), Tanh(inner))), up);
  }
};

template <typename Op>
TP_INLINE void Row(const float* gate, const float* up, int64_t inter, float* y) {
  const int64_t whole = inter / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Store(y + i, Op::Of(Load(gate + i), Load(up + i)));
  if (whole == inter) return;
  // The rest through the same vector code, so that an element's bits do not depend on where it lies.
  float g[kLanes] = {}, u[kLanes] = {}, out[kLanes];
  const size_t rest = static_cast<size_t>(inter - whole);
  memcpy(g, gate + whole, rest * sizeof(float));
  memcpy(u, up + whole, rest * sizeof(float));
  Store(out, Op::Of(Load(g), Load(u)));
  memcpy(y + whole, out, rest * sizeof(float));
}

}  // namespace

void SiluMulRowCpu(const float* gate, const float* up, int64_t inter, float* y) {
  Row<SiluMul>(gate, up, inter, y);
}

void GeluTanhMulRowCpu(const float* gate, const float* up, int64_t inter, float* y) {
  Row<GeluTanhMul>(gate, up, inter, y);
}

}  // namespace tidepool
