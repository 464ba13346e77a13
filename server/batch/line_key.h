#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

#include "base/digest.h"

namespace tidepool {

// What a line is known by: 128 bits of SHA-256 over its custom_id, or over its number where it has none.
// Equal keys are equal lines: nobody finds two texts of one digest.
using LineKey = std::array<uint8_t, 16>;

inline LineKey KeyOf(std::string_view custom_id, uint64_t number) {
  Sha256 digest;
  if (custom_id.empty()) {
    digest.UpdateField("line").UpdateU64(number);
  } else {
    digest.UpdateField("id").UpdateField(custom_id);
  }
  const Sha256Digest full = digest.Finish();
  LineKey key;
  std::copy_n(full.begin(), key.size(), key.begin());
  return key;
}

}  // namespace tidepool
