// Blocks whose numbers look like keys and values: channels with a mean and a deviation of their own, a few of
// them far out in K.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "base/block_layout.h"
#include "base/rng.h"
#include "kernels/kv_codec.h"

namespace tidepool {

inline double Gaussian(Rng& rng) {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += rng.Uniform();
  return sum;
}

inline std::vector<std::byte> SyntheticBlock(const BlockLayout& layout, uint64_t seed) {
  std::vector<std::byte> out(layout.block_bytes());
  Rng rng(seed), channels(seed * 7919 + 13);
  for (uint32_t layer = 0; layer < layout.layers; ++layer) {
    for (const bool v : {false, true}) {
      for (uint32_t head = 0; head < layout.kv_heads; ++head) {
        for (uint32_t c = 0; c < layout.head_dim; ++c) {
          const bool outlier = !v && channels.Chance(0.04);
          const double mean = Gaussian(channels) * (outlier ? 12 : v ? 0.05 : 0.7);
          const double deviation = (0.3 + channels.Uniform()) * (outlier ? 3 : 1);
          for (uint32_t t = 0; t < layout.block_tokens; ++t) {
            const size_t at = layout.Offset(layer, v, head, t) + c * DTypeBytes(layout.dtype);
            KvSetElement(layout.dtype, out.data() + at, 0,
                         static_cast<float>(mean + deviation * Gaussian(rng)));
          }
        }
      }
    }
  }
  return out;
}

}  // namespace tidepool
