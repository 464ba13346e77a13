#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "base/clock.h"
#include "base/rng.h"
#include "kvstore/disk/extent_table.h"
#include "kvstore/disk/page_runs.h"
#include "kvstore/disk/speed_meter.h"
#include "kvstore/disk/tier_breaker.h"
#include "kvstore/disk/token_bucket.h"
#include "kvstore/disk/write_gate.h"
#include "tests/kvstore/disk_test_util.h"

namespace tidepool {
namespace {

std::unique_ptr<EvictionPolicy> Lru(uint32_t capacity) {
  return *CreatePolicy({.name = "lru", .capacity = capacity});
}

// A full record of one page; `place` is that page.
IndexEntry EntryOf(uint64_t n, uint64_t place, std::optional<uint64_t> parent = std::nullopt) {
  IndexEntry e;
  e.key = KeyOf(n);
  e.place = place;
  e.stamp = {1, n};
  if (parent) e.parent = KeyOf(*parent);
  e.tenant = "t";
  e.payload_bytes = e.stored_bytes = 100;
  return e;
}

class ExtentTableTest : public testing::Test {
 protected:
  static constexpr uint64_t kPage = kDiskPageBytes;
  // Allocates and commits; the keys that went.
  std::vector<BlockKey> Put(ExtentTable& table, uint64_t n, std::optional<uint64_t> parent = std::nullopt) {
    std::vector<ExtentTable::Removed> removed;
    const auto id = table.Allocate(kPage, removed);
    EXPECT_TRUE(id.has_value());
    table.Commit(*id, EntryOf(n, table.page(*id), parent));
    std::vector<BlockKey> keys;
    for (const auto& r : removed) keys.push_back(r.key);
    return keys;
  }
};

TEST_F(ExtentTableTest, FillsFromTheFrontAndEvictsTheLeastRecentlyUsed) {
  ExtentTable table(3, 1, Lru(3));
  for (uint64_t n = 0; n < 3; ++n) EXPECT_TRUE(Put(table, n).empty());
  EXPECT_EQ(*table.Find(KeyOf(0)), 0u);
  EXPECT_EQ(*table.Find(KeyOf(2)), 2u);
  table.Touch(*table.Find(KeyOf(0)));
  EXPECT_EQ(Put(table, 3), std::vector<BlockKey>{KeyOf(1)});
  EXPECT_EQ(table.live_count(), 3u);
}

TEST_F(ExtentTableTest, AParentStaysAsLongAsItsChildren) {
  ExtentTable table(3, 1, Lru(3));
  Put(table, 0);
  Put(table, 1, 0);
  Put(table, 2, 1);
  table.Touch(*table.Find(KeyOf(2)));
  EXPECT_EQ(Put(table, 10), std::vector<BlockKey>{KeyOf(2)});
  EXPECT_EQ(Put(table, 11), std::vector<BlockKey>{KeyOf(1)});
  EXPECT_EQ(Put(table, 12), std::vector<BlockKey>{KeyOf(0)});  // older than 10, and a leaf by now
}

TEST_F(ExtentTableTest, PinnedOnesAreNoVictimsAndRemovedOnesAreFreeWhenUnpinned) {
  ExtentTable table(2, 1, Lru(2));
  Put(table, 0);
  Put(table, 1);
  const auto zero = *table.Find(KeyOf(0));
  table.Pin(zero);
  EXPECT_EQ(Put(table, 2), std::vector<BlockKey>{KeyOf(1)});
  table.Pin(*table.Find(KeyOf(2)));
  std::vector<ExtentTable::Removed> removed;
  EXPECT_FALSE(table.Allocate(kPage, removed).has_value());
  table.Remove(zero);
  EXPECT_FALSE(table.Find(KeyOf(0)).has_value());
  EXPECT_FALSE(table.Allocate(kPage, removed).has_value());  // still being read
  table.Unpin(zero);
  EXPECT_EQ(table.Allocate(kPage, removed), zero);
  EXPECT_TRUE(removed.empty());
}

TEST_F(ExtentTableTest, UnpinnedVictimCanGoAgain) {
  ExtentTable table(1, 1, Lru(1));
  Put(table, 0);
  table.Pin(0);
  std::vector<ExtentTable::Removed> removed;
  EXPECT_FALSE(table.Allocate(kPage, removed).has_value());
  table.Unpin(0);
  EXPECT_EQ(Put(table, 1), std::vector<BlockKey>{KeyOf(0)});
}

TEST_F(ExtentTableTest, RetiredAndAbandonedExtents) {
  ExtentTable table(2, 1, Lru(2));
  std::vector<ExtentTable::Removed> removed;
  const auto bad = *table.Allocate(kPage, removed);
  table.Retire(bad);
  const auto good = *table.Allocate(kPage, removed);
  table.Abandon(good);
  Put(table, 0);
  EXPECT_EQ(Put(table, 1), std::vector<BlockKey>{KeyOf(0)});
  EXPECT_EQ(table.occupied(), 2u);
}

TEST_F(ExtentTableTest, RestoreRefusesWhatCannotBe) {
  ExtentTable table(4, 1, Lru(4));
  EXPECT_TRUE(table.Restore(EntryOf(0, 2), kPage, false));
  EXPECT_FALSE(table.Restore(EntryOf(1, 2), kPage, false));  // its place is taken
  EXPECT_FALSE(table.Restore(EntryOf(1, 4), kPage, false));  // beyond the file
  EXPECT_FALSE(table.Restore(EntryOf(0, 3), kPage, false));  // its key is taken
  EXPECT_TRUE(table.Restore(EntryOf(5, 3), kPage, true));
  table.FinishRestore();
  EXPECT_EQ(table.live_count(), 1u);
  EXPECT_FALSE(table.Find(KeyOf(5)).has_value());
  EXPECT_TRUE(table.foreign(1));  // the second that was taken over
  // Free ones first, then the foreign one, then evictions.
  EXPECT_TRUE(Put(table, 10).empty());
  EXPECT_TRUE(Put(table, 11).empty());
  EXPECT_EQ(Put(table, 12), std::vector<BlockKey>{KeyOf(5)});
  EXPECT_EQ(Put(table, 13), std::vector<BlockKey>{KeyOf(0)});
}

TEST_F(ExtentTableTest, RestoredChainsGoFromTheirTailAndOldOnesFirst) {
  ExtentTable table(4, 1, Lru(4));
  IndexEntry young = EntryOf(9, 3);
  young.stored_at = 100;
  EXPECT_TRUE(table.Restore(EntryOf(2, 0, 1), kPage, false));  // the child before its parent
  EXPECT_TRUE(table.Restore(EntryOf(1, 1, 0), kPage, false));
  EXPECT_TRUE(table.Restore(young, kPage, false));
  EXPECT_TRUE(table.Restore(EntryOf(0, 2), kPage, false));
  table.FinishRestore();
  EXPECT_EQ(Put(table, 20), std::vector<BlockKey>{KeyOf(2)});
  EXPECT_EQ(Put(table, 21), std::vector<BlockKey>{KeyOf(1)});
  EXPECT_EQ(Put(table, 22), std::vector<BlockKey>{KeyOf(0)});
}

TEST_F(ExtentTableTest, RandomOperationsKeepItsBooks) {
  constexpr uint32_t kExtents = 12;
  ExtentTable table(kExtents, 1, Lru(kExtents));
  std::map<uint64_t, ExtentTable::Id> live;  // by number
  std::map<ExtentTable::Id, int> pins;
  std::set<ExtentTable::Id> writing;
  Rng rng(5);
  for (int step = 0; step < 20000; ++step) {
    const uint64_t n = rng.Below(30);
    switch (rng.Below(6)) {
      case 0: {
        std::vector<ExtentTable::Removed> removed;
        const auto id = table.Allocate(kPage, removed);
        for (const auto& r : removed) {
          const auto gone =
              std::ranges::find_if(live, [&](const auto& e) { return KeyOf(e.first) == r.key; });
          ASSERT_NE(gone, live.end());
          ASSERT_EQ(pins.count(gone->second), 0u);
          live.erase(gone);
        }
        if (!id) break;
        ASSERT_EQ(pins.count(*id), 0u);
        ASSERT_TRUE(writing.insert(*id).second);
        break;
      }
      case 1:
        if (writing.empty() || live.count(n) > 0) break;
        table.Commit(*writing.begin(),
                     EntryOf(n, table.page(*writing.begin()), n > 0 ? std::optional(n - 1) : std::nullopt));
        live[n] = *writing.begin();
        writing.erase(writing.begin());
        break;
      case 2:
        if (writing.empty()) break;
        table.Abandon(*writing.begin());
        writing.erase(writing.begin());
        break;
      case 3:
        if (live.count(n) == 0) break;
        table.Pin(live[n]);
        table.Touch(live[n]);
        ++pins[live[n]];
        break;
      case 4:
        if (pins.empty()) break;
        table.Unpin(pins.begin()->first);
        if (--pins.begin()->second == 0) pins.erase(pins.begin());
        break;
      default:
        if (live.count(n) == 0) break;
        table.Remove(live[n]);
        live.erase(n);
    }
    ASSERT_EQ(table.live_count(), live.size());
    ASSERT_LE(table.occupied(), kExtents);
    for (const auto& [number, id] : live) {
      ASSERT_EQ(table.Find(KeyOf(number)), id);
      ASSERT_EQ(table.Entry(id).key, KeyOf(number));
    }
  }
}

// Records of 16 pages at most in a file of 64.
class RecordSizesTest : public ExtentTableTest {
 protected:
  static constexpr uint64_t kFull = 16 * kPage;
  ExtentTable table_{64, 16, Lru(ExtentTable::MaxRecords(64, 16))};
  std::vector<ExtentTable::Removed> removed_;

  ExtentTable::Id Make(uint64_t n, uint64_t bytes) {
    const auto id = table_.Allocate(bytes, removed_);
    EXPECT_TRUE(id.has_value());
    table_.Commit(*id, EntryOf(n, table_.page(*id)));
    return *id;
  }
  IndexEntry Moved(uint64_t n, ExtentTable::Id to) {
    IndexEntry e = EntryOf(n, table_.page(to));
    e.stamp = {2, n};
    e.encoding = RecordEncoding::kPlanes;
    e.stored_bytes = 50;
    return e;
  }
};

TEST_F(RecordSizesTest, ShorterRecordsLeaveRoomForMore) {
  EXPECT_EQ(table_.SizeOf(1), 4u);  // a quarter at least
  EXPECT_EQ(table_.SizeOf(10 * kPage + 1), 11u);
  EXPECT_EQ(table_.SizeOf(kFull), 16u);
  for (uint64_t n = 0; n < 5; ++n) Make(n, 12 * kPage);  // four full ones would have fitted
  EXPECT_TRUE(removed_.empty());
  EXPECT_EQ(table_.live_pages(), 60u);
  EXPECT_EQ(table_.occupied(), 60u);
  Make(5, 4 * kPage);
  EXPECT_TRUE(removed_.empty());
  Make(6, 12 * kPage);  // what one left the next of its size takes
  EXPECT_EQ(removed_.size(), 1u);
}

TEST_F(RecordSizesTest, AFullRecordFindsRoomAmongShortOnes) {
  for (uint64_t n = 0; n < 16; ++n) Make(n, 4 * kPage);
  // The least recently used ones lie apart.
  for (const uint64_t n : {1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15}) table_.Touch(*table_.Find(KeyOf(n)));
  Make(100, kFull);
  EXPECT_TRUE(table_.Find(KeyOf(100)).has_value());
  EXPECT_LE(removed_.size(), 8u);
  EXPECT_EQ(table_.live_count(), 17 - removed_.size());
}

TEST_F(RecordSizesTest, ARelocatedBlockGivesItsFormerPlaceBackWhenNobodyReadsIt) {
  const auto id = Make(1, kFull);
  const uint64_t before = table_.page(id);
  table_.Pin(id);
  const auto fresh = *table_.Allocate(8 * kPage, removed_);
  const uint64_t after = table_.page(fresh);
  table_.Relocate(id, fresh, Moved(1, fresh));
  EXPECT_EQ(table_.Find(KeyOf(1)), id);
  EXPECT_EQ(table_.page(id), after);
  EXPECT_NE(after, before);
  EXPECT_EQ(table_.Entry(id).place, after);
  EXPECT_EQ(table_.encoding(id), RecordEncoding::kPlanes);
  EXPECT_EQ(table_.stamp(id), (RecordStamp{2, 1}));
  EXPECT_EQ(table_.live_pages(), 8u);
  EXPECT_EQ(table_.occupied(), 24u);  // somebody reads the former one
  table_.Unpin(id);
  EXPECT_EQ(table_.occupied(), 8u);
  table_.Remove(id);
  EXPECT_EQ(table_.occupied(), 0u);
}

TEST_F(RecordSizesTest, ARelocatedBlockThatIsRemovedUnderItsReaderFreesBothPlaces) {
  const auto id = Make(1, kFull);
  table_.Pin(id);
  const auto fresh = *table_.Allocate(8 * kPage, removed_);
  table_.Relocate(id, fresh, Moved(1, fresh));
  table_.Remove(id);
  EXPECT_EQ(table_.occupied(), 24u);
  table_.Unpin(id);
  EXPECT_EQ(table_.occupied(), 0u);
}

TEST_F(RecordSizesTest, RecordsOfVersionOneAreCountedInRecords) {
  IndexEntry old = EntryOf(1, 2);
  old.version = 1;
  ASSERT_TRUE(table_.Restore(old, kFull, false));
  EXPECT_FALSE(table_.Restore(EntryOf(2, 47), kPage, false));  // a page of it
  EXPECT_TRUE(table_.Restore(EntryOf(2, 48), kPage, false));
  table_.FinishRestore();
  EXPECT_EQ(table_.page(*table_.Find(KeyOf(1))), 32u);
  EXPECT_EQ(table_.Entry(*table_.Find(KeyOf(1))), old);
}

TEST_F(RecordSizesTest, TheNextVictimIsNamedOnlyWhereThereIsNoRoom) {
  EXPECT_FALSE(table_.NextVictim(kFull).has_value());
  for (uint64_t n = 0; n < 4; ++n) Make(n, kFull);
  table_.Touch(*table_.Find(KeyOf(0)));
  EXPECT_EQ(table_.NextVictim(kFull), KeyOf(1));
  Make(9, kFull);
  ASSERT_EQ(removed_.size(), 1u);
  EXPECT_EQ(removed_[0].key, KeyOf(1));
}

TEST(PageRuns, AgreesWithAMapOfPages) {
  constexpr uint64_t kPages = 97;
  PageRuns runs(kPages);
  std::vector<bool> free(kPages, true);
  std::vector<std::pair<uint64_t, uint64_t>> taken;
  Rng rng(3);
  const auto mark = [&](uint64_t page, uint64_t n, bool value) {
    for (uint64_t i = page; i < page + n; ++i) {
      ASSERT_EQ(free[i], !value);
      free[i] = value;
    }
  };
  for (int step = 0; step < 20000; ++step) {
    const uint64_t n = 1 + rng.Below(12);
    uint64_t longest = 0;
    for (uint64_t i = 0, length = 0; i < kPages; ++i) {
      length = free[i] ? length + 1 : 0;
      longest = std::max(longest, length);
    }
    ASSERT_EQ(runs.Longest().pages, longest);
    ASSERT_EQ(runs.free_pages(), static_cast<uint64_t>(std::ranges::count(free, true)));
    switch (rng.Below(3)) {
      case 0:
        if (const auto page = runs.Take(n)) {
          mark(*page, n, false);
          taken.emplace_back(*page, n);
        } else {
          ASSERT_LT(longest, n);
        }
        break;
      case 1: {
        const uint64_t page = rng.Below(kPages + 4);
        bool all = page + n <= kPages;
        for (uint64_t i = page; all && i < page + n; ++i) all = free[i];
        ASSERT_EQ(runs.TakeAt(page, n), all);
        if (all) {
          mark(page, n, false);
          taken.emplace_back(page, n);
        }
        break;
      }
      default:
        if (taken.empty()) break;
        const size_t i = rng.Below(taken.size());
        runs.Give(taken[i].first, taken[i].second);
        mark(taken[i].first, taken[i].second, true);
        taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
}

TEST(TokenBucket, HoldsItsRateAndLetsOneRecordThrough) {
  FakeClock clock;
  TokenBucket bucket(1000, 500, clock.Now());
  EXPECT_EQ(bucket.Wait(500, clock.Now()), absl::ZeroDuration());
  bucket.Take(500);
  EXPECT_EQ(bucket.Wait(500, clock.Now()), absl::Milliseconds(500));
  clock.Advance(absl::Seconds(10));  // no more is saved up than the bucket holds
  EXPECT_EQ(bucket.Wait(500, clock.Now()), absl::ZeroDuration());
  bucket.Take(500);
  EXPECT_GT(bucket.Wait(500, clock.Now()), absl::Milliseconds(499));
  TokenBucket unlimited(0, 500, clock.Now());
  for (int i = 0; i < 3; ++i) {
    unlimited.Take(1 << 30);
    EXPECT_EQ(unlimited.Wait(1 << 30, clock.Now()), absl::ZeroDuration());
  }
}

class WriteGateTest : public testing::Test {
 protected:
  static constexpr uint64_t kRecord = 1000;
  FakeClock clock_;
  bool Go(WriteGate& gate, uint32_t day = 1) {
    if (gate.Ask(clock_.Now(), day, kRecord).answer != WriteGate::Answer::kGo) return false;
    gate.Take(clock_.Now(), kRecord);
    return true;
  }
};

TEST_F(WriteGateTest, WithoutLimitsEverythingGoes) {
  WriteGate gate({.record_bytes = kRecord}, {}, clock_.Now());
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(Go(gate));
}

TEST_F(WriteGateTest, RateHoldsOverTime) {
  WriteGate gate({.bytes_per_second = 10 * kRecord, .record_bytes = kRecord}, {}, clock_.Now());
  int went = 0;
  for (int ms = 0; ms < 10'000; ++ms) {
    while (Go(gate)) ++went;
    clock_.Advance(absl::Milliseconds(1));
  }
  EXPECT_GE(went, 99);
  EXPECT_LE(went, 103);  // a bucket's worth more
  const auto later = gate.Ask(clock_.Now(), 1, kRecord);
  EXPECT_EQ(later.answer, WriteGate::Answer::kLater);
  clock_.Advance(later.wait + absl::Milliseconds(1));
  EXPECT_TRUE(Go(gate));
}

TEST_F(WriteGateTest, ARateBelowOneRecordASecondStillGoes) {
  WriteGate gate({.bytes_per_second = kRecord / 2, .record_bytes = kRecord}, {}, clock_.Now());
  EXPECT_TRUE(Go(gate));
  EXPECT_FALSE(Go(gate));
  clock_.Advance(absl::Milliseconds(2001));
  EXPECT_TRUE(Go(gate));
}

TEST_F(WriteGateTest, TheDaysBudgetEndsWithTheDayAndIsRemembered) {
  const WriteGate::Options options{.bytes_per_day = 3 * kRecord, .record_bytes = kRecord};
  WriteGate gate(options, {.day = 1, .bytes = kRecord}, clock_.Now());
  EXPECT_TRUE(Go(gate));
  EXPECT_TRUE(Go(gate));
  EXPECT_EQ(gate.Ask(clock_.Now(), 1, kRecord).answer, WriteGate::Answer::kWornOut);
  EXPECT_EQ(gate.written().bytes, 3 * kRecord);
  EXPECT_TRUE(Go(gate, 2));
  EXPECT_EQ(gate.written().day, 2u);
}

TEST_F(WriteGateTest, AStoreIsChargedWhatItWritesAndOnlyIfItGoes) {
  WriteGate gate({.bytes_per_day = kRecord, .record_bytes = kRecord}, {.day = 1}, clock_.Now());
  for (int i = 0; i < 10; ++i)
    EXPECT_EQ(gate.Ask(clock_.Now(), 1, kRecord).answer, WriteGate::Answer::kGo) << "nothing was taken";
  gate.Take(clock_.Now(), kRecord / 4);
  EXPECT_EQ(gate.written().bytes, kRecord / 4);
  EXPECT_EQ(gate.Ask(clock_.Now(), 1, kRecord).answer, WriteGate::Answer::kWornOut);
  EXPECT_EQ(gate.Ask(clock_.Now(), 1, kRecord / 2).answer, WriteGate::Answer::kGo);
}

TEST_F(WriteGateTest, BesideLoadsStoresGetTheirShare) {
  WriteGate gate({.read_share = 0.1, .read_quiet = absl::Milliseconds(10), .record_bytes = kRecord}, {},
                 clock_.Now());
  int went = 0;
  for (int i = 0; i < 1000; ++i) {
    gate.OnReadsActive(clock_.Now());
    while (Go(gate)) ++went;
    clock_.Advance(absl::Milliseconds(1));
    gate.OnReadDone(kRecord, clock_.Now());
  }
  EXPECT_GE(went, 95);
  EXPECT_LE(went, 101);
  // In the gap after a load it waits; after the quiet time everything goes.
  while (Go(gate)) {
  }
  clock_.Advance(absl::Milliseconds(9));
  EXPECT_FALSE(Go(gate));
  clock_.Advance(absl::Milliseconds(2));
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(Go(gate));
}

TEST(TierBreaker, PausesDoubleUntilItHasBeenSoundForLong) {
  FakeClock clock;
  TierBreaker breaker({.probe_after = absl::Seconds(1), .probe_after_max = absl::Seconds(4)});
  EXPECT_EQ(breaker.health().state, TierState::kOpening);
  breaker.Recover(clock.Now());
  EXPECT_TRUE(breaker.on());
  const auto fail = [&] {
    breaker.Fail("why", clock.Now());
    return breaker.next_probe() - clock.Now();
  };
  EXPECT_EQ(fail(), absl::Seconds(1));
  EXPECT_EQ(breaker.health(), (TierHealth{TierState::kOff, "why"}));
  EXPECT_EQ(fail(), absl::Seconds(2));
  EXPECT_EQ(fail(), absl::Seconds(4));
  EXPECT_EQ(fail(), absl::Seconds(4));
  breaker.Recover(clock.Now());
  EXPECT_EQ(breaker.health(), (TierHealth{TierState::kOn, ""}));
  clock.Advance(absl::Seconds(10));
  EXPECT_EQ(fail(), absl::Seconds(4));  // it was on for a moment only
  breaker.Recover(clock.Now());
  clock.Advance(absl::Minutes(5));
  EXPECT_EQ(fail(), absl::Seconds(1));
}

TEST(SpeedMeter, BandwidthIsOfTheTierAndLatencyOfOneOperation) {
  FakeClock clock;
  SpeedMeter meter;
  EXPECT_EQ(meter.speed().bytes_per_second, 0);
  // Four at a time, 40 ms each: 100 a second, with idle time between that does not count.
  for (int burst = 0; burst < 50; ++burst) {
    for (int i = 0; i < 4; ++i) meter.OnStart(clock.Now());
    clock.Advance(absl::Milliseconds(40));
    for (int i = 0; i < 4; ++i) meter.OnEnd(1000, absl::Milliseconds(40), clock.Now());
    clock.Advance(absl::Seconds(1));
  }
  EXPECT_NEAR(meter.speed().latency_seconds, 0.04, 1e-9);
  EXPECT_NEAR(meter.speed().bytes_per_second, 100'000, 5'000);
  // It slows down to a tenth.
  for (int burst = 0; burst < 20; ++burst) {
    meter.OnStart(clock.Now());
    clock.Advance(absl::Milliseconds(100));
    meter.OnEnd(1000, absl::Milliseconds(100), clock.Now());
  }
  EXPECT_NEAR(meter.speed().bytes_per_second, 10'000, 1'000);
}

}  // namespace
}  // namespace tidepool
