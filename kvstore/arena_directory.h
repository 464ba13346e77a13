#pragma once

// The directory of one process's offers, in memory that other processes of its host read. With it a peer
// takes the offers of a request without the owner's doing: no message, no wake-up.
//
// An entry is one request. Its version is odd while it is live and grows by one whenever the entry becomes
// live or is retired, so (entry, version) names a request's offers once and for all. Beside the directory,
// each peer has a claims array of its own, one 64-bit word per entry, which it alone writes:
//
//   peer:  v = version; claims[e] = v; version == v still?  then everything in the entry is held
//   owner: version = v + 1; does a claims[e] == v?          then that peer holds it
//
// Of two such parties at least one sees the other (both orders are sequentially consistent), so a peer never
// holds what the owner has given away: Michael's hazard pointers (IEEE TPDS 15(6), 2004) between processes.
// A peer lets go by claims[e] = 0. Items of an entry, and the chunks that they are in, are written before
// `count` tells of them, and reused only after the entry was retired and nobody claims it.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "kvstore/types.h"

namespace tidepool {

// Two halves of XXH3-128 of a request id.
struct OfferName {
  uint64_t low = 0, high = 0;
  bool operator==(const OfferName&) const = default;
  template <typename H>
  friend H AbslHashValue(H h, const OfferName& n) {
    return H::combine(std::move(h), n.low);
  }
  static OfferName Of(std::string_view request);
};

struct alignas(64) DirectoryHeader {
  static constexpr uint64_t kMagic = 0x3372694465646954;  // "TideDir3"
  uint64_t magic;
  uint32_t entries;  // a power of two
  uint32_t chunks;
  // The owner wants its slots back soon: copy, do not stay.
  std::atomic<uint32_t> short_of_room;
};

struct alignas(64) DirectoryEntry {
  std::atomic<uint64_t> version;
  std::atomic<uint64_t> name_low, name_high;
  std::atomic<uint32_t> count;  // of items
  std::atomic<uint32_t> first;  // chunk
};

// Of so many blocks: their slots and names apart, so that whoever takes them all reads no more lines of
// another core's cache than it must, and compares names many at a time. A slot needs no generation here: it
// cannot move on to another one under a claim.
struct alignas(64) DirectoryChunk {
  static constexpr uint32_t kItems = 204;  // what makes a chunk of 4 KiB
  static constexpr uint32_t kNone = 0;     // no chunk: chunk numbers begin with 1
  // The first half of a block key: it is compared inside one request only.
  struct Name {
    uint64_t low, high;
    static Name Of(const BlockKey& key) {
      Name n;
      std::memcpy(&n, key.bytes.data(), sizeof n);
      return n;
    }
    bool operator==(const Name&) const = default;
  };

  std::atomic<uint32_t> next;
  std::array<uint32_t, kItems> slots;
  std::array<Name, kItems> names;
};
static_assert(sizeof(DirectoryChunk) == 4096);
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// DirectoryShape: View of the memory that both sides agree on.
struct DirectoryShape {
  static constexpr uint32_t kProbes = 8;  // entries that a name may be in

  DirectoryHeader* header = nullptr;
  DirectoryEntry* entries = nullptr;
  DirectoryChunk* chunks = nullptr;  // chunks[1 .. header->chunks]

  static size_t Bytes(uint32_t entries, uint32_t chunks);
  // `memory`: at least Bytes() of them, page-aligned.
  static DirectoryShape At(std::byte* memory, uint32_t entries);
  static uint32_t EntryOf(const OfferName& name, uint32_t probe, uint32_t entries) {
    return static_cast<uint32_t>(name.low + probe) & (entries - 1);
  }
};

// ArenaDirectory: the owner's side. Not thread-safe.
class ArenaDirectory {
 public:
  // `memory`: zeroed, DirectoryShape::Bytes(entries, chunks) of it; outlives the directory.
  ArenaDirectory(std::byte* memory, uint32_t entries, uint32_t chunks);

  // Makes an entry for a request that has none. nullopt: no room where its name may be.
  std::optional<uint32_t> Open(const OfferName& name);
  // Adds a block to a live entry. False: no room; the entry stays as it is.
  bool Append(uint32_t entry, const BlockKey& key, uint32_t slot);
  // From here on nobody new can claim it. Returns the version that a claim of it has. The entry stays taken
  // until Free.
  uint64_t Retire(uint32_t entry);
  // Nobody claims the retired entry any more.
  void Free(uint32_t entry);
  void SetShortOfRoom(bool on) { shape_.header->short_of_room.store(on, std::memory_order_relaxed); }
  uint32_t entries() const { return shape_.header->entries; }

 private:
  DirectoryShape shape_;
  std::vector<bool> taken_;
  std::vector<uint32_t> last_;  // chunk of each entry
  std::vector<uint32_t> free_chunks_;
  uint32_t next_chunk_ = 1;  // never used ones begin here: memory follows use
};

// DirectoryReader: a peer's side, of a directory and of its own claims. What it reads is another process's:
// every number is checked, and nothing that it holds can lead out of the mapping. Not thread-safe.
class DirectoryReader {
 public:
  struct Claim {
    uint32_t entry;
    uint64_t version;
  };

  // `directory`: mapped read-only, page-aligned. `claims`: a word for each entry, and one more, in which the
  // owner counts what it waits for. nullopt: they are not of the sizes that the directory says.
  static std::optional<DirectoryReader> Open(std::span<const std::byte> directory,
                                             std::atomic<uint64_t>* claims, size_t claims_bytes);

  // Where the request is, without claiming it.
  std::optional<Claim> Find(const OfferName& name) const;
  // Has what Collect reads of the next `wanted` blocks from `hint` on come into the cache. Needs no hold:
  // what was written elsewhere is asked for while there is something else to do.
  void Prefetch(const Claim& claim, uint32_t hint, size_t wanted) const;
  // True: until Drop, nothing that the entry has or gets under this version is reused.
  bool Hold(const Claim& claim);
  void Drop(const Claim& claim);
  // Of a claim that is held: sets `out` to the slot of each of the keys, in their order, looking for them
  // from `hint` on (which is moved on past what was found: a request's blocks are asked for in the order in
  // which they were offered). False, and `out` is not to be used, where one is not there or its slot is not
  // below `slots`.
  bool Collect(const Claim& claim, std::span<const BlockKey> keys, uint32_t slots, uint32_t& hint,
               std::vector<uint32_t>& out) const;
  uint32_t entries() const { return entries_; }
  bool short_of_room() const { return shape_.header->short_of_room.load(std::memory_order_relaxed) != 0; }

 private:
  using Chain = absl::InlinedVector<const DirectoryChunk*, 32>;
  // The entry's chunks in order; returns how many items are in them.
  uint32_t Items(const Claim& claim, Chain& chain) const;
  // How many of keys[0..) are the items from `at` on, as far as its chunk goes: all that are left of it, or
  // what comes before the first that differs.
  static uint32_t RunAt(const Chain& chain, uint32_t n, uint32_t at, std::span<const BlockKey> keys);
  // Where the key is. False: nowhere.
  static bool Search(const Chain& chain, uint32_t n, const BlockKey& key, uint32_t& at);

  DirectoryShape shape_;
  uint32_t entries_ = 0;
  uint32_t chunks_ = 0;
  std::atomic<uint64_t>* claims_ = nullptr;
};

}  // namespace tidepool
