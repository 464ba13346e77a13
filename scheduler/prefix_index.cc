#include "scheduler/prefix_index.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace tidepool {

namespace {

// Blocks of a shard when the index is full: one that is copied in tens of microseconds.
constexpr size_t kShardBlocks = 8192;
constexpr size_t kShardsMax = 65536;
// A table of 2^16 slots, the most that a tag can name, at its load limit.
constexpr uint32_t kShardBlocksMax = 65536 / 8 * 7;
// How far ahead Match asks for memory: what a core has under way at once.
constexpr size_t kAhead = 12;

// In four words: a call of memcmp costs as much as the rest of a lookup that hits the caches.
bool Same(const BlockKey& a, const BlockKey& b) {
  uint64_t x[4], y[4];
  std::memcpy(x, a.bytes.data(), sizeof x);
  std::memcpy(y, b.bytes.data(), sizeof y);
  return ((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3])) == 0;
}

bool Full(size_t blocks, size_t slots) { return blocks * 8 > slots * 7; }

template <typename T>
void PushBack(std::vector<T>& to, const T& value) {
  // By an eighth, not by half: what is unused is most of what is wasted.
  if (to.size() == to.capacity()) to.reserve(to.size() + std::max<size_t>(to.size() / 8, 2));
  to.push_back(value);
}

}  // namespace

void PrefixIndex::List::Push(EntryId id) {
  if (size == pieces.size() * kPiece) pieces.push_back(std::make_unique<EntryId[]>(kPiece));
  Set(size++, id);
}

void PrefixIndex::List::Pop() {
  --size;
  // One empty piece stays: a block that comes and goes allocates nothing.
  if (size + 2 * kPiece <= pieces.size() * kPiece) pieces.pop_back();
}

PrefixIndex::PrefixIndex(size_t max_entries)
    : max_entries_(max_entries),
      shards_(std::clamp(std::bit_ceil(max_entries / kShardBlocks + 1), size_t{1}, kShardsMax)) {}

PrefixIndex::Hash PrefixIndex::HashOf(const BlockKey& key) const {
  // The key is a cryptographic digest already.
  uint32_t h[2];
  std::memcpy(h, key.bytes.data(), sizeof h);
  return {static_cast<uint32_t>(h[0] & (shards_.size() - 1)), static_cast<uint16_t>(h[1])};
}

PrefixIndex::EntryId PrefixIndex::FindEntry(const BlockKey& key) const {
  const Hash hash = HashOf(key);
  const Shard& shard = shards_[hash.shard];
  if (shard.blocks == 0) return kNoEntry;
  const size_t mask = shard.table.size() - 1;
  for (size_t i = hash.tag & mask;; i = (i + 1) & mask) {
    const uint32_t slot = shard.table[i];
    const uint16_t local = slot & 0xffff;
    if (local == kNoLocal) return kNoEntry;
    if (slot >> 16 == hash.tag && Same(shard.entries[local].key, key)) return hash.shard << 16 | local;
  }
}

void PrefixIndex::Prefetch(const BlockKey& key) const {
  const Hash hash = HashOf(key);
  const Shard& shard = shards_[hash.shard];
  if (shard.blocks > 0) __builtin_prefetch(&shard.table[hash.tag & (shard.table.size() - 1)]);
}

void PrefixIndex::PrefetchEntry(const BlockKey& key) const {
  const Hash hash = HashOf(key);
  const Shard& shard = shards_[hash.shard];
  if (shard.blocks == 0) return;
  const uint32_t slot = shard.table[hash.tag & (shard.table.size() - 1)];
  if (slot >> 16 == hash.tag) __builtin_prefetch(&shard.entries[slot & 0xffff]);
}

void PrefixIndex::Place(Shard& shard, uint32_t slot) {
  const size_t mask = shard.table.size() - 1;
  size_t i = (slot >> 16) & mask;
  while ((shard.table[i] & 0xffff) != kNoLocal) i = (i + 1) & mask;
  shard.table[i] = slot;
}

void PrefixIndex::Rehash(Shard& shard, size_t size) {
  const auto old = std::exchange(shard.table, std::vector<uint32_t>(size, kNoLocal));
  for (const uint32_t slot : old) {
    if ((slot & 0xffff) != kNoLocal) Place(shard, slot);
  }
}

PrefixIndex::EntryId PrefixIndex::AddEntry(const BlockKey& key) {
  const Hash hash = HashOf(key);
  Shard& shard = shards_[hash.shard];
  if (shard.blocks >= kShardBlocksMax) return kNoEntry;
  if (shard.table.empty() || Full(shard.blocks + 1, shard.table.size()))
    Rehash(shard, std::max<size_t>(shard.table.size() * 2, 8));
  uint16_t local = shard.free;
  if (local != kNoLocal) {
    shard.free = static_cast<uint16_t>(shard.entries[local].one.at);
  } else {
    local = static_cast<uint16_t>(shard.entries.size());
    PushBack(shard.entries, Entry{});
  }
  shard.entries[local] = {.key = key, .one = {}};
  Place(shard, uint32_t{hash.tag} << 16 | local);
  ++shard.blocks;
  ++blocks_;
  return hash.shard << 16 | local;
}

void PrefixIndex::EraseEntry(EntryId id) {
  Shard& shard = shards_[id >> 16];
  const auto local = static_cast<uint16_t>(id);
  Entry& entry = shard.entries[local];
  const uint16_t tag = HashOf(entry.key).tag;
  const size_t mask = shard.table.size() - 1;
  size_t hole = tag & mask;
  while ((shard.table[hole] & 0xffff) != local) hole = (hole + 1) & mask;
  // Whoever stands behind the hole and has its home at or before it moves up.
  for (size_t i = (hole + 1) & mask; (shard.table[i] & 0xffff) != kNoLocal; i = (i + 1) & mask) {
    const size_t home = (shard.table[i] >> 16) & mask;
    if (((i - home) & mask) >= ((i - hole) & mask)) {
      shard.table[hole] = shard.table[i];
      hole = i;
    }
  }
  shard.table[hole] = kNoLocal;
  entry.one = {.worker = 0, .tiers = 0, .at = shard.free};
  shard.free = local;
  --shard.blocks;
  --blocks_;
  if (shard.blocks == 0) {
    // Memory comes back when all of it is gone: of a cluster that was restarted.
    shard = Shard();
  }
}

std::span<const PrefixIndex::Holder> PrefixIndex::HoldersOf(const Entry& entry) const {
  if (entry.one.worker != kMany) return {&entry.one, 1};
  return lists_[entry.one.at];
}

const PrefixIndex::Holder* PrefixIndex::Find(std::span<const Holder> holders, WorkerIndex worker) {
  const auto it = std::lower_bound(holders.begin(), holders.end(), worker,
                                   [](const Holder& h, WorkerIndex w) { return h.worker < w; });
  return it != holders.end() && it->worker == worker ? &*it : nullptr;
}

PrefixIndex::Holder* PrefixIndex::FindHolder(Entry& entry, WorkerIndex worker) {
  return const_cast<Holder*>(Find(HoldersOf(entry), worker));
}

void PrefixIndex::AddHolder(Entry& entry, const Holder& holder) {
  if (entry.one.tiers == 0) {
    entry.one = holder;
    return;
  }
  if (entry.one.worker != kMany) {
    uint32_t list;
    if (free_lists_.empty()) {
      list = static_cast<uint32_t>(lists_.size());
      lists_.emplace_back();
    } else {
      list = free_lists_.back();
      free_lists_.pop_back();
    }
    lists_[list].reserve(2);
    lists_[list].push_back(entry.one);
    entry.one = {.worker = kMany, .tiers = 0xff, .at = list};
  }
  std::vector<Holder>& list = lists_[entry.one.at];
  if (list.size() == list.capacity()) list.reserve(list.size() + std::max<size_t>(list.size() / 4, 2));
  list.insert(std::lower_bound(list.begin(), list.end(), holder,
                               [](const Holder& a, const Holder& b) { return a.worker < b.worker; }),
              holder);
}

void PrefixIndex::RemoveHolder(EntryId id, WorkerIndex worker) {
  Entry& entry = EntryOf(id);
  if (entry.one.worker != kMany) return EraseEntry(id);
  std::vector<Holder>& list = lists_[entry.one.at];
  list.erase(list.begin() + (Find(list, worker) - list.data()));
  if (list.size() > 1) return;
  const Holder last = list.front();
  list = {};
  free_lists_.push_back(entry.one.at);
  entry.one = last;
}

void PrefixIndex::Add(const BlockKey& key, WorkerIndex worker, Tier tier) {
  EntryId id = FindEntry(key);
  if (id != kNoEntry) {
    if (Holder* h = FindHolder(EntryOf(id), worker); h != nullptr) {
      h->tiers |= TierBit(tier);
      return;
    }
  }
  if (entries_ < max_entries_ && id == kNoEntry) id = AddEntry(key);
  if (entries_ >= max_entries_ || id == kNoEntry) {
    ++ignored_;
    return;
  }
  if (worker >= by_worker_.size()) by_worker_.resize(worker + 1);
  AddHolder(EntryOf(id),
            {.worker = worker, .tiers = TierBit(tier), .at = static_cast<uint32_t>(by_worker_[worker].size)});
  by_worker_[worker].Push(id);
  ++entries_;
}

void PrefixIndex::Remove(const BlockKey& key, WorkerIndex worker, Tier tier) {
  const EntryId id = FindEntry(key);
  if (id == kNoEntry) return;
  Holder* h = FindHolder(EntryOf(id), worker);
  if (h == nullptr) return;
  h->tiers &= ~TierBit(tier);
  if (h->tiers != 0) return;
  List& list = by_worker_[worker];
  const uint32_t at = h->at;
  const EntryId last = list.Get(list.size - 1);
  FindHolder(EntryOf(last), worker)->at = at;
  list.Set(at, last);
  list.Pop();
  --entries_;
  RemoveHolder(id, worker);
}

void PrefixIndex::Clear(WorkerIndex worker) {
  if (worker >= by_worker_.size()) return;
  const List list = std::exchange(by_worker_[worker], {});
  for (size_t at = 0; at < list.size; ++at) RemoveHolder(list.Get(at), worker);
  entries_ -= list.size;
}

void PrefixIndex::Match(std::span<const BlockKey> keys, size_t workers, std::vector<HeldPrefix>& out) const {
  out.assign(workers, {});
  for (uint32_t i = 0; i < keys.size(); ++i) {
    if (i + kAhead < keys.size()) Prefetch(keys[i + kAhead]);
    bool any = false;
    for (const Holder& h : Holders(keys[i])) {
      if (h.worker >= workers || out[h.worker].blocks != i) continue;  // it lacks an earlier block
      HeldPrefix& held = out[h.worker];
      if (held.near_blocks == i && h.near()) held.near_blocks = i + 1;
      held.blocks = i + 1;
      any = true;
    }
    if (!any) return;
  }
}

void PrefixIndex::Match(std::span<const BlockKey> keys, size_t workers, std::vector<HeldPrefix>& out,
                        std::vector<HeldRun>& runs) const {
  out.assign(workers, {});
  runs.assign(workers, {});
  for (uint32_t i = 0; i < keys.size(); ++i) {
    if (i + kAhead < keys.size()) Prefetch(keys[i + kAhead]);
    const auto holders = Holders(keys[i]);
    if (holders.empty()) return;
    for (const Holder& h : holders) {
      if (h.worker >= workers) continue;
      if (HeldPrefix& held = out[h.worker]; held.blocks == i) {
        if (held.near_blocks == i && h.near()) held.near_blocks = i + 1;
        held.blocks = i + 1;
        continue;
      }
      HeldRun& run = runs[h.worker];
      if (run.end != i || run.begin == run.end) run = {i, i, i};
      if (run.near_end == i && h.near()) run.near_end = i + 1;
      run.end = i + 1;
    }
  }
}

std::span<const PrefixIndex::Holder> PrefixIndex::Holders(const BlockKey& key) const {
  const EntryId id = FindEntry(key);
  return id == kNoEntry ? std::span<const Holder>() : HoldersOf(EntryOf(id));
}

size_t PrefixIndex::bytes() const {
  size_t out = shards_.capacity() * sizeof(Shard) + lists_.capacity() * sizeof(lists_[0]) +
               free_lists_.capacity() * sizeof(uint32_t) + by_worker_.capacity() * sizeof(List);
  for (const Shard& s : shards_)
    out += s.entries.capacity() * sizeof(Entry) + s.table.capacity() * sizeof(uint32_t);
  for (const auto& list : lists_) out += list.capacity() * sizeof(Holder);
  for (const List& list : by_worker_) out += list.pieces.size() * List::kPiece * sizeof(EntryId);
  return out;
}

}  // namespace tidepool
