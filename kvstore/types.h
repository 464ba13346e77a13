#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <cstring>
#include <string>

#include "base/digest.h"

namespace tidepool {

// BlockKey: the name of a sealed block's content; see keys.h for how it is made.
struct BlockKey {
  std::array<uint8_t, 32> bytes{};

  auto operator<=>(const BlockKey&) const = default;
  std::string ToHex() const { return HexEncode(bytes); }

  template <typename H>
  friend H AbslHashValue(H h, const BlockKey& k) {
    // The key is a cryptographic digest already: eight of its bytes are a hash.
    uint64_t v;
    std::memcpy(&v, k.bytes.data(), sizeof v);
    return H::combine(std::move(h), v);
  }
};

// SlotRef: a page of memory and the number that moves on at every reassignment. What the wire carries
// in place of an address: a frame with an old generation is dropped.
struct SlotRef {
  uint32_t slot = 0;
  uint64_t generation = 0;
  auto operator<=>(const SlotRef&) const = default;
};

}  // namespace tidepool
