#pragma once

#include <cstdint>

namespace tidepool {

// One row of SiluMul (silu_mul.h); internal.
void SiluMulRowCpu(const float* gate, const float* up, int64_t inter, float* y);

}  // namespace tidepool
