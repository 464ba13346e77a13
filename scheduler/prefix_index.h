#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

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
//
// A block that one worker holds takes 40 bytes, 4.6 to 9.1 of hash table and 4 of its worker's list; a second
// holder 60 more (its list), each further one 12 to 16. bytes() says what it takes now. The table is made of
// shards that grow one by one, so that no Add stops for longer than it takes to copy one (below 0.1 ms).
class PrefixIndex {
 public:
  struct Holder {
    WorkerIndex worker : 24;
    uint32_t tiers : 8;  // bit Tier
    uint32_t at;         // for the index's own use

    bool near() const { return (tiers & ~TierBit(Tier::kDisk)) != 0; }
    bool in(Tier tier) const { return (tiers & TierBit(tier)) != 0; }
  };
  static constexpr uint32_t TierBit(Tier tier) { return 1u << static_cast<uint32_t>(tier); }

  // At most `max_entries` (block, worker) pairs; beyond that Add is ignored and counted. Workers are below
  // 2^24 - 1.
  explicit PrefixIndex(size_t max_entries);

  void Add(const BlockKey& key, WorkerIndex worker, Tier tier = Tier::kHost);
  void Remove(const BlockKey& key, WorkerIndex worker, Tier tier = Tier::kHost);
  // Forgets all of one worker: O(its blocks).
  void Clear(WorkerIndex worker);

  // out[w]: how much of keys[0..) worker w holds in a row. `out` gets `workers` elements. Costs one lookup a
  // block up to the longest prefix, and one step for each of its holders. ChainProbe asks less.
  void Match(std::span<const BlockKey> keys, size_t workers, std::vector<HeldPrefix>& out) const;
  // And runs[w]: the last part that w holds beyond its prefix, up to the first key that nobody holds.
  void Match(std::span<const BlockKey> keys, size_t workers, std::vector<HeldPrefix>& out,
             std::vector<HeldRun>& runs) const;
  // By worker, ascending. Borrowed until the next change; empty: nobody's.
  std::span<const Holder> Holders(const BlockKey& key) const;
  // Null: `worker` is not among them.
  static const Holder* Find(std::span<const Holder> holders, WorkerIndex worker);
  // Ask the memory for what Holders(key) will read first, and (once that is there) next.
  void Prefetch(const BlockKey& key) const;
  void PrefetchEntry(const BlockKey& key) const;
  // Calls visit(key) for every block of one worker, in no particular order. Nothing may be changed meanwhile.
  template <typename Visit>
  void ForEachKey(WorkerIndex worker, const Visit& visit) const {
    for (size_t at = 0; at < blocks(worker); ++at) visit(EntryOf(by_worker_[worker].Get(at)).key);
  }

  size_t entries() const { return entries_; }
  size_t blocks() const { return blocks_; }  // that anybody holds
  size_t blocks(WorkerIndex worker) const { return worker < by_worker_.size() ? by_worker_[worker].size : 0; }
  uint64_t ignored() const { return ignored_; }
  // Of memory, without the allocator's own.
  size_t bytes() const;

 private:
  // Shard in the upper half, position among its entries in the lower.
  using EntryId = uint32_t;
  static constexpr EntryId kNoEntry = ~EntryId{0};
  static constexpr uint32_t kMany = (1u << 24) - 1;  // Holder::worker: `at` is an index into lists_
  static constexpr uint16_t kNoLocal = 0xffff;

  struct Entry {
    BlockKey key;
    Holder one;  // free: `at` is the next free one
  };
  struct Hash {
    uint32_t shard;
    uint16_t tag;
  };
  struct Shard {
    std::vector<Entry> entries;
    // Linear probing; a power of two. Upper half: the key's tag, whose low bits are its home; lower half: its
    // entry's position, kNoLocal where there is none.
    std::vector<uint32_t> table;
    uint32_t blocks = 0;
    uint16_t free = kNoLocal;
  };
  // What one worker holds: in pieces, so that growing copies nothing.
  struct List {
    static constexpr size_t kPiece = 1024;
    std::vector<std::unique_ptr<EntryId[]>> pieces;
    size_t size = 0;

    EntryId Get(size_t at) const { return pieces[at / kPiece][at % kPiece]; }
    void Set(size_t at, EntryId id) { pieces[at / kPiece][at % kPiece] = id; }
    void Push(EntryId id);
    void Pop();
  };

  Hash HashOf(const BlockKey& key) const;
  Entry& EntryOf(EntryId id) { return shards_[id >> 16].entries[id & 0xffff]; }
  const Entry& EntryOf(EntryId id) const { return shards_[id >> 16].entries[id & 0xffff]; }
  EntryId FindEntry(const BlockKey& key) const;
  // kNoEntry: its shard is full.
  EntryId AddEntry(const BlockKey& key);
  void EraseEntry(EntryId id);
  static void Rehash(Shard& shard, size_t size);
  static void Place(Shard& shard, uint32_t slot);
  std::span<const Holder> HoldersOf(const Entry& entry) const;
  Holder* FindHolder(Entry& entry, WorkerIndex worker);
  void AddHolder(Entry& entry, const Holder& holder);
  // The entry goes with its last holder.
  void RemoveHolder(EntryId id, WorkerIndex worker);

  const size_t max_entries_;
  size_t entries_ = 0;
  size_t blocks_ = 0;
  uint64_t ignored_ = 0;
  std::vector<Shard> shards_;
  // Most blocks are on one worker; hot prefixes are on a few.
  std::vector<std::vector<Holder>> lists_;
  std::vector<uint32_t> free_lists_;
  std::vector<List> by_worker_;
};

}  // namespace tidepool
