#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/container/inlined_vector.h"
#include "kvstore/types.h"
#include "scheduler/types.h"

namespace tidepool {

// PrefixIndex: which workers say that they hold which block. Soft state: a wrong entry costs a miss, never
// an answer. Not thread-safe.
class PrefixIndex {
 public:
  // At most `max_entries` (block, worker) pairs; beyond that Add is ignored and counted.
  explicit PrefixIndex(size_t max_entries) : max_entries_(max_entries) {}

  void Add(const BlockKey& key, WorkerIndex worker);
  void Remove(const BlockKey& key, WorkerIndex worker);
  // Forgets all of one worker: O(its blocks).
  void Clear(WorkerIndex worker);

  // out[w]: how many of keys[0..) worker w holds in a row. `out` gets `workers` elements. Costs one lookup a
  // block up to the longest prefix, and one step for each of its holders.
  void Match(std::span<const BlockKey> keys, size_t workers, std::vector<uint32_t>& out) const;

  size_t entries() const { return entries_; }
  size_t blocks(WorkerIndex worker) const;
  uint64_t ignored() const { return ignored_; }

 private:
  void Detach(const BlockKey& key, WorkerIndex worker);

  const size_t max_entries_;
  size_t entries_ = 0;
  uint64_t ignored_ = 0;
  // Most blocks are on one worker; hot prefixes are on a few.
  absl::flat_hash_map<BlockKey, absl::InlinedVector<WorkerIndex, 2>> holders_;
  std::vector<absl::flat_hash_set<BlockKey>> by_worker_;
};

}  // namespace tidepool
