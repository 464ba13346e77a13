#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "kvstore/block_tier.h"
#include "kvstore/disk/rocks_index.h"
#include "kvstore/policy/policy.h"

namespace tidepool {

// ExtentTable: which extent of the file holds which block, which are free, and which goes next. Core, in
// memory; about 250 bytes a block. Not thread-safe.
//
// An extent is free, being written, live, left by another model (its record stays until the room is wanted),
// or retired (the disk failed there). A live one may be pinned by reads; one that is removed while pinned is
// free once the last of them is through.
class ExtentTable {
 public:
  using Id = uint32_t;

  struct Removed {
    BlockKey key;
    bool foreign = false;  // of another model: nobody was told of it
  };

  // `extents` >= 1. Policy ids are extents.
  ExtentTable(Id extents, std::unique_ptr<EvictionPolicy> policy);

  // At opening, before anything else: takes over an entry of the index. False where it cannot be right (its
  // place is beyond the file or taken).
  bool Restore(const IndexEntry& entry, bool foreign);
  // Ends that; older records are evicted first.
  void FinishRestore();

  std::optional<Id> Find(const BlockKey& key) const;
  // Of a live or a foreign extent.
  IndexEntry Entry(Id id) const;
  TierEntry Listed(Id id) const;
  RecordStamp stamp(Id id) const { return extents_[id].stamp; }
  uint64_t payload_bytes(Id id) const { return extents_[id].payload_bytes; }
  bool live(Id id) const { return id < extents_.size() && extents_[id].state == State::kLive; }
  // Holds a record of another model. RemoveForeign frees it.
  bool foreign(Id id) const { return id < extents_.size() && extents_[id].state == State::kForeign; }
  void RemoveForeign(Id id);
  // Ids to walk are below it.
  Id size() const { return static_cast<Id>(extents_.size()); }

  // An extent to write to; what had to go for it is appended to `removed`. nullopt: everything is pinned,
  // being written or retired.
  std::optional<Id> Allocate(std::vector<Removed>& removed);
  // The record is written: readable under entry.key, which is not there yet.
  void Commit(Id id, const IndexEntry& entry);
  // The write came to nothing.
  void Abandon(Id id);
  // The disk failed there: never again in this run. Of an extent being written.
  void Retire(Id id);

  void Pin(Id id);
  // The last pin of a removed extent frees it.
  void Unpin(Id id);
  // A read found it.
  void Touch(Id id);
  // A live one is gone from now on.
  void Remove(Id id);

  uint64_t live_count() const { return live_count_; }
  // Not free: live, being written, foreign, retired.
  uint64_t occupied() const { return capacity_ - free_.size(); }
  Id capacity() const { return capacity_; }

 private:
  enum class State : uint8_t { kFree, kWriting, kLive, kForeign, kRemoved, kRetired };
  static constexpr Id kNone = ~Id{0};

  struct Extent {
    BlockKey key;
    BlockKey parent;  // where has_parent
    RecordStamp stamp;
    uint64_t session = 0;
    uint64_t payload_bytes = 0;
    uint32_t turn = 0;
    uint32_t position = 0;
    float compute_seconds = 0;
    uint32_t stored_at = 0;
    uint32_t tenant = 0;    // in tenants_
    uint32_t children = 0;  // live ones that are linked to it
    Id linked = kNone;      // the parent's extent, while this one counts among its children
    uint16_t pins = 0;
    bool has_parent = false;
    State state = State::kFree;
  };

  Extent& Grow(Id id);
  void Fill(Extent& e, const IndexEntry& entry);
  void Link(Id id);
  void Unlink(Id id);
  void Offer(Id id);  // to the policy as a candidate, if it is one
  PolicyUse NextUse() { return {.request = ++requests_}; }

  const Id capacity_;
  const std::unique_ptr<EvictionPolicy> policy_;
  std::vector<Extent> extents_;               // as far as they were ever used
  std::vector<Id> free_;                      // taken from the back
  std::vector<Id> foreign_;                   // may name some that are not any more
  absl::flat_hash_map<BlockKey, Id> by_key_;  // live ones
  std::vector<std::string> tenants_;
  absl::flat_hash_map<std::string, uint32_t> tenant_ids_;
  uint64_t live_count_ = 0;
  uint64_t requests_ = 0;
};

}  // namespace tidepool
