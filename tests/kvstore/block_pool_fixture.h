#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "kvstore/block_pool.h"

namespace tidepool {

inline BlockKey Key(uint64_t n) {
  BlockKey key;
  const uint64_t mixed = Mix64(n);
  std::memcpy(key.bytes.data(), &mixed, 8);
  std::memcpy(key.bytes.data() + 8, &n, 8);
  return key;
}

inline std::vector<BlockKey> Chain(uint64_t first, size_t n) {
  std::vector<BlockKey> keys;
  for (size_t i = 0; i < n; ++i) keys.push_back(Key(first + i));
  return keys;
}

// BlockPoolFixture: pools of small blocks on a clock that stands still.
class BlockPoolFixture : public testing::Test {
 protected:
  std::unique_ptr<BlockPool> Make(BlockPool::Options options) {
    options.layout = layout_;
    options.clock = &clock_;
    options.metrics = &metrics_;
    auto pool = BlockPool::Create(options);
    EXPECT_TRUE(pool.ok()) << pool.status();
    return std::move(*pool);
  }
  std::unique_ptr<BlockPool> Make(uint32_t slots, size_t max_events = 1 << 16) {
    return Make({.slots = slots, .max_events = max_events});
  }

  // What List gives, in pages of a few.
  static std::set<BlockKey> Keys(const BlockPool& pool, const BlockFilter& filter = {}) {
    std::set<BlockKey> keys;
    for (std::optional<uint64_t> cursor = 0; cursor;) {
      const auto page = pool.List(*cursor, 3, filter);
      EXPECT_LE(page.entries.size(), 3u);
      for (const auto& entry : page.entries) keys.insert(entry.info.key);
      cursor = page.next;
    }
    return keys;
  }

  BlockLayout layout_{.layers = 1, .kv_heads = 1, .head_dim = 8, .block_tokens = 4, .dtype = DType::kF32};
  FakeClock clock_;
  MetricRegistry metrics_;
};

}  // namespace tidepool
