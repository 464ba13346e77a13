#include "kvstore/key_index.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <new>
#include <random>

#include "base/rng.h"
#include "base/status.h"

namespace tidepool {

namespace {
uint64_t ProcessSeed() {
  static const uint64_t seed = (uint64_t{std::random_device{}()} << 32) | std::random_device{}();
  return seed;
}
constexpr uint64_t Cell(uint32_t hash, uint32_t id) { return uint64_t{hash} << 32 | (id + 1); }
constexpr uint32_t HashOf(uint64_t cell) { return static_cast<uint32_t>(cell >> 32); }
constexpr uint32_t IdOf(uint64_t cell) { return static_cast<uint32_t>(cell) - 1; }
}  // namespace

void MemoryUnmap::operator()(void* p) const {
  if (p != nullptr) munmap(p, bytes);
}

// Anonymous memory is zero and costs nothing until it is touched; huge pages keep 10 million entries within
// reach of the TLB.
template <typename T>
KeyIndex::Mapping<T> KeyIndex::Map(size_t n) {
  const size_t bytes = n * sizeof(T);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  (void)madvise(p, bytes, MADV_HUGEPAGE);  // where the kernel has none, small pages work as well
  return Mapping<T>(static_cast<T*>(p), MemoryUnmap{bytes});
}

KeyIndex::KeyIndex(uint32_t capacity) : capacity_(capacity), seed_(ProcessSeed()) {
  TP_CHECK(capacity >= 1 && capacity <= 1u << 31);
  const size_t cells = std::max<size_t>(16, std::bit_ceil(size_t{capacity} * 4 / 3 + 1));
  mask_ = cells - 1;
  shift_ = static_cast<uint32_t>(32 - std::countr_zero(cells));
  cells_ = Map<uint64_t>(cells);
  keys_ = Map<BlockKey>(capacity);
}

size_t KeyIndex::memory_bytes() const {
  return (mask_ + 1) * sizeof(uint64_t) + size_t{capacity_} * sizeof(BlockKey);
}

uint32_t KeyIndex::Hash(const BlockKey& key) const {
  uint64_t v;
  std::memcpy(&v, key.bytes.data(), sizeof v);
  return static_cast<uint32_t>(Mix64(v ^ seed_) >> 32);
}

size_t KeyIndex::Probe(uint32_t hash, size_t at) const {
  while (cells_[at] != 0 && HashOf(cells_[at]) != hash) at = (at + 1) & mask_;
  return at;
}

uint32_t KeyIndex::Find(const BlockKey& key) const {
  const uint32_t hash = Hash(key);
  for (size_t at = Probe(hash, Home(hash)); cells_[at] != 0; at = Probe(hash, (at + 1) & mask_)) {
    const uint32_t id = IdOf(cells_[at]);
    if (keys_[id] == key) return id;
  }
  return kNone;
}

void KeyIndex::FindBatch(std::span<const BlockKey> keys, uint32_t* ids) const {
  // Each step starts the loads that the next one needs, for all keys, before any of them is waited for.
  std::array<uint32_t, kBatch> hashes;
  for (size_t i = 0; i < keys.size(); ++i) {
    hashes[i] = Hash(keys[i]);
    __builtin_prefetch(&cells_[Home(hashes[i])]);
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    const uint64_t cell = cells_[Probe(hashes[i], Home(hashes[i]))];
    ids[i] = cell == 0 ? kNone : IdOf(cell);
    if (cell != 0) __builtin_prefetch(&keys_[ids[i]]);
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    // Equal hash bits of another key are rare: then the whole search is made.
    if (ids[i] != kNone && keys_[ids[i]] != keys[i]) ids[i] = Find(keys[i]);
  }
}

void KeyIndex::FindMany(std::span<const BlockKey> keys, uint32_t* ids) const {
  for (size_t at = 0; at < keys.size(); at += kBatch) {
    FindBatch(keys.subspan(at, std::min(kBatch, keys.size() - at)), ids + at);
  }
}

size_t KeyIndex::FindPrefix(std::span<const BlockKey> keys, std::vector<uint32_t>& ids) const {
  std::array<uint32_t, kBatch> found;
  for (size_t at = 0; at < keys.size(); at += kBatch) {
    const size_t n = std::min(kBatch, keys.size() - at);
    FindBatch(keys.subspan(at, n), found.data());
    const auto end = std::find(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(n), kNone);
    ids.insert(ids.end(), found.begin(), end);
    const size_t here = static_cast<size_t>(end - found.begin());
    if (here < n) return at + here;
  }
  return keys.size();
}

void KeyIndex::Insert(const BlockKey& key, uint32_t id) {
  TP_CHECK(id < capacity_);
  const uint32_t hash = Hash(key);
  size_t at = Home(hash);
  while (cells_[at] != 0) at = (at + 1) & mask_;
  cells_[at] = Cell(hash, id);
  keys_[id] = key;
  ++size_;
}

void KeyIndex::Erase(uint32_t id) {
  TP_CHECK(id < capacity_);
  const uint32_t hash = Hash(keys_[id]);
  const uint64_t cell = Cell(hash, id);
  size_t hole = Home(hash);
  while (cells_[hole] != cell) {
    TP_CHECK(cells_[hole] != 0);
    hole = (hole + 1) & mask_;
  }
  // Whatever after the hole could not be found across it moves up (Knuth 6.4, algorithm R): no tombstones.
  for (size_t next = (hole + 1) & mask_; cells_[next] != 0; next = (next + 1) & mask_) {
    const size_t home = Home(HashOf(cells_[next]));
    if (((next - home) & mask_) >= ((next - hole) & mask_)) {
      cells_[hole] = cells_[next];
      hole = next;
    }
  }
  cells_[hole] = 0;
  --size_;
}

}  // namespace tidepool
