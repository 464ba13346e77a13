#pragma once

#include <cstdint>

namespace tidepool {

// A run of SoftCap (soft_cap.h); internal.
void SoftCapCpu(float* x, int64_t n, float cap);

}  // namespace tidepool
