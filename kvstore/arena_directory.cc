#include "kvstore/arena_directory.h"

#include <xxhash.h>

#include <algorithm>

#include "base/status.h"

namespace tidepool {
namespace {

constexpr uint32_t kEntriesMax = 1 << 20, kChunksMax = 1 << 24;

// Into the second level: the first would have room for no more than a thousand of them.
template <typename T>
void PrefetchLines(const T* begin, size_t n) {
  const auto* const at = reinterpret_cast<const char*>(begin);
  for (size_t line = 0; line < n * sizeof(T); line += 64)
    __builtin_prefetch(at + line, /*rw=*/0, /*locality=*/2);
}

// 0 of none. Eight at a time: there may be thousands, and somebody waits.
uint32_t Largest(std::span<const uint32_t> numbers) {
  using Eight = uint32_t __attribute__((vector_size(8 * sizeof(uint32_t))));
  Eight most = {};
  size_t i = 0;
  for (; i + 8 <= numbers.size(); i += 8) {
    Eight next;
    std::memcpy(&next, &numbers[i], sizeof next);
    most = next > most ? next : most;
  }
  uint32_t largest = 0;
  for (int lane = 0; lane < 8; ++lane) largest = std::max(largest, most[lane]);
  for (; i < numbers.size(); ++i) largest = std::max(largest, numbers[i]);
  return largest;
}

}  // namespace

OfferName OfferName::Of(std::string_view request) {
  const XXH128_hash_t h = XXH3_128bits(request.data(), request.size());
  return {h.low64, h.high64};
}

size_t DirectoryShape::Bytes(uint32_t entries, uint32_t chunks) {
  return sizeof(DirectoryHeader) + size_t{entries} * sizeof(DirectoryEntry) +
         (size_t{chunks} + 1) * sizeof(DirectoryChunk);
}

DirectoryShape DirectoryShape::At(std::byte* memory, uint32_t entries) {
  DirectoryShape out;
  out.header = reinterpret_cast<DirectoryHeader*>(memory);
  out.entries = reinterpret_cast<DirectoryEntry*>(memory + sizeof(DirectoryHeader));
  out.chunks = reinterpret_cast<DirectoryChunk*>(memory + sizeof(DirectoryHeader) +
                                                 size_t{entries} * sizeof(DirectoryEntry));
  return out;
}

ArenaDirectory::ArenaDirectory(std::byte* memory, uint32_t entries, uint32_t chunks)
    : shape_(DirectoryShape::At(memory, entries)), taken_(entries), last_(entries, DirectoryChunk::kNone) {
  TP_CHECK(entries > 0 && (entries & (entries - 1)) == 0 && entries <= kEntriesMax && chunks <= kChunksMax);
  shape_.header->entries = entries;
  shape_.header->chunks = chunks;
  shape_.header->magic = DirectoryHeader::kMagic;
}

std::optional<uint32_t> ArenaDirectory::Open(const OfferName& name) {
  for (uint32_t probe = 0; probe < DirectoryShape::kProbes; ++probe) {
    const uint32_t i = DirectoryShape::EntryOf(name, probe, entries());
    if (taken_[i]) continue;
    taken_[i] = true;
    DirectoryEntry& e = shape_.entries[i];
    e.name_low.store(name.low, std::memory_order_relaxed);
    e.name_high.store(name.high, std::memory_order_relaxed);
    e.count.store(0, std::memory_order_relaxed);
    e.first.store(DirectoryChunk::kNone, std::memory_order_relaxed);
    last_[i] = DirectoryChunk::kNone;
    e.version.store(e.version.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    return i;
  }
  return std::nullopt;
}

bool ArenaDirectory::Append(uint32_t entry, const BlockKey& key, uint32_t slot) {
  DirectoryEntry& e = shape_.entries[entry];
  const uint32_t n = e.count.load(std::memory_order_relaxed);
  if (n % DirectoryChunk::kItems == 0) {
    uint32_t fresh = DirectoryChunk::kNone;
    if (!free_chunks_.empty()) {
      fresh = free_chunks_.back();
      free_chunks_.pop_back();
    } else if (next_chunk_ <= shape_.header->chunks) {
      fresh = next_chunk_++;
    } else {
      return false;
    }
    shape_.chunks[fresh].next.store(DirectoryChunk::kNone, std::memory_order_relaxed);
    if (n == 0) {
      e.first.store(fresh, std::memory_order_relaxed);
    } else {
      shape_.chunks[last_[entry]].next.store(fresh, std::memory_order_relaxed);
    }
    last_[entry] = fresh;
  }
  DirectoryChunk& c = shape_.chunks[last_[entry]];
  const uint32_t i = n % DirectoryChunk::kItems;
  c.names[i] = DirectoryChunk::Name::Of(key);
  c.slots[i] = slot;
  e.count.store(n + 1, std::memory_order_release);
  return true;
}

uint64_t ArenaDirectory::Retire(uint32_t entry) {
  std::atomic<uint64_t>& version = shape_.entries[entry].version;
  const uint64_t was = version.load(std::memory_order_relaxed);
  TP_CHECK(was % 2 == 1);
  version.store(was + 1, std::memory_order_seq_cst);
  return was;
}

void ArenaDirectory::Free(uint32_t entry) {
  DirectoryEntry& e = shape_.entries[entry];
  TP_CHECK(e.version.load(std::memory_order_relaxed) % 2 == 0);
  for (uint32_t c = e.first.load(std::memory_order_relaxed); c != DirectoryChunk::kNone;
       c = shape_.chunks[c].next.load(std::memory_order_relaxed)) {
    free_chunks_.push_back(c);
  }
  taken_[entry] = false;
}

std::optional<DirectoryReader> DirectoryReader::Open(std::span<const std::byte> directory,
                                                     std::atomic<uint64_t>* claims, size_t claims_bytes) {
  if (directory.size() < sizeof(DirectoryHeader)) return std::nullopt;
  DirectoryReader out;
  // Never written to: it is mapped read-only.
  auto* memory = const_cast<std::byte*>(directory.data());
  const auto* header = reinterpret_cast<const DirectoryHeader*>(memory);
  out.entries_ = header->entries;
  out.chunks_ = header->chunks;
  if (header->magic != DirectoryHeader::kMagic || out.entries_ == 0 ||
      (out.entries_ & (out.entries_ - 1)) != 0 || out.entries_ > kEntriesMax || out.chunks_ > kChunksMax ||
      DirectoryShape::Bytes(out.entries_, out.chunks_) > directory.size() ||
      claims_bytes < (size_t{out.entries_} + 1) * sizeof(uint64_t)) {
    return std::nullopt;
  }
  out.shape_ = DirectoryShape::At(memory, out.entries_);
  out.claims_ = claims;
  return out;
}

std::optional<DirectoryReader::Claim> DirectoryReader::Find(const OfferName& name) const {
  for (uint32_t probe = 0; probe < DirectoryShape::kProbes; ++probe) {
    const uint32_t i = DirectoryShape::EntryOf(name, probe, entries_);
    const DirectoryEntry& e = shape_.entries[i];
    const uint64_t version = e.version.load(std::memory_order_acquire);
    if (version % 2 == 0 || e.name_low.load(std::memory_order_relaxed) != name.low ||
        e.name_high.load(std::memory_order_relaxed) != name.high) {
      continue;
    }
    return Claim{i, version};  // Hold finds out whether the name was this version's
  }
  return std::nullopt;
}

bool DirectoryReader::Hold(const Claim& claim) {
  claims_[claim.entry].store(claim.version, std::memory_order_seq_cst);
  if (shape_.entries[claim.entry].version.load(std::memory_order_seq_cst) == claim.version) return true;
  claims_[claim.entry].store(0, std::memory_order_seq_cst);
  return false;
}

void DirectoryReader::Drop(const Claim& claim) { claims_[claim.entry].store(0, std::memory_order_seq_cst); }

bool DirectoryReader::Collect(const Claim& claim, std::span<const BlockKey> keys, uint32_t slots,
                              uint32_t& hint, std::vector<uint32_t>& out) const {
  out.clear();
  out.reserve(keys.size());
  Chain chain;
  const uint32_t n = Items(claim, chain);
  uint32_t at = hint;
  while (out.size() < keys.size()) {
    uint32_t run = RunAt(chain, n, at, keys.subspan(out.size()));
    if (run == 0) {
      if (!Search(chain, n, keys[out.size()], at)) return false;
      run = 1;
    }
    const uint32_t* const first = &chain[at / DirectoryChunk::kItems]->slots[at % DirectoryChunk::kItems];
    out.insert(out.end(), first, first + run);
    at += run;
  }
  // Of the copies: the owner of the others may be up to anything.
  if (Largest(out) >= slots) return false;
  hint = at;
  return true;
}

uint32_t DirectoryReader::Items(const Claim& claim, Chain& chain) const {
  const DirectoryEntry& e = shape_.entries[claim.entry];
  const uint32_t count = e.count.load(std::memory_order_acquire);
  // One that leads nowhere, or in a circle, ends the list.
  uint32_t c = e.first.load(std::memory_order_relaxed);
  for (uint64_t begin = 0;
       c != DirectoryChunk::kNone && c <= chunks_ && chain.size() < chunks_ && begin < count;
       begin += DirectoryChunk::kItems) {
    const DirectoryChunk& chunk = shape_.chunks[c];
    chain.push_back(&chunk);
    c = chunk.next.load(std::memory_order_relaxed);
  }
  return static_cast<uint32_t>(std::min<size_t>(count, chain.size() * DirectoryChunk::kItems));
}

void DirectoryReader::Prefetch(const Claim& claim, uint32_t hint, size_t wanted) const {
  Chain chain;
  const uint64_t end = std::min<uint64_t>(Items(claim, chain), hint + uint64_t{wanted});
  for (uint64_t at = hint; at < end;) {
    const uint32_t begin = at % DirectoryChunk::kItems;
    const auto n = static_cast<uint32_t>(std::min<uint64_t>(DirectoryChunk::kItems - begin, end - at));
    const DirectoryChunk& chunk = *chain[at / DirectoryChunk::kItems];
    PrefetchLines(&chunk.names[begin], n);
    PrefetchLines(&chunk.slots[begin], n);
    at += n;
  }
}

uint32_t DirectoryReader::RunAt(const Chain& chain, uint32_t n, uint32_t at, std::span<const BlockKey> keys) {
  if (at >= n) return 0;
  const DirectoryChunk& c = *chain[at / DirectoryChunk::kItems];
  const uint32_t begin = at % DirectoryChunk::kItems;
  const auto most =
      static_cast<uint32_t>(std::min<size_t>({n - at, DirectoryChunk::kItems - begin, keys.size()}));
  // A whole name at a time and without a branch for each: that all are there is the rule.
  using Whole = uint64_t __attribute__((vector_size(sizeof(DirectoryChunk::Name))));
  Whole differs = {};
  for (uint32_t i = 0; i < most; ++i) {
    Whole wanted, offered;
    std::memcpy(&wanted, keys[i].bytes.data(), sizeof wanted);
    std::memcpy(&offered, &c.names[begin + i], sizeof offered);
    differs |= wanted ^ offered;
  }
  if ((differs[0] | differs[1]) == 0) return most;
  uint32_t same = 0;
  while (same < most && DirectoryChunk::Name::Of(keys[same]) == c.names[begin + same]) ++same;
  return same;
}

bool DirectoryReader::Search(const Chain& chain, uint32_t n, const BlockKey& key, uint32_t& at) {
  const auto name = DirectoryChunk::Name::Of(key);
  for (uint32_t i = 0; i < n; ++i) {
    if (chain[i / DirectoryChunk::kItems]->names[i % DirectoryChunk::kItems] == name) {
      at = i;
      return true;
    }
  }
  return false;
}

}  // namespace tidepool
