#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <set>
#include <vector>

#include "base/clock.h"
#include "base/rng.h"
#include "kvstore/disk/extent_table.h"
#include "kvstore/disk/speed_meter.h"
#include "kvstore/disk/tier_breaker.h"
#include "kvstore/disk/write_gate.h"
#include "tests/kvstore/disk_test_util.h"

namespace tidepool {
namespace {

std::unique_ptr<EvictionPolicy> Lru(uint32_t capacity) {
  return *CreatePolicy({.name = "lru", .capacity = capacity});
}

IndexEntry EntryOf(uint64_t n, uint64_t extent, std::optional<uint64_t> parent = std::nullopt) {
  IndexEntry e;
  e.key = KeyOf(n);
  e.extent = extent;
  e.stamp = {1, n};
  if (parent) e.parent = KeyOf(*parent);
  e.tenant = "t";
  e.payload_bytes = 100;
  return e;
}

class ExtentTableTest : public testing::Test {
 protected:
  // Allocates and commits; the keys that went.
  std::vector<BlockKey> Put(ExtentTable& table, uint64_t n, std::optional<uint64_t> parent = std::nullopt) {
    std::vector<ExtentTable::Removed> removed;
    const auto id = table.Allocate(removed);
    EXPECT_TRUE(id.has_value());
    table.Commit(*id, EntryOf(n, *id, parent));
    std::vector<BlockKey> keys;
    for (const auto& r : removed) keys.push_back(r.key);
    return keys;
  }
};

TEST_F(ExtentTableTest, FillsFromTheFrontAndEvictsTheLeastRecentlyUsed) {
  ExtentTable table(3, Lru(3));
  for (uint64_t n = 0; n < 3; ++n) EXPECT_TRUE(Put(table, n).empty());
  EXPECT_EQ(*table.Find(KeyOf(0)), 0u);
  EXPECT_EQ(*table.Find(KeyOf(2)), 2u);
  table.Touch(*table.Find(KeyOf(0)));
  EXPECT_EQ(Put(table, 3), std::vector<BlockKey>{KeyOf(1)});
  EXPECT_EQ(table.live_count(), 3u);
}

TEST_F(ExtentTableTest, AParentStaysAsLongAsItsChildren) {
  ExtentTable table(3, Lru(3));
  Put(table, 0);
  Put(table, 1, 0);
  Put(table, 2, 1);
  table.Touch(*table.Find(KeyOf(2)));
  EXPECT_EQ(Put(table, 10), std::vector<BlockKey>{KeyOf(2)});
  EXPECT_EQ(Put(table, 11), std::vector<BlockKey>{KeyOf(1)});
  EXPECT_EQ(Put(table, 12), std::vector<BlockKey>{KeyOf(0)});  // older than 10, and a leaf by now
}

TEST_F(ExtentTableTest, PinnedOnesAreNoVictimsAndRemovedOnesAreFreeWhenUnpinned) {
  ExtentTable table(2, Lru(2));
  Put(table, 0);
  Put(table, 1);
  const auto zero = *table.Find(KeyOf(0));
  table.Pin(zero);
  EXPECT_EQ(Put(table, 2), std::vector<BlockKey>{KeyOf(1)});
  table.Pin(*table.Find(KeyOf(2)));
  std::vector<ExtentTable::Removed> removed;
  EXPECT_FALSE(table.Allocate(removed).has_value());
  table.Remove(zero);
  EXPECT_FALSE(table.Find(KeyOf(0)).has_value());
  EXPECT_FALSE(table.Allocate(removed).has_value());  // still being read
  table.Unpin(zero);
  EXPECT_EQ(table.Allocate(removed), zero);
  EXPECT_TRUE(removed.empty());
}

TEST_F(ExtentTableTest, UnpinnedVictimCanGoAgain) {
  ExtentTable table(1, Lru(1));
  Put(table, 0);
  table.Pin(0);
  std::vector<ExtentTable::Removed> removed;
  EXPECT_FALSE(table.Allocate(removed).has_value());
  table.Unpin(0);
  EXPECT_EQ(Put(table, 1), std::vector<BlockKey>{KeyOf(0)});
}

TEST_F(ExtentTableTest, RetiredAndAbandonedExtents) {
  ExtentTable table(2, Lru(2));
  std::vector<ExtentTable::Removed> removed;
  const auto bad = *table.Allocate(removed);
  table.Retire(bad);
  const auto good = *table.Allocate(removed);
  table.Abandon(good);
  Put(table, 0);
  EXPECT_EQ(Put(table, 1), std::vector<BlockKey>{KeyOf(0)});
  EXPECT_EQ(table.occupied(), 2u);
}

TEST_F(ExtentTableTest, RestoreRefusesWhatCannotBe) {
  ExtentTable table(4, Lru(4));
  EXPECT_TRUE(table.Restore(EntryOf(0, 2), false));
  EXPECT_FALSE(table.Restore(EntryOf(1, 2), false));  // its place is taken
  EXPECT_FALSE(table.Restore(EntryOf(1, 4), false));  // beyond the file
  EXPECT_FALSE(table.Restore(EntryOf(0, 3), false));  // its key is taken
  EXPECT_TRUE(table.Restore(EntryOf(5, 3), true));
  table.FinishRestore();
  EXPECT_EQ(table.live_count(), 1u);
  EXPECT_FALSE(table.Find(KeyOf(5)).has_value());
  EXPECT_TRUE(table.foreign(3));
  // Free ones first, then the foreign one, then evictions.
  EXPECT_TRUE(Put(table, 10).empty());
  EXPECT_TRUE(Put(table, 11).empty());
  EXPECT_EQ(Put(table, 12), std::vector<BlockKey>{KeyOf(5)});
  EXPECT_EQ(Put(table, 13), std::vector<BlockKey>{KeyOf(0)});
}

TEST_F(ExtentTableTest, RestoredChainsGoFromTheirTailAndOldOnesFirst) {
  ExtentTable table(4, Lru(4));
  IndexEntry young = EntryOf(9, 3);
  young.stored_at = 100;
  EXPECT_TRUE(table.Restore(EntryOf(2, 0, 1), false));  // the child before its parent
  EXPECT_TRUE(table.Restore(EntryOf(1, 1, 0), false));
  EXPECT_TRUE(table.Restore(young, false));
  EXPECT_TRUE(table.Restore(EntryOf(0, 2), false));
  table.FinishRestore();
  EXPECT_EQ(Put(table, 20), std::vector<BlockKey>{KeyOf(2)});
  EXPECT_EQ(Put(table, 21), std::vector<BlockKey>{KeyOf(1)});
  EXPECT_EQ(Put(table, 22), std::vector<BlockKey>{KeyOf(0)});
}

TEST_F(ExtentTableTest, RandomOperationsKeepItsBooks) {
  constexpr uint32_t kExtents = 12;
  ExtentTable table(kExtents, Lru(kExtents));
  std::map<uint64_t, ExtentTable::Id> live;  // by number
  std::map<ExtentTable::Id, int> pins;
  std::set<ExtentTable::Id> writing;
  Rng rng(5);
  for (int step = 0; step < 20000; ++step) {
    const uint64_t n = rng.Below(30);
    switch (rng.Below(6)) {
      case 0: {
        std::vector<ExtentTable::Removed> removed;
        const auto id = table.Allocate(removed);
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
                     EntryOf(n, *writing.begin(), n > 0 ? std::optional(n - 1) : std::nullopt));
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
