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

// How much of a chain one worker holds.
struct HeldPrefix {
  uint32_t blocks = 0;       // [0, blocks), in whatever tier
  uint32_t near_blocks = 0;  // [0, near_blocks), in the host tier or nearer; the rest may be on disk
  bool operator==(const HeldPrefix&) const = default;
};

// A part of a chain that one worker holds without what comes before it: a decode worker that read its
// prompt's blocks where another process of its host has them holds those of the answers alone.
struct HeldRun {
  uint32_t begin = 0, end = 0;  // [begin, end), in whatever tier; equal: there is none
  uint32_t near_end = 0;        // [begin, near_end), in the host tier or nearer
  bool operator==(const HeldRun&) const = default;
};

// PrefixIndex: which workers say that they hold which block, and in which tiers. Soft state: a wrong entry
// costs a miss, never an answer. Not thread-safe.
class PrefixIndex {
 public:
  struct Holder {
    WorkerIndex worker : 24;
    uint32_t tiers : 8;  // bit Tier

    bool near() const { return (tiers & ~TierBit(Tier::kDisk)) != 0; }
    bool in(Tier tier) const { return (tiers & TierBit(tier)) != 0; }
  };
  static constexpr uint32_t TierBit(Tier tier) { return 1u << static_cast<uint32_t>(tier); }

  // At most `max_entries` (block, worker) pairs; beyond that Add is ignored and counted. Workers are below
  // 2^24.
  explicit PrefixIndex(size_t max_entries) : max_entries_(max_entries) {}

  void Add(const BlockKey& key, WorkerIndex worker, Tier tier = Tier::kHost);
  void Remove(const BlockKey& key, WorkerIndex worker, Tier tier = Tier::kHost);
  // Forgets all of one worker: O(its blocks).
  void Clear(WorkerIndex worker);

  // out[w]: how much of keys[0..) worker w holds in a row. `out` gets `workers` elements. Costs one lookup a
  // block up to the longest prefix, and one step for each of its holders.
  void Match(std::span<const BlockKey> keys, size_t workers, std::vector<HeldPrefix>& out) const;
  // And runs[w]: the last part that w holds beyond its prefix, up to the first key that nobody holds.
  void Match(std::span<const BlockKey> keys, size_t workers, std::vector<HeldPrefix>& out,
             std::vector<HeldRun>& runs) const;
  // Borrowed until the next change; empty: nobody's.
  std::span<const Holder> Holders(const BlockKey& key) const;
  // Of one worker, in no particular order. Borrowed until the next change.
  const absl::flat_hash_set<BlockKey>& Keys(WorkerIndex worker) const;

  size_t entries() const { return entries_; }
  size_t blocks(WorkerIndex worker) const;
  uint64_t ignored() const { return ignored_; }

 private:
  void Detach(const BlockKey& key, WorkerIndex worker);

  const size_t max_entries_;
  size_t entries_ = 0;
  uint64_t ignored_ = 0;
  // Most blocks are on one worker; hot prefixes are on a few.
  absl::flat_hash_map<BlockKey, absl::InlinedVector<Holder, 2>> holders_;
  std::vector<absl::flat_hash_set<BlockKey>> by_worker_;
};

}  // namespace tidepool
