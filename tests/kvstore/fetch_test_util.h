#pragma once

#include <cstring>
#include <span>
#include <vector>

#include "base/rng.h"
#include "kvstore/types.h"

namespace tidepool {

// Keys and contents by number, so that a block can be told from its key alone.

inline BlockKey TestKey(uint64_t n) {
  BlockKey key;
  for (size_t i = 0; i < key.bytes.size(); i += 8) {
    const uint64_t v = Mix64(n * 4 + i);
    std::memcpy(key.bytes.data() + i, &v, 8);
  }
  return key;
}

inline void Fill(std::span<std::byte> block, uint64_t seed) {
  Rng rng(seed);
  for (size_t i = 0; i + 8 <= block.size(); i += 8) {
    const uint64_t v = rng.Next();
    std::memcpy(block.data() + i, &v, 8);
  }
}

inline bool Holds(std::span<const std::byte> block, uint64_t seed) {
  std::vector<std::byte> want(block.size());
  Fill(want, seed);
  return std::memcmp(block.data(), want.data(), want.size()) == 0;
}

}  // namespace tidepool
