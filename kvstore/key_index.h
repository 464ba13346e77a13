#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "kvstore/types.h"

namespace tidepool {

// Deleter of anonymous memory.
struct MemoryUnmap {
  size_t bytes = 0;
  void operator()(void* p) const;
};

// KeyIndex: from block key to a dense id below the capacity. An open-addressing table of 8-byte cells (32
// bits of a hash, the id) beside an array of the keys by id: a lookup touches one cell's cache line and,
// where the hash bits agree, the key, which is compared whole. Lookups of many keys overlap their cache
// misses.
//
// Memory: 32 bytes of key per id of capacity, and 8 bytes per cell, cells being the power of two that is at
// least 4/3 of the capacity; pages are committed as they are used. The hash is seeded per process: whoever
// can choose keys cannot choose where they collide. Not thread-safe (const members are, with each other).
class KeyIndex {
 public:
  static constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

  // capacity in [1, 2^31].
  explicit KeyIndex(uint32_t capacity);

  uint32_t Find(const BlockKey& key) const;
  // ids[i] = Find(keys[i]).
  void FindMany(std::span<const BlockKey> keys, uint32_t* ids) const;
  // Appends the ids of the longest run keys[0..m) that is here to `ids`; returns m.
  size_t FindPrefix(std::span<const BlockKey> keys, std::vector<uint32_t>& ids) const;

  // The id must not be in use and the key not be here.
  void Insert(const BlockKey& key, uint32_t id);
  // The id must be in use.
  void Erase(uint32_t id);

  // Of an id in use.
  const BlockKey& key(uint32_t id) const { return keys_[id]; }
  size_t size() const { return size_; }
  // Address space taken: what is committed when every id is in use.
  size_t memory_bytes() const;

 private:
  template <typename T>
  using Mapping = std::unique_ptr<T[], MemoryUnmap>;
  template <typename T>
  static Mapping<T> Map(size_t n);

  uint32_t Hash(const BlockKey& key) const;
  size_t Home(uint32_t hash) const { return hash >> shift_; }
  // The first cell from `at` whose hash bits are these, or the empty cell that ends the run.
  size_t Probe(uint32_t hash, size_t at) const;
  // keys.size() at most kBatch.
  void FindBatch(std::span<const BlockKey> keys, uint32_t* ids) const;

  static constexpr size_t kBatch = 64;

  const uint32_t capacity_;
  const uint64_t seed_;
  uint32_t shift_ = 0;
  size_t mask_ = 0;
  Mapping<uint64_t> cells_;  // hash << 32 | id + 1; 0: empty
  Mapping<BlockKey> keys_;
  size_t size_ = 0;
};

}  // namespace tidepool
