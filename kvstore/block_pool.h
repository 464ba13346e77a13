#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/block_layout.h"
#include "base/probe.h"
#include "kvstore/types.h"

namespace tidepool {

class BlockPool;

// BlockLease: the right to use one slot. Handle, move-only; dropping it gives the slot back (to the LRU
// list if the block is published, else to the free list under a new generation). Any thread may hold or
// drop it; the pool outlives all leases. Writing data() is for the one holder of an unpublished block.
class BlockLease {
 public:
  BlockLease() = default;
  BlockLease(BlockLease&& other) noexcept;
  BlockLease& operator=(BlockLease&& other) noexcept;
  ~BlockLease();

  bool empty() const { return pool_ == nullptr; }
  SlotRef ref() const { return ref_; }
  // layout().block_bytes() bytes, 64-byte aligned.
  std::span<std::byte> data() const;
  // A second lease on the same block: it stays until both are dropped.
  BlockLease Clone() const;

 private:
  friend class BlockPool;
  BlockLease(BlockPool* pool, SlotRef ref) : pool_(pool), ref_(ref) {}

  BlockPool* pool_ = nullptr;
  SlotRef ref_;
};

// A key became readable here (or no longer is).
struct BlockPoolEvent {
  BlockKey key;
  bool removed = false;
};

// BlockPool: the host tier. A fixed arena of slots, each empty, leased, or holding a published block
// that anyone may lease by key. Unleased published blocks are evicted in LRU order when Reserve needs
// room (a chain's tail before its head). Thread-safe; no call waits on I/O or on another holder.
class BlockPool {
 public:
  struct Options {
    BlockLayout layout;
    uint32_t slots = 0;
    // How many undrained events are kept; beyond that they are dropped and DrainEvents says so.
    size_t max_events = 1 << 16;
    MetricRegistry* metrics = nullptr;  // required; outlives the pool
  };

  struct Stats {
    uint32_t slots = 0;
    uint32_t free = 0;         // holding nothing
    uint32_t evictable = 0;    // published and unleased
    uint32_t leased = 0;       // at least one lease (published or not)
    uint32_t quarantined = 0;  // never to be used again
    uint64_t published = 0;    // keys readable now
  };

  struct Events {
    std::vector<BlockPoolEvent> events;
    bool lost = false;  // the queue overflowed: take a Snapshot (until then no event comes)
  };

  // InvalidArgument: a layout with a zero in it, or no slots. ResourceExhausted: the arena (slots x
  // block_bytes) could not be mapped.
  static absl::StatusOr<std::unique_ptr<BlockPool>> Create(const Options& options);
  ~BlockPool();

  const BlockLayout& layout() const;

  // `n` slots with undefined contents, all or none; evicts as needed. ResourceExhausted says how many
  // are leased, so that the caller can tell overload from a pool that is too small.
  absl::StatusOr<std::vector<BlockLease>> Reserve(size_t n);

  // Leases on the longest run keys[0..m) that is published here; marks them used.
  std::vector<BlockLease> LeasePrefix(std::span<const BlockKey> keys);
  // A lease on one published block; marks it used. nullopt is a miss, not an error.
  std::optional<BlockLease> Lease(const BlockKey& key);
  // How many of keys[0..) are published here in a row, without leasing or touching them.
  size_t MatchPrefix(std::span<const BlockKey> keys) const;

  // Makes the block readable under `key`; from now on its contents must not change. If another slot holds
  // that key already, the caller's slot is given up and the lease returned is on the other one (equal
  // contents by construction of the key). `parent` (the key of the block before it in the chain, if the
  // caller knows one) lets eviction take a chain from its tail; LeasePrefix teaches it too.
  BlockLease Publish(BlockLease lease, const BlockKey& key, const BlockKey* parent = nullptr);

  // Takes the slot out of use for good: something may still write to it.
  void Quarantine(BlockLease lease);

  Stats stats() const;
  // Oldest first, at most `max`.
  Events DrainEvents(size_t max);
  // All keys readable now; also discards pending events, which it subsumes.
  std::vector<BlockKey> Snapshot();

 private:
  friend class BlockLease;
  struct State;
  explicit BlockPool(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tidepool
