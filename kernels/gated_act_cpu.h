#pragma once

#include <cstdint>

namespace tidepool {

// One row of GatedAct (gated_act.h); internal.
void SiluMulRowCpu(const float* gate, const float* up, int64_t inter, float* y);
void GeluTanhMulRowCpu(const float* gate, const float* up, int64_t inter, float* y);

}  // namespace tidepool
