#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/block_layout.h"
#include "base/clock.h"
#include "base/probe.h"
#include "kvstore/arena.h"
#include "kvstore/event_log.h"
#include "kvstore/policy/policy.h"
#include "kvstore/types.h"

namespace tidepool {

class BlockPool;

// BlockLease: the right to use one slot. Handle, move-only; dropping it gives the slot back (if the block is
// published it stays readable until it is evicted, else the slot becomes free under a new generation). Any
// thread may hold or drop it; the pool outlives all leases. Writing data() is for the one holder of an
// unpublished block.
class BlockLease {
 public:
  BlockLease() = default;
  BlockLease(BlockLease&& other) noexcept
      : owner_(std::exchange(other.owner_, nullptr)),
        generation_(other.generation_),
        slot_(other.slot_),
        kind_(other.kind_) {}
  BlockLease& operator=(BlockLease&& other) noexcept;
  ~BlockLease() {
    if (owner_ != nullptr) Drop();
  }

  bool empty() const { return owner_ == nullptr; }
  SlotRef ref() const { return {slot_, generation_}; }
  LeaseKind kind() const { return kind_; }
  // layout().block_bytes() bytes, 64-byte aligned.
  std::span<std::byte> data() const;
  // A second lease on the same block: it stays until both are dropped.
  BlockLease Clone() const { return Clone(kind_); }
  BlockLease Clone(LeaseKind kind) const;
  // Of all of them (empty for empty ones), with as few lock operations as there are pools in a row.
  static std::vector<BlockLease> CloneAll(std::span<const BlockLease> leases, LeaseKind kind);
  // Whose slot it is: a pool compares with itself.
  const BlockPool* owner() const { return owner_; }

  // Drops all of them (empty ones too) with as few lock operations as there are pools and kinds in a row:
  // how to end a long prefix.
  static void DropAll(std::vector<BlockLease> leases);

 private:
  friend class BlockPool;
  // Takes over one lease that the pool has counted already.
  BlockLease(BlockPool* owner, SlotRef ref, LeaseKind kind)
      : owner_(owner), generation_(ref.generation), slot_(ref.slot), kind_(kind) {}
  void Drop();

  // Thousands of them change hands at once: small, so no SlotRef with its padding.
  BlockPool* owner_ = nullptr;
  uint64_t generation_ = 0;
  uint32_t slot_ = 0;
  LeaseKind kind_ = LeaseKind::kSequence;
};
static_assert(sizeof(BlockLease) == 24);

// SwappedBlocks: what a preempted request has in a pool: no slot is kept for it, but what its blocks hold is
// evicted only when nothing else is left to go. Handle, move-only; dropping it makes them ordinary entries.
// Any thread; the pool outlives it.
class SwappedBlocks {
 public:
  SwappedBlocks() = default;
  SwappedBlocks(SwappedBlocks&& other) noexcept
      : pool_(std::exchange(other.pool_, nullptr)), id_(other.id_) {}
  SwappedBlocks& operator=(SwappedBlocks&& other) noexcept;
  ~SwappedBlocks() { Drop(); }

  bool empty() const { return pool_ == nullptr; }
  void Drop();

 private:
  friend class BlockPool;
  SwappedBlocks(BlockPool* pool, uint64_t id) : pool_(pool), id_(id) {}

  BlockPool* pool_ = nullptr;
  uint64_t id_ = 0;
};

// BlockPool: the host tier. A fixed arena of slots, each empty, leased, or holding a published block that
// anyone may lease by key. Published blocks that nobody leases are evicted when Reserve needs room: a chain
// from its tail, in the order of the policy (policy/policy.h); a tenant above its quota pays with its own
// blocks first. Thread-safe; no call waits on I/O or on another holder, and none holds the lock longer than
// its own leases need (listings and removals by filter work in steps).
class BlockPool final {
 public:
  struct Options {
    BlockLayout layout;
    uint32_t slots = 0;
    // One of PolicyNames(); "auto": begins with turn-aware, and a shadow tuner picks among them
    // (policy/tuner.h); "belady" in simulation.
    std::string policy = "turn-aware";
    NextUse next_use;         // for belady
    uint64_t turn_bonus = 0;  // PolicyOptions::turn_bonus
    // What each tenant's blocks may take, leased ones included; 0: no limit. `tenant_quotas` overrides it by
    // name.
    uint64_t tenant_quota_bytes = 0;
    std::map<std::string, uint64_t> tenant_quotas;
    // Hard pins hold at most this share of the slots.
    double hard_pin_share = 0.5;
    // How many events `events` keeps where the pool makes the log itself.
    size_t max_events = 1 << 16;
    std::shared_ptr<EventLog> events;  // shared with the other tiers of the process; null: the pool makes one
    const Clock* clock = &Clock::Real();
    MetricRegistry* metrics = nullptr;  // required; outlives the pool
    ArenaOptions memory;
  };

  struct Stats {
    uint32_t slots = 0;
    uint32_t free = 0;                           // holding nothing
    uint32_t evictable = 0;                      // published and unleased (pinned ones too)
    uint32_t leased = 0;                         // at least one lease (published or not)
    uint32_t quarantined = 0;                    // never to be used again
    uint64_t published = 0;                      // keys readable now
    std::array<uint64_t, kLeaseKinds> leases{};  // leases held, by LeaseKind; a slot may have several
    uint32_t hard_pinned = 0,
             soft_pinned = 0;  // slots; one with both counts as hard; swapped-out ones are soft
    uint64_t pins = 0;         // pins in force (each on a chain or a session)
    std::string policy;        // in force now
  };

  struct TenantUsage {
    std::string tenant;
    uint64_t bytes = 0;  // in slots charged to it
    uint64_t quota = 0;  // 0: none
  };

  struct Removed {
    uint64_t blocks = 0;  // no longer readable
    uint64_t bytes = 0;
    uint64_t leased = 0;  // of those: still leased, their slots are freed when the leases end
    uint64_t pinned = 0;  // left as they are because of a hard pin
  };

  struct Pinned {
    uint64_t blocks = 0;  // that hold the pin now
    uint64_t bytes = 0;
  };

  struct Entry {
    BlockInfo info;
    uint32_t leases = 0;
    bool hard_pinned = false, soft_pinned = false;
  };
  struct Page {
    std::vector<Entry> entries;
    std::optional<uint64_t> next;  // the cursor to go on with; none: that was all
  };

  // InvalidArgument: a layout with a zero in it, no slots, no such policy. ResourceExhausted: the arena
  // (slots x block_bytes) could not be mapped.
  static absl::StatusOr<std::unique_ptr<BlockPool>> Create(const Options& options);
  ~BlockPool();

  const BlockLayout& layout() const;
  // The memory of the slots; for whoever shares it with other processes.
  const SlotArena& arena() const;

  // --- leases ---

  // `n` slots, all or none; evicts as needed. Contents are undefined but never another tenant's: a slot that
  // passes from one tenant to another (or to none) is zeroed first. ResourceExhausted says how many are
  // leased and pinned, so that the caller can tell overload from a pool that is too small. A tenant at its
  // quota pays with its own unleased blocks; where it has none left, it may exceed the quota while its
  // requests run.
  absl::StatusOr<std::vector<BlockLease>> Reserve(size_t n, const UseOptions& use = {});

  // Leases on the longest run keys[0..m) that is published here, as one request's use of them.
  std::vector<BlockLease> LeasePrefix(std::span<const BlockKey> keys, const UseOptions& use = {});
  // A lease on one published block; marks it used. nullopt is a miss, not an error.
  std::optional<BlockLease> Lease(const BlockKey& key, LeaseKind kind = LeaseKind::kSequence);
  // One lease per key, empty where there is a miss; under one lock, and not counted as hits. (Recency counts
  // from when a block is let go, whatever it was leased for, but for kTierIo: that is nobody's use of it.)
  std::vector<BlockLease> LeaseMany(std::span<const BlockKey> keys, LeaseKind kind);
  // How many of keys[0..) are published here in a row, without leasing or touching them.
  size_t MatchPrefix(std::span<const BlockKey> keys) const;
  // Which of them are published here, without leasing or touching them.
  std::vector<bool> Contains(std::span<const BlockKey> keys) const;

  // Makes the block readable under `info.key`; from now on its contents must not change. If another slot
  // holds that key already, the caller's slot is given up and the lease returned is on the other one (equal
  // contents by construction of the key). `info.parent` lets eviction take a chain from its tail;
  // LeasePrefix teaches it too.
  BlockLease Publish(BlockLease lease, BlockInfo info);
  // The same for contents that were read or fetched into the slot rather than computed. False, and the lease
  // as it was: a Clear or Erase meant this block after the slot was reserved, so what was read may be what
  // was to be forgotten. It stays unpublished; its holder may use it.
  bool PublishLoaded(BlockLease& lease, BlockInfo info);
  // What Publish was told of a block that is readable here.
  std::optional<BlockInfo> Info(const BlockKey& key) const;

  // A request gives its leases back for now: its published blocks of this pool stay as long as there is
  // anything else to evict, and count as LeaseKind::kSwapped. Nothing is copied: what the pool holds of a
  // request is what was swapped out. All leases are dropped.
  SwappedBlocks SwapOut(std::vector<BlockLease> leases);

  // Takes the slot out of use for good: something may still read from or write to it.
  void Quarantine(BlockLease lease);

  // --- administration ---

  // At most `max` blocks that match, in slot order from `cursor` (0: the start). What is published or evicted
  // between two pages may be missed or seen twice.
  Page List(uint64_t cursor, size_t max, const BlockFilter& filter = {}) const;

  // Makes these blocks misses at once; slots are freed when the last lease ends. Hard-pinned ones stay unless
  // `pinned`. `moved_to`: the block lives on there, and the event says so (and it may be loaded again).
  Removed Erase(std::span<const BlockKey> keys, bool pinned = false,
                std::optional<Tier> moved_to = std::nullopt);
  // The same for all that match: those published before the call are gone when it returns. Works in steps of
  // some hundred blocks, between which others get the lock. With a filter that matches all, one `cleared`
  // event stands for them (if none stays).
  Removed Clear(const BlockFilter& filter, bool pinned = false);

  // Pins the block and what comes before it in its chain, for `ttl` from now; pinning a key or session again
  // replaces its pin. NotFound: not here. InvalidArgument: ttl <= 0. ResourceExhausted: hard pins would
  // exceed hard_pin_share, or there are too many pins.
  absl::StatusOr<Pinned> Pin(const BlockKey& key, PinKind kind, absl::Duration ttl);
  // Pins what is here of a session (BlockInfo::session) with the chains up to it, and what it publishes while
  // the pin lasts (as far as hard_pin_share allows). No block yet is no error.
  absl::StatusOr<Pinned> PinSession(uint64_t session, PinKind kind, absl::Duration ttl);
  // Ends the pin that was set on exactly this key or session. False: there was none (or it has expired).
  bool Unpin(const BlockKey& key);
  bool UnpinSession(uint64_t session);

  Stats stats() const;
  // Tenants that hold something, most first.
  std::vector<TenantUsage> tenants() const;
  // Options::tenant_quota_bytes and tenant_quotas from now on. What is beyond them and not leased or pinned
  // is evicted before this returns, in steps. The first quotas that a pool gets rank its blocks anew by
  // tenant: what the policy has learnt of them is lost.
  void SetTenantQuotas(uint64_t tenant_quota_bytes, std::map<std::string, uint64_t> tenant_quotas);

  // --- events ---

  // Of this tier and those that share the log; see event_log.h for how several readers follow it.
  EventLog& events() const;

 private:
  friend class BlockLease;
  friend class SwappedBlocks;
  struct State;
  explicit BlockPool(std::unique_ptr<State> state);
  std::span<std::byte> SlotBytes(uint32_t slot) const;
  // On slots that are leased already.
  void AddLeases(std::span<const SlotRef> refs, LeaseKind kind);
  void DropLeases(std::span<const SlotRef> refs, LeaseKind kind);
  void SwapIn(uint64_t id);
  BlockLease PublishLocked(BlockLease lease, BlockInfo info, BlockLease& given_up);
  std::unique_ptr<State> state_;
};

}  // namespace tidepool
