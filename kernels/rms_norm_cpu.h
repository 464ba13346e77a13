#pragma once

#include <cstdint>

namespace tidepool {

// One row of RmsNorm (rms_norm.h); internal.
void RmsNormRowCpu(const float* x, const float* w, int64_t hidden, float eps, float* y);

}  // namespace tidepool
