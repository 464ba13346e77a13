#include "kernels/embedding.h"

#include <cstring>

#include "base/status.h"

namespace tidepool {

void Embedding(DType table_dtype, const void* table, int64_t hidden, std::span<const int32_t> ids,
               float scale, float* y, ThreadPool& pool) {
  TP_CHECK(hidden >= 0);
  const int64_t grain = 16384 / (hidden + 1) + 1;
  pool.ParallelFor(static_cast<int64_t>(ids.size()), grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = ids[static_cast<size_t>(t)] * hidden;
      float* __restrict out = y + t * hidden;
      switch (table_dtype) {
        case DType::kF32:
          std::memcpy(out, static_cast<const float*>(table) + first,
                      static_cast<size_t>(hidden) * sizeof(float));
          break;
        case DType::kBF16: {
          const BF16* row = static_cast<const BF16*>(table) + first;
          for (int64_t i = 0; i < hidden; ++i) out[i] = ToFloat(row[i]);
          break;
        }
        case DType::kF16: {
          const uint16_t* row = static_cast<const uint16_t*>(table) + first;
          for (int64_t i = 0; i < hidden; ++i) out[i] = HalfToFloat(row[i]);
          break;
        }
      }
      if (scale == 1.0f) continue;
      for (int64_t i = 0; i < hidden; ++i) out[i] *= scale;
    }
  });
}

}  // namespace tidepool
