#include "kvstore/arena_directory.h"

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/kvstore/fetch_test_util.h"

namespace tidepool {
namespace {

// Both sides in one process, on one piece of memory.
class ArenaDirectoryTest : public testing::Test {
 protected:
  void Make(uint32_t entries, uint32_t chunks) {
    const size_t bytes = DirectoryShape::Bytes(entries, chunks);
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
    std::memset(memory_.get(), 0, bytes);
    claims_ = std::make_unique<std::atomic<uint64_t>[]>(entries + 1);
    owner_ = std::make_unique<ArenaDirectory>(memory_.get(), entries, chunks);
    reader_ = DirectoryReader::Open({memory_.get(), bytes}, claims_.get(), (entries + 1) * sizeof(uint64_t));
    ASSERT_TRUE(reader_.has_value());
  }
  uint32_t Offer(const std::string& request, uint64_t first, size_t n) {
    const auto entry = owner_->Open(OfferName::Of(request));
    EXPECT_TRUE(entry.has_value());
    for (size_t i = 0; i < n; ++i)
      EXPECT_TRUE(owner_->Append(*entry, TestKey(first + i), static_cast<uint32_t>(first + i)));
    return *entry;
  }
  std::vector<uint32_t> Collect(const DirectoryReader::Claim& claim, uint64_t first, size_t n,
                                uint32_t* hint) {
    std::vector<BlockKey> keys;
    for (size_t i = 0; i < n; ++i) keys.push_back(TestKey(first + i));
    std::vector<uint32_t> out;
    if (!reader_->Collect(claim, keys, 1 << 20, *hint, out)) out.clear();
    return out;
  }

  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::unique_ptr<std::atomic<uint64_t>[]> claims_;
  std::unique_ptr<ArenaDirectory> owner_;
  std::optional<DirectoryReader> reader_;
};

TEST_F(ArenaDirectoryTest, AReaderFindsAllBlocksOfARequestInAnyPart) {
  Make(64, 64);
  Offer("a", 0, 300);
  const auto claim = reader_->Find(OfferName::Of("a"));
  ASSERT_TRUE(claim.has_value());
  ASSERT_TRUE(reader_->Hold(*claim));
  uint32_t hint = 0;
  for (const auto& [first, n] :
       std::vector<std::pair<uint64_t, size_t>>{{0, 100}, {100, 200}, {50, 1}, {0, 300}}) {
    const auto slots = Collect(*claim, first, n, &hint);
    ASSERT_EQ(slots.size(), n);
    for (size_t i = 0; i < n; ++i) EXPECT_EQ(slots[i], first + i);
  }
  EXPECT_TRUE(Collect(*claim, 250, 51, &hint).empty()) << "one of them is not on offer";
}

TEST_F(ArenaDirectoryTest, BlocksAreFoundInWhateverOrderTheyAreAskedFor) {
  Make(64, 64);
  constexpr uint64_t kBlocks = 3 * DirectoryChunk::kItems + 7;
  Offer("a", 0, kBlocks);
  const auto claim = reader_->Find(OfferName::Of("a"));
  ASSERT_TRUE(claim && reader_->Hold(*claim));
  Rng rng(5);
  uint32_t hint = 0;
  for (int round = 0; round < 500; ++round) {
    // Runs, as a rule; jumps in between.
    std::vector<BlockKey> keys;
    std::vector<uint32_t> want;
    while (want.size() < 1 + rng.Below(300)) {
      uint64_t at = rng.Below(kBlocks);
      for (uint64_t n = 1 + rng.Below(200); n > 0 && at < kBlocks; --n, ++at)
        want.push_back(static_cast<uint32_t>(at));
    }
    for (uint32_t n : want) keys.push_back(TestKey(n));
    std::vector<uint32_t> got;
    ASSERT_TRUE(reader_->Collect(*claim, keys, kBlocks, hint, got));
    ASSERT_EQ(got, want);
    keys.insert(keys.begin() + static_cast<std::ptrdiff_t>(rng.Below(keys.size())), TestKey(kBlocks));
    hint = static_cast<uint32_t>(rng.Below(2 * kBlocks));
    EXPECT_FALSE(reader_->Collect(*claim, keys, kBlocks, hint, got)) << "one is not on offer";
  }
  std::vector<uint32_t> got;
  EXPECT_FALSE(reader_->Collect(*claim, std::vector{TestKey(kBlocks - 1)}, kBlocks - 1, hint, got))
      << "a slot beyond the arena";
}

TEST_F(ArenaDirectoryTest, ARetiredEntryCannotBeHeldAndOneThatIsHeldIsSeenToBe) {
  Make(64, 64);
  const uint32_t a = Offer("a", 0, 1);
  const auto early = reader_->Find(OfferName::Of("a"));
  ASSERT_TRUE(early.has_value());
  EXPECT_EQ(owner_->Retire(a), early->version);
  EXPECT_FALSE(reader_->Hold(*early)) << "the version has moved on";
  EXPECT_EQ(claims_[a].load(), 0u);
  owner_->Free(a);

  const uint32_t b = Offer("b", 0, 1);
  const auto claim = reader_->Find(OfferName::Of("b"));
  ASSERT_TRUE(claim.has_value() && reader_->Hold(*claim));
  EXPECT_EQ(owner_->Retire(b), claims_[b].load());
}

TEST_F(ArenaDirectoryTest, AStaleClaimIsNotMistakenForALaterOneOfTheSameEntry) {
  Make(1, 8);
  const uint32_t a = Offer("a", 0, 1);
  const auto stale = reader_->Find(OfferName::Of("a"));
  owner_->Retire(a);
  owner_->Free(a);
  Offer("b", 1, 1);
  EXPECT_FALSE(reader_->Find(OfferName::Of("a")).has_value());
  EXPECT_FALSE(reader_->Hold(*stale));
}

TEST_F(ArenaDirectoryTest, NoRoomIsNoHarm) {
  Make(4, 2);
  std::vector<uint32_t> entries;
  for (int i = 0; i < 4; ++i) {
    const auto e = owner_->Open(OfferName::Of(std::to_string(i)));
    ASSERT_TRUE(e.has_value());
    entries.push_back(*e);
  }
  EXPECT_FALSE(owner_->Open(OfferName::Of("one more")).has_value());
  for (uint32_t i = 0; i < 2 * DirectoryChunk::kItems; ++i)
    EXPECT_TRUE(owner_->Append(entries[0], TestKey(i), i));
  EXPECT_FALSE(owner_->Append(entries[0], TestKey(1000), 0));
  EXPECT_FALSE(owner_->Append(entries[1], TestKey(1000), 0));
  owner_->Retire(entries[0]);
  owner_->Free(entries[0]);
  EXPECT_TRUE(owner_->Append(entries[1], TestKey(1000), 0)) << "its chunks are free again";
}

TEST_F(ArenaDirectoryTest, AMangledDirectoryLeadsNowhere) {
  constexpr uint32_t kEntries = 16, kChunks = 16;
  Make(kEntries, kChunks);
  Offer("a", 0, 200);
  const size_t bytes = DirectoryShape::Bytes(kEntries, kChunks);
  const std::vector<std::byte> good(memory_.get(), memory_.get() + bytes);
  Rng rng(3);
  for (int i = 0; i < 20000; ++i) {
    // Not the header: that is read once, and judged then.
    const uint64_t hits = 1 + rng.Below(8);
    for (uint64_t k = 0; k < hits; ++k) {
      const size_t at = sizeof(DirectoryHeader) + rng.Below(bytes - sizeof(DirectoryHeader));
      memory_.get()[at] = static_cast<std::byte>(rng.Next());
    }
    if (const auto claim = reader_->Find(OfferName::Of("a")); claim && reader_->Hold(*claim)) {
      uint32_t hint = static_cast<uint32_t>(rng.Below(300));
      std::vector<BlockKey> keys = {TestKey(rng.Below(200)), TestKey(rng.Below(250))};
      if (std::vector<uint32_t> got; reader_->Collect(*claim, keys, 200, hint, got)) {
        for (uint32_t slot : got) EXPECT_LT(slot, 200u);
      }
    }
    std::memcpy(memory_.get(), good.data(), bytes);
  }
  EXPECT_FALSE(DirectoryReader::Open({memory_.get(), bytes}, claims_.get(), 8 * kEntries).has_value())
      << "the owner's word after the claims";
  std::memset(memory_.get(), 0xff, sizeof(DirectoryHeader));
  EXPECT_FALSE(DirectoryReader::Open({memory_.get(), bytes}, claims_.get(), 8 * (kEntries + 1)).has_value());
  EXPECT_FALSE(DirectoryReader::Open({memory_.get(), 16}, claims_.get(), 8 * (kEntries + 1)).has_value());
}

TEST_F(ArenaDirectoryTest, ACircleOfChunksIsWalkedOnceAtMost) {
  Make(16, 16);
  const uint32_t a = Offer("a", 0, 200);
  const DirectoryShape shape = DirectoryShape::At(memory_.get(), 16);
  const uint32_t first = shape.entries[a].first.load();
  shape.chunks[first].next.store(first);
  shape.entries[a].count.store(UINT32_MAX);
  const auto claim = reader_->Find(OfferName::Of("a"));
  ASSERT_TRUE(claim && reader_->Hold(*claim));
  uint32_t hint = 0;
  // Without a bound: 69 million chunks, and their four thousand million items.
  EXPECT_TRUE(Collect(*claim, 1000, 1, &hint).empty());
}

// The protocol itself: whatever the two do at once, a slot that a reader holds is not given to anybody else.
TEST_F(ArenaDirectoryTest, HeldBlocksAreNeverReused) {
  Make(1, 8);
  constexpr uint64_t kReads = 20000;
  std::atomic<uint64_t> content{0};  // of the one slot: odd while it is being rewritten
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> reads{0};
  std::thread reader([&] {
    while (!stop.load()) {
      const auto claim = reader_->Find(OfferName::Of("a"));
      if (!claim || !reader_->Hold(*claim)) continue;
      const uint64_t before = content.load(std::memory_order_relaxed);
      for (int spin = 0; spin < 20; ++spin) {
        EXPECT_EQ(content.load(std::memory_order_relaxed), before);
      }
      EXPECT_EQ(before % 2, 0u);
      ++reads;
      reader_->Drop(*claim);
    }
  });
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(15);
  for (int i = 0; reads.load() < kReads && std::chrono::steady_clock::now() < limit; ++i) {
    const uint32_t e = Offer("a", 0, 1);
    for (int spin = 0; spin < i % 64; ++spin) std::atomic_signal_fence(std::memory_order_seq_cst);
    const uint64_t version = owner_->Retire(e);
    while (claims_[e].load(std::memory_order_seq_cst) == version) std::this_thread::yield();
    content.fetch_add(1, std::memory_order_relaxed);
    content.fetch_add(1, std::memory_order_relaxed);
    owner_->Free(e);
  }
  stop.store(true);
  reader.join();
  EXPECT_GE(reads.load(), kReads);
}

}  // namespace
}  // namespace tidepool
