#include "kvstore/key_index.h"

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <set>

#include "base/rng.h"

namespace tidepool {
namespace {

BlockKey Key(uint64_t n) {
  BlockKey key;
  std::memcpy(key.bytes.data(), &n, 8);
  return key;
}

TEST(KeyIndexTest, AgreesWithMapOverRandomInsertsAndErases) {
  for (uint32_t capacity : {1u, 2u, 7u, 64u, 1000u}) {
    KeyIndex index(capacity);
    std::map<uint64_t, uint32_t> model;
    std::set<uint32_t> free;
    for (uint32_t i = 0; i < capacity; ++i) free.insert(i);
    Rng rng(capacity);
    for (int step = 0; step < 20000; ++step) {
      const uint64_t n = rng.Below(2 * capacity);
      const auto it = model.find(n);
      if (it == model.end()) {
        ASSERT_EQ(index.Find(Key(n)), KeyIndex::kNone);
        if (free.empty()) continue;
        const uint32_t id = *std::next(free.begin(), static_cast<std::ptrdiff_t>(rng.Below(free.size())));
        free.erase(id);
        index.Insert(Key(n), id);
        model[n] = id;
      } else {
        ASSERT_EQ(index.Find(Key(n)), it->second);
        ASSERT_EQ(index.key(it->second), Key(n));
        if (!rng.Chance(0.5)) continue;
        index.Erase(it->second);
        free.insert(it->second);
        model.erase(it);
      }
      ASSERT_EQ(index.size(), model.size());
    }
    for (uint64_t n = 0; n < 2 * capacity; ++n) {
      ASSERT_EQ(index.Find(Key(n)), model.contains(n) ? model[n] : KeyIndex::kNone);
    }
  }
}

TEST(KeyIndexTest, KeysThatAgreeInTheirHashedBytesAreToldApart) {
  KeyIndex index(64);
  // Only the last byte differs: the hash, and so the home cell and the hash bits, are the same for all.
  const auto twin = [](uint32_t i) {
    BlockKey key = Key(5);
    key.bytes[31] = static_cast<uint8_t>(i);
    return key;
  };
  for (uint32_t i = 0; i < 64; ++i) index.Insert(twin(i), i);
  for (uint32_t i = 0; i < 64; i += 2) index.Erase(i);
  std::vector<BlockKey> keys;
  for (uint32_t i = 0; i < 64; ++i) keys.push_back(twin(i));
  std::vector<uint32_t> ids(64);
  index.FindMany(keys, ids.data());
  for (uint32_t i = 0; i < 64; ++i) EXPECT_EQ(ids[i], i % 2 == 0 ? KeyIndex::kNone : i);
}

TEST(KeyIndexTest, PrefixEndsAtTheFirstKeyThatIsNotThere) {
  KeyIndex index(1000);
  std::vector<BlockKey> keys;
  for (uint32_t i = 0; i < 300; ++i) keys.push_back(Key(i));
  for (uint32_t i = 0; i < 300; ++i) index.Insert(keys[i], 999 - i);
  std::vector<uint32_t> ids;
  EXPECT_EQ(index.FindPrefix(keys, ids), 300u);
  for (uint32_t i = 0; i < 300; ++i) ASSERT_EQ(ids[i], 999 - i);
  for (uint32_t gap : {0u, 1u, 63u, 64u, 65u, 128u, 299u}) {
    index.Erase(999 - gap);
    ids.clear();
    EXPECT_EQ(index.FindPrefix(keys, ids), gap);
    EXPECT_EQ(ids.size(), gap);
    index.Insert(keys[gap], 999 - gap);
  }
  ids.clear();
  EXPECT_EQ(index.FindPrefix({}, ids), 0u);
}

TEST(KeyIndexTest, MemoryIsBelow64BytesPerBlock) {
  for (uint32_t capacity : {1000000u, 3000000u, 10000000u}) {
    KeyIndex index(capacity);  // nothing is touched, so this costs address space only
    EXPECT_LT(static_cast<double>(index.memory_bytes()) / capacity, 64.0);
  }
}

}  // namespace
}  // namespace tidepool
