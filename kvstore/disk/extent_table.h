#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "kvstore/block_tier.h"
#include "kvstore/disk/page_runs.h"
#include "kvstore/disk/rocks_index.h"
#include "kvstore/policy/policy.h"

namespace tidepool {

// ExtentTable: which block lies where in the file, what is free, and which block goes next. Core, in memory;
// about 300 bytes a block. Not thread-safe.
//
// An extent is a run of pages that holds one record. Records come in a few sizes (a full one, and so many
// thirty-seconds of it, a quarter at least), so that what one leaves another fits into. An extent is being
// written, live, left by another model (its record stays until the room is wanted), stale (its block was
// written again elsewhere, and somebody still reads it), or retired (the disk failed there). A live one may
// be pinned by reads; one that is removed while pinned is free once the last of them is through. Its id is
// its handle; the place may change (Relocate).
class ExtentTable {
 public:
  using Id = uint32_t;

  struct Removed {
    BlockKey key;
    bool foreign = false;  // of another model: nobody was told of it
  };

  // How many records there may be at once in `pages`: ids are below it.
  static Id MaxRecords(uint64_t pages, uint32_t record_pages);

  // `pages` of file for records of at most `record_pages` (both at least 1). Policy ids are extents.
  ExtentTable(uint64_t pages, uint32_t record_pages, std::unique_ptr<EvictionPolicy> policy);

  // At opening, before anything else: takes over an entry of the index, of a record of so many bytes. False
  // where it cannot be right (its place is beyond the file or taken).
  bool Restore(const IndexEntry& entry, uint64_t record_bytes, bool foreign);
  // Ends that; older records are evicted first.
  void FinishRestore();

  std::optional<Id> Find(const BlockKey& key) const;
  // Of a live or a foreign extent.
  IndexEntry Entry(Id id) const;
  TierEntry Listed(Id id) const;
  RecordStamp stamp(Id id) const { return extents_[id].stamp; }
  uint64_t payload_bytes(Id id) const { return extents_[id].payload_bytes; }
  uint64_t stored_bytes(Id id) const { return extents_[id].stored_bytes; }
  RecordEncoding encoding(Id id) const { return extents_[id].encoding; }
  uint32_t version(Id id) const { return extents_[id].version; }
  // Where it is: its first page, and how many.
  uint64_t page(Id id) const { return extents_[id].page; }
  uint32_t pages(Id id) const { return extents_[id].pages; }
  bool live(Id id) const { return id < extents_.size() && extents_[id].state == State::kLive; }
  // Holds a record of another model. RemoveForeign frees it.
  bool foreign(Id id) const { return id < extents_.size() && extents_[id].state == State::kForeign; }
  void RemoveForeign(Id id);
  // Ids to walk are below it.
  Id size() const { return static_cast<Id>(extents_.size()); }

  // An extent for a record of so many bytes (at most a full one); what had to go for it is appended to
  // `removed`. nullopt: everything is pinned, being written or retired.
  std::optional<Id> Allocate(uint64_t record_bytes, std::vector<Removed>& removed);
  // What would have to go first for such a record; nullopt: there is room, or nothing that could go.
  std::optional<BlockKey> NextVictim(uint64_t record_bytes);
  // The record is written: readable under entry.key, which is not there yet.
  void Commit(Id id, const IndexEntry& entry);
  // The record of a live block was written again, to `fresh`: it lies there from now on, as `entry` says, and
  // `fresh` is no id any more. What reads the old place (pins) goes on doing so.
  void Relocate(Id id, Id fresh, const IndexEntry& entry);
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
  // Pages of live ones, with what rounding to a size took.
  uint64_t live_pages() const { return live_pages_; }
  // Pages that are not free: of live ones, being written, foreign, stale, retired.
  uint64_t occupied() const { return pages_ - runs_.free_pages(); }
  // Of a record of so many bytes, in pages.
  uint32_t SizeOf(uint64_t record_bytes) const;

 private:
  enum class State : uint8_t { kFree, kWriting, kLive, kForeign, kRemoved, kStale, kRetired };
  static constexpr Id kNone = ~Id{0};

  struct Extent {
    BlockKey key;
    BlockKey parent;  // where has_parent
    RecordStamp stamp;
    uint64_t session = 0;
    uint64_t payload_bytes = 0;
    uint64_t stored_bytes = 0;
    uint64_t page = 0;
    uint32_t pages = 0;
    uint32_t turn = 0;
    uint32_t position = 0;
    float compute_seconds = 0;
    uint32_t stored_at = 0;
    uint32_t tenant = 0;    // in tenants_
    uint32_t children = 0;  // live ones that are linked to it
    Id linked = kNone;      // the parent's extent, while this one counts among its children
    Id stale = kNone;       // its former place, which is free when nobody reads this one any more
    uint16_t pins = 0;
    uint8_t version = kRecordVersion;
    RecordEncoding encoding = RecordEncoding::kPlain;
    bool has_parent = false;
    State state = State::kFree;
  };

  // An id for these pages, which were taken.
  Id Make(uint64_t page, uint32_t pages);
  bool HasId() const { return !free_ids_.empty() || extents_.size() < ids_max_; }
  // Its pages and its id are free.
  void Free(Id id);
  std::optional<Id> PolicyVictim();
  // A live one beside the longest free run.
  std::optional<Id> Neighbour() const;
  void Evict(Id id, std::vector<Removed>& removed);
  void Leave(Id id);  // what Evict and Remove have in common
  void Fill(Extent& e, const IndexEntry& entry);
  void Link(Id id);
  void Unlink(Id id);
  void Offer(Id id);  // to the policy as a candidate, if it is one
  PolicyUse NextUse() { return {.request = ++requests_}; }

  const uint64_t pages_;
  const uint32_t record_pages_, step_pages_, least_pages_;  // sizes: full, between two, the smallest
  const Id ids_max_;
  const std::unique_ptr<EvictionPolicy> policy_;
  PageRuns runs_;
  std::vector<Extent> extents_;               // as far as they were ever used
  std::vector<Id> free_ids_;                  // of them
  absl::btree_map<uint64_t, Id> by_page_;     // all that are not free, by their first page
  std::vector<Id> foreign_;                   // may name some that are not any more
  absl::flat_hash_map<BlockKey, Id> by_key_;  // live ones
  std::vector<std::string> tenants_;
  absl::flat_hash_map<std::string, uint32_t> tenant_ids_;
  uint64_t live_count_ = 0;
  uint64_t live_pages_ = 0;
  uint64_t requests_ = 0;
};

}  // namespace tidepool
