#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kvstore/event_log.h"
#include "kvstore/key_index.h"
#include "kvstore/policy/policy.h"
#include "kvstore/policy/session_ends.h"
#include "kvstore/types.h"

namespace tidepool {

// PoolCore: which slot holds what, who leases it, and what goes when room is needed: everything about the
// host tier but its memory, its lock and its clock (BlockPool adds those). The shadow tuner runs small ones
// without any memory. Core: not thread-safe; `now` is passed in; what happened comes out as events and
// counts.
//
// A slot is free, or leased, or holds a published block (or both of the latter). Victims are published blocks
// that nobody leases, that no hard pin holds and that have no child here (a chain goes from its tail); the
// policy ranks them. Only where there is none, but parents of leased or pinned children are unleased, those
// go, the least recently used first.
//
// Requests are numbered, one per LeasePrefix. The conversation that a request carries on is recognised from
// its keys: the last block of each request's chain is marked, and a request whose keys contain a mark is a
// further turn. Marks of evicted blocks are remembered, too (SessionEnds, bounded). Marks on the first block
// of a chain do not count, nor on a block with several continuations: prompts that begin alike end there by
// accident.
class PoolCore {
 public:
  static constexpr uint32_t kNoSlot = KeyIndex::kNone;

  struct Options {
    uint32_t slots = 0;
    uint64_t slot_bytes = 1;
    std::unique_ptr<EvictionPolicy> policy;  // of capacity `slots`
    uint64_t tenant_quota_bytes = 0;         // 0: none
    std::map<std::string, uint64_t> tenant_quotas;
    double hard_pin_share = 1;
    size_t max_pins = 1 << 15;  // a slot counts its pins in 16 bits
  };

  // Counts since the start.
  struct Tally {
    uint64_t evicted_capacity = 0;
    uint64_t evicted_quota = 0;   // for a tenant's own quota
    uint64_t evicted_orphan = 0;  // of evicted_capacity: had children here
    uint64_t removed_erase = 0;
    uint64_t removed_quarantine = 0;
    uint64_t session_turns = 0;  // requests that carried on a conversation
    uint64_t pins_expired = 0;
    uint64_t pins_refused = 0;  // blocks of a pinned session beyond the share of hard pins
  };

  struct Taken {
    SlotRef ref;
    bool zero = false;  // it held another tenant's data: wipe it before it is handed out
  };

  struct Published {
    SlotRef ref;             // the slot that holds the key now
    bool duplicate = false;  // not the caller's: that one still has its lease, this one got one more
  };

  struct Counts {
    uint32_t free = 0, evictable = 0, leased = 0, quarantined = 0, hard_pinned = 0, soft_pinned = 0;
    uint64_t published = 0, pins = 0;
    std::array<uint64_t, kLeaseKinds> leases{};
  };

  struct Removed {
    uint64_t blocks = 0, leased = 0, pinned = 0;
  };

  struct SlotView {
    const BlockInfo* info;
    uint32_t leases;
    bool hard_pinned, soft_pinned;
  };

  explicit PoolCore(Options options);

  uint32_t slots() const { return static_cast<uint32_t>(slots_.size()); }

  // All or nothing: false where fewer than n slots can be had.
  bool Reserve(size_t n, const UseOptions& use, absl::Time now, std::vector<Taken>& out);
  // Leases the longest published run keys[0..m).
  void LeasePrefix(std::span<const BlockKey> keys, const UseOptions& use, std::vector<SlotRef>& out);
  std::optional<SlotRef> Lease(const BlockKey& key, LeaseKind kind);
  // Empty where there is a miss; not counted as hits.
  void LeaseMany(std::span<const BlockKey> keys, LeaseKind kind, std::vector<std::optional<SlotRef>>& out);
  void AddLease(SlotRef ref, LeaseKind kind);
  void DropLeases(std::span<const SlotRef> refs, LeaseKind kind);

  const KeyIndex& index() const { return index_; }
  const BlockInfo* Info(const BlockKey& key) const;

  // The lease's slot becomes readable as info.key.
  Published Publish(SlotRef ref, LeaseKind kind, BlockInfo info);

  // From here on contents that came into a slot reserved earlier are known as ClearedSince where they match:
  // all of the filter, or these keys. The last kClearsMax such orders are remembered; what is older than they
  // are counts as cleared.
  static constexpr size_t kClearsMax = 64;
  void NoteCleared(const BlockFilter& filter);
  void NoteCleared(std::span<const BlockKey> keys);
  // Whether a block of this description, in a slot that its holder has not published, was cleared since the
  // slot was reserved.
  bool ClearedSince(SlotRef ref, const BlockInfo& info) const;

  // Between the two, what is published is noted: who clears everything in steps learns what came behind its
  // back. Any number of them may overlap.
  void BeginWatch() { ++watches_; }
  void EndWatch() {
    if (--watches_ == 0) fresh_ = {};
  }
  // Calls `f(key)` for each that was noted and is still there.
  template <typename F>
  void ForEachFresh(const F& f) const {
    for (const Ref& r : fresh_) {
      if (IsLive(r)) f(infos_[r.slot].key);
    }
  }
  // The caller's lease ends with it.
  void Quarantine(SlotRef ref, LeaseKind kind);

  // One block that is readable; the caller emits what it wants in place of a removed event where `quiet`.
  // Returns what happened to it.
  Removed Erase(uint32_t slot, bool pinned, bool quiet);

  // nullopt: the slot holds nothing that is readable.
  std::optional<SlotView> View(uint32_t slot) const;
  bool Matches(uint32_t slot, const BlockFilter& filter) const;

  absl::StatusOr<uint64_t> Pin(const BlockKey& key, PinKind kind, absl::Time expires, absl::Time now);
  absl::StatusOr<uint64_t> PinSession(uint64_t session, PinKind kind, absl::Time expires, absl::Time now);
  bool Unpin(const BlockKey& key, absl::Time now);
  bool UnpinSession(uint64_t session, absl::Time now);
  // Ends the pins that are over.
  void Expire(absl::Time now);

  // A preempted request's reference (LeaseKind::kSwapped) on those of these leased blocks that are published:
  // until SwapIn they are evicted as softly pinned ones are, when nothing else is left. 0: on none.
  uint64_t SwapOut(std::span<const SlotRef> refs);
  // Ends it; ignores 0. What of it was evicted is gone.
  void SwapIn(uint64_t id);

  // Quotas from now on, in bytes; 0: none. What a tenant holds beyond its own goes by TrimTenants, or when it
  // next reserves or releases. True: these are the first, and entries were not ranked by tenant so far:
  // SetPolicy must follow before anything else.
  [[nodiscard]] bool SetQuotas(uint64_t tenant_quota_bytes, std::map<std::string, uint64_t> tenant_quotas);
  // Evicts at most `max` blocks of tenants above their quotas; how many. Fewer than `max`: there are no more
  // that could go.
  size_t TrimTenants(size_t max);

  // Ranks everything anew; what the old policy learnt is lost. O(slots).
  void SetPolicy(std::unique_ptr<EvictionPolicy> policy);
  const EvictionPolicy& policy() const { return *policy_; }

  Counts counts() const;
  const Tally& tally() const { return tally_; }
  // Tenant, slots charged to it, quota in slots (0: none).
  struct Tenant {
    std::string name;
    uint64_t used = 0;
    uint64_t quota = 0;
  };
  // Indexed as they were first seen; those that hold nothing stay listed.
  const std::vector<Tenant>& tenants() const { return tenants_; }

  // Events since the last call (the seq fields are unset).
  std::vector<PoolEvent>& events() { return events_; }

 private:
  struct Slot {
    uint64_t generation = 1;
    uint64_t publication = 0;  // number of the publication it holds; 0: none
    // The parent's slot still holds the parent as long as it has this number. Of a slot that holds nothing
    // published: how many clears there had been when it was reserved.
    uint64_t parent_publication = 0;
    uint64_t request = 0;  // that used it last
    uint64_t end_of = 0;   // the request whose chain ended here; 0: none did
    uint32_t leases = 0;
    uint32_t children = 0;  // published blocks here whose parent this is
    uint32_t parent = kNoSlot;
    uint32_t tenant = 0;          // charged for it; of a free slot: whose data it holds
    uint16_t hard = 0, soft = 0;  // pins
    bool charged = false;
    bool quarantined = false;
    bool extends = false;  // the request that used it last carried on a conversation
    bool dirty = false;    // somebody may have written to it

    bool published() const { return publication != 0; }
  };
  static_assert(sizeof(Slot) == 64);

  struct Ref {  // of a published block, for as long as it is that
    uint32_t slot;
    uint64_t publication;
  };

  struct PinRecord {
    PinKind kind;
    absl::Time expires;
    std::optional<BlockKey> key;  // else session, or neither where it was swapped out
    uint64_t session = 0;
    std::vector<Ref> blocks;
    bool swapped = false;  // a preempted request's
  };

  SlotRef RefOf(uint32_t i) const { return {i, slots_[i].generation}; }
  Slot& Get(SlotRef ref);
  bool IsVictim(const Slot& s) const {
    return s.published() && s.leases == 0 && s.children == 0 && s.hard == 0;
  }
  bool Reclaimable(const Slot& s) const { return s.published() && s.leases == 0 && s.hard == 0; }
  PolicyUse UseOf(const Slot& s) const { return {s.request, s.extends}; }
  uint32_t GroupOf(const Slot& s) const { return quotas_ ? s.tenant : 0; }

  struct Cleared {
    BlockFilter filter;
    std::optional<absl::flat_hash_set<BlockKey>> keys;  // these, in place of the filter
  };
  void Remember(Cleared cleared);
  bool Meets(const Cleared& cleared, const BlockInfo& info) const;

  uint32_t TenantId(std::string_view name);
  uint64_t QuotaOf(const std::string& tenant) const;  // slots
  // 0: no quota. Less than one slot is one: nobody asks for none at all with it.
  uint64_t QuotaSlots(uint64_t bytes) const;
  void Charge(uint32_t i, uint32_t tenant);
  void Discharge(uint32_t i);

  void Lease(uint32_t i, LeaseKind kind);
  // Its leases, pins or children may just have changed.
  void Refresh(uint32_t i);
  uint32_t ParentOf(const Slot& s) const;
  void LinkParent(uint32_t child, uint32_t parent);
  // After it: not in the index, no parent, no pins, not known to the policy.
  void Unpublish(uint32_t i, bool evicted);
  void Recycle(uint32_t i);
  void Evict(uint32_t i);
  bool EvictOne(uint32_t group);
  void EvictOrphaning(size_t n);
  void TrimTenant(uint32_t tenant);
  void Emit(PoolEventKind kind, const BlockKey& key) { events_.push_back({.kind = kind, .key = key}); }

  // The request of the turn before this one's; 0: this is no further turn.
  uint64_t LastTurn(std::span<const BlockKey> keys, std::span<const uint32_t> hits, uint64_t session);
  bool IsSessionEnd(const Slot& s, uint32_t position) const;

  bool IsLive(const Ref& r) const { return slots_[r.slot].publication == r.publication; }
  // Pins `i` for the record if the share of hard pins allows.
  bool PinSlot(uint32_t i, PinRecord& record);
  absl::StatusOr<uint64_t> AddPin(PinRecord record, const std::vector<uint32_t>& slots);
  void EndPin(uint64_t id);

  std::vector<Slot> slots_;
  std::vector<BlockInfo> infos_;                // of published blocks
  std::vector<std::optional<BlockKey>> roots_;  // of the chains of published blocks, where known
  KeyIndex index_;
  std::vector<uint32_t> free_;  // a stack: the slot used last is the warmest
  std::unique_ptr<EvictionPolicy> policy_;
  const uint64_t slot_bytes_;

  std::vector<Tenant> tenants_;
  std::map<std::string, uint32_t, std::less<>> tenant_ids_;
  bool quotas_;
  uint64_t default_quota_;                         // slots
  std::map<std::string, uint64_t> quota_by_name_;  // bytes

  const uint32_t max_hard_;
  const size_t max_pins_;
  uint64_t next_pin_ = 1;
  absl::flat_hash_map<uint64_t, PinRecord> pins_;
  absl::flat_hash_map<BlockKey, uint64_t> pin_of_key_;
  absl::flat_hash_map<uint64_t, uint64_t> pin_of_session_;
  using Expiry = std::pair<absl::Time, uint64_t>;  // of a pin that may be gone
  std::priority_queue<Expiry, std::vector<Expiry>, std::greater<>> expiries_;
  absl::flat_hash_map<uint64_t, std::vector<Ref>> sessions_;  // published blocks by session

  uint64_t requests_ = 0;
  uint64_t publications_ = 0;
  uint64_t clears_ = 0;          // so far
  std::deque<Cleared> cleared_;  // the last of them, oldest first
  uint32_t watches_ = 0;
  std::vector<Ref> fresh_;  // published while somebody watches
  SessionEnds ends_;
  std::array<uint64_t, kLeaseKinds> leases_{};
  uint32_t idle_ = 0;         // published and unleased
  uint32_t reclaimable_ = 0;  // of those: without a hard pin
  uint32_t hard_pinned_ = 0, soft_pinned_ = 0, quarantined_ = 0;
  Tally tally_;
  std::vector<PoolEvent> events_;
  std::vector<uint32_t> scratch_;
};

}  // namespace tidepool
