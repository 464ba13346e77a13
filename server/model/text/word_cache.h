#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>

namespace tidepool {

// WordCache: the ids of words seen lately, two per set, the older one evicted. 1 MiB, allocated at the first
// Put. Only short words with few ids fit; the rest is not worth the memory. Owned by one thread.
class WordCache {
 public:
  static constexpr size_t kWordBytesMax = 30;
  static constexpr size_t kIdsMax = 8;

  static uint64_t Hash(std::string_view word) {
    constexpr uint64_t kMul = 0x9E3779B97F4A7C15;
    uint64_t hash = word.size() * kMul;
    const char* at = word.data();
    size_t left = word.size();
    for (; left >= 8; at += 8, left -= 8) {
      uint64_t part;
      std::memcpy(&part, at, 8);
      hash = (hash ^ part) * kMul;
      hash ^= hash >> 29;
    }
    if (left > 0) {
      uint64_t part = 0;
      std::memcpy(&part, at, left);
      hash = (hash ^ part) * kMul;
      hash ^= hash >> 29;
    }
    return hash;
  }

  // The ids of `word` (at most kWordBytesMax bytes), empty if it is not here. Valid until the next Put.
  std::span<const int32_t> Get(std::string_view word, uint64_t hash) const {
    if (slots_ == nullptr) return {};
    const Slot* set = &slots_[Index(hash)];
    for (int i = 0; i < 2; ++i) {
      if (set[i].bytes == word.size() && std::memcmp(set[i].word, word.data(), word.size()) == 0) {
        return {set[i].ids, set[i].count};
      }
    }
    return {};
  }

  // Neither may be empty.
  void Put(std::string_view word, uint64_t hash, std::span<const int32_t> ids) {
    if (word.size() > kWordBytesMax || ids.size() > kIdsMax || ids.empty()) return;
    if (slots_ == nullptr) slots_ = std::make_unique<Slot[]>(kSlots);
    Slot* set = &slots_[Index(hash)];
    set[1] = set[0];
    set[0].bytes = static_cast<uint8_t>(word.size());
    set[0].count = static_cast<uint8_t>(ids.size());
    std::memcpy(set[0].word, word.data(), word.size());
    std::memcpy(set[0].ids, ids.data(), ids.size() * sizeof(int32_t));
  }

 private:
  static constexpr size_t kSlots = size_t{1} << 14;
  struct alignas(64) Slot {
    uint8_t bytes = 0, count = 0;
    char word[kWordBytesMax];
    int32_t ids[kIdsMax];
  };
  static_assert(sizeof(Slot) == 64);
  static size_t Index(uint64_t hash) { return (hash >> 40) & (kSlots - 2); }

  std::unique_ptr<Slot[]> slots_;
};

}  // namespace tidepool
