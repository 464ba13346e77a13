#pragma once

#include <cstdint>
#include <span>

#include "base/dtype.h"
#include "kernels/thread_pool.h"

namespace tidepool {

// Embedding: y[t, :] = scale * table[ids[t], :] in float32 (exact where scale is 1).
// table: [vocab, hidden] row-major, kBF16 or kF32 (or kF16); y: [ids.size(), hidden] float32.
// The caller has checked 0 <= ids[t] < vocab. No ids is a no-op.
void Embedding(DType table_dtype, const void* table, int64_t hidden, std::span<const int32_t> ids,
               float scale, float* y, ThreadPool& pool);

}  // namespace tidepool
