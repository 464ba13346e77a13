#include "kernels/soft_cap_cpu.h"

#include <string.h>

#include "kernels/simd.h"

namespace tidepool {

void SoftCapCpu(float* x, int64_t n, float cap) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Store(x + i, CapLanes(Load(x + i), Set1(cap)));
  if (whole == n) return;
  float rest[kLanes] = {};
  const size_t bytes = static_cast<size_t>(n - whole) * sizeof(float);
  memcpy(rest, x + whole, bytes);
  Store(rest, CapLanes(Load(rest), Set1(cap)));
  memcpy(x + whole, rest, bytes);
}

}  // namespace tidepool
