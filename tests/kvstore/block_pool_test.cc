#include "kvstore/block_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <set>
#include <thread>

#include "kvstore/keys.h"
#include "tests/kvstore/block_pool_fixture.h"
#include "tests/kvstore/event_reader.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

BlockInfo Named(const BlockKey& key, const BlockKey* parent = nullptr) {
  BlockInfo info{.key = key};
  if (parent != nullptr) info.parent = *parent;
  return info;
}

class BlockPoolTest : public BlockPoolFixture {
 protected:
  // Publishes one new block per key, parents told, and drops the leases.
  void Fill(BlockPool& pool, const std::vector<BlockKey>& keys) {
    auto leases = pool.Reserve(keys.size());
    ASSERT_TRUE(leases.ok()) << leases.status();
    for (size_t i = 0; i < keys.size(); ++i)
      (*leases)[i] = pool.Publish(std::move((*leases)[i]), Named(keys[i], i > 0 ? &keys[i - 1] : nullptr));
  }
};

TEST_F(BlockPoolTest, RefusesLayoutsAndSizesItCannotServe) {
  BlockLayout zero = layout_;
  zero.kv_heads = 0;
  auto bad = BlockPool::Create({.layout = zero, .slots = 4, .metrics = &metrics_});
  EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("h0"));
  bad = BlockPool::Create({.layout = layout_, .slots = 0, .metrics = &metrics_});
  EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument);
  BlockLayout huge{.layers = 1u << 20, .kv_heads = 1u << 10, .head_dim = 1u << 10, .block_tokens = 1u << 10};
  bad = BlockPool::Create({.layout = huge, .slots = 1u << 31, .metrics = &metrics_});
  EXPECT_EQ(bad.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("kv.host_bytes"));
}

TEST_F(BlockPoolTest, SlotsAreAlignedAndDisjoint) {
  for (uint32_t head_dim : {1u, 8u, 512u}) {
    layout_.head_dim = head_dim;
    auto pool = Make(5);
    auto leases = pool->Reserve(5);
    ASSERT_TRUE(leases.ok());
    const size_t align = layout_.block_bytes() >= 4096 ? 4096 : 64;
    std::set<std::byte*> starts;
    for (auto& lease : *leases) {
      EXPECT_EQ(lease.data().size(), layout_.block_bytes());
      EXPECT_EQ(reinterpret_cast<uintptr_t>(lease.data().data()) % align, 0u);
      std::memset(lease.data().data(), static_cast<int>(lease.ref().slot), lease.data().size());
      starts.insert(lease.data().data());
    }
    EXPECT_EQ(starts.size(), 5u);
    for (auto& lease : *leases)
      for (std::byte b : lease.data()) ASSERT_EQ(std::to_integer<uint32_t>(b), lease.ref().slot);
  }
}

TEST_F(BlockPoolTest, ReserveIsAllOrNothingAndSaysWhatIsLeased) {
  auto pool = Make(4);
  auto three = pool->Reserve(3);
  ASSERT_TRUE(three.ok());
  auto two = pool->Reserve(2);
  EXPECT_EQ(two.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(two.status().message()), HasSubstr("3 of 4 leased"));
  EXPECT_EQ(pool->stats().free, 1u);
  EXPECT_TRUE(pool->Reserve(0).ok());
}

TEST_F(BlockPoolTest, SlotMovesToNewGenerationWhenGivenBackUnpublished) {
  auto pool = Make(1);
  const SlotRef first = pool->Reserve(1)->front().ref();
  const SlotRef second = pool->Reserve(1)->front().ref();
  EXPECT_EQ(first.slot, second.slot);
  EXPECT_GT(second.generation, first.generation);
}

TEST_F(BlockPoolTest, SlotMovesToNewGenerationWhenEvicted) {
  auto pool = Make(1);
  auto lease = std::move(pool->Reserve(1)->front());
  const SlotRef first = lease.ref();
  lease = pool->Publish(std::move(lease), Named(Key(1)));
  EXPECT_EQ(lease.ref(), first);
  lease = {};
  EXPECT_GT(pool->Reserve(1)->front().ref().generation, first.generation);
}

TEST_F(BlockPoolTest, PublishedBlockIsReadUnchangedUnderItsKey) {
  auto pool = Make(2);
  auto lease = std::move(pool->Reserve(1)->front());
  std::memset(lease.data().data(), 0x5a, lease.data().size());
  EXPECT_FALSE(pool->Lease(Key(1)).has_value());
  lease = pool->Publish(std::move(lease), Named(Key(1)));
  lease = {};
  auto again = pool->Lease(Key(1));
  ASSERT_TRUE(again.has_value());
  for (std::byte b : again->data()) ASSERT_EQ(b, std::byte{0x5a});
}

TEST_F(BlockPoolTest, DuplicatePublishKeepsTheFirstAndGivesUpTheOther) {
  auto pool = Make(2);
  auto leases = *pool->Reserve(2);
  auto first = pool->Publish(std::move(leases[0]), Named(Key(1)));
  auto second = pool->Publish(std::move(leases[1]), Named(Key(1)));
  EXPECT_EQ(first.ref(), second.ref());
  EXPECT_EQ(pool->stats().free, 1u);
  EXPECT_EQ(pool->stats().published, 1u);
  EXPECT_EQ(pool->events().next(), 2u);
  first = {};
  EXPECT_EQ(pool->stats().leased, 1u) << "the second lease still holds it";
  EXPECT_EQ(metrics_
                .AddCounter("tidepool_pool_ops_total", "",
                            {{"tier", "host"}, {"op", "publish"}, {"result", "duplicate"}})
                .value(),
            1u);
}

TEST_F(BlockPoolTest, PublishingAgainUnderTheSameKeyChangesNothing) {
  auto pool = Make(1);
  auto lease = pool->Publish(std::move(pool->Reserve(1)->front()), Named(Key(1)));
  lease = pool->Publish(std::move(lease), Named(Key(1)));
  EXPECT_FALSE(lease.empty());
  EXPECT_EQ(pool->events().next(), 2u);
}

TEST_F(BlockPoolTest, LeasedBlocksAreNotEvicted) {
  auto pool = Make(3);
  Fill(*pool, {Key(1)});
  Fill(*pool, {Key(2)});
  auto held = pool->Lease(Key(1));
  EXPECT_TRUE(pool->Reserve(2).ok());
  EXPECT_FALSE(pool->Reserve(3).ok());
  EXPECT_EQ(pool->MatchPrefix(std::vector{Key(1)}), 1u);
  EXPECT_EQ(pool->MatchPrefix(std::vector{Key(2)}), 0u);
}

TEST_F(BlockPoolTest, CloneHoldsTheBlockByItself) {
  auto pool = Make(1);
  BlockLease clone;
  {
    auto lease = std::move(pool->Reserve(1)->front());
    clone = lease.Clone();
  }
  EXPECT_EQ(pool->stats().leased, 1u);
  clone = {};
  EXPECT_EQ(pool->stats().free, 1u);
}

TEST_F(BlockPoolTest, EvictsLeastRecentlyUsedFirst) {
  auto pool = Make(3);
  for (uint64_t k : {1, 2, 3}) Fill(*pool, {Key(k)});
  EXPECT_TRUE(pool->Lease(Key(1)).has_value());  // now used after 2
  Fill(*pool, {Key(4)});
  EXPECT_EQ(pool->MatchPrefix(std::vector{Key(2)}), 0u);
  EXPECT_EQ(pool->MatchPrefix(std::vector{Key(1)}), 1u);
  EXPECT_EQ(pool->MatchPrefix(std::vector{Key(3)}), 1u);
}

TEST_F(BlockPoolTest, EvictsChainTailBeforeItsHead) {
  auto pool = Make(6);
  const auto chain = Chain(1, 6);
  Fill(*pool, chain);
  for (size_t left = 5; left > 0; --left) {
    auto taken = pool->Reserve(6 - left);
    ASSERT_TRUE(taken.ok());
    EXPECT_EQ(pool->MatchPrefix(chain), left);
    EXPECT_EQ(pool->stats().published, left);
  }
}

TEST_F(BlockPoolTest, LearnsChainsFromPrefixLookups) {
  auto pool = Make(6);
  const auto chain = Chain(1, 6);
  for (const auto& key : chain) Fill(*pool, {key});  // published without parents, head oldest
  pool->LeasePrefix(chain);
  auto taken = pool->Reserve(2);
  ASSERT_TRUE(taken.ok());
  EXPECT_EQ(pool->MatchPrefix(chain), 4u);
}

TEST_F(BlockPoolTest, OlderChainGoesEntirelyBeforeNewerOne) {
  auto pool = Make(8);
  const auto old_chain = Chain(1, 4), new_chain = Chain(100, 4);
  Fill(*pool, old_chain);
  Fill(*pool, new_chain);
  auto taken = pool->Reserve(3);
  ASSERT_TRUE(taken.ok());
  EXPECT_EQ(pool->MatchPrefix(old_chain), 1u);
  EXPECT_EQ(pool->MatchPrefix(new_chain), 4u);
}

TEST_F(BlockPoolTest, SharedHeadOutlivesTheFirstOfItsBranches) {
  auto pool = Make(5);
  const std::vector<BlockKey> a = {Key(1), Key(2), Key(3)}, b = {Key(1), Key(2), Key(4)};
  Fill(*pool, a);
  auto prefix = pool->LeasePrefix(b);
  ASSERT_EQ(prefix.size(), 2u);
  auto lease = pool->Publish(std::move(pool->Reserve(1)->front()), Named(Key(4), &b[1]));
  prefix.clear();
  lease = {};
  auto taken = pool->Reserve(2);  // one free, one evicted
  EXPECT_EQ(pool->MatchPrefix(a), 2u);
  EXPECT_EQ(pool->MatchPrefix(b), 3u);
}

TEST_F(BlockPoolTest, UnleasedParentOfLeasedChildIsTakenOnlyWhenNothingElseIsLeft) {
  auto pool = Make(3);
  Fill(*pool, Chain(1, 2));
  Fill(*pool, {Key(9)});
  auto child = pool->Lease(Key(2));
  auto one = pool->Reserve(1);
  ASSERT_TRUE(one.ok());
  EXPECT_EQ(pool->MatchPrefix(std::vector{Key(1)}), 1u);
  EXPECT_EQ(pool->MatchPrefix(std::vector{Key(9)}), 0u);
  auto two = pool->Reserve(1);
  ASSERT_TRUE(two.ok());
  EXPECT_EQ(pool->MatchPrefix(std::vector{Key(1)}), 0u);
}

TEST_F(BlockPoolTest, NonsensePrefixOrderCannotWedgeEviction) {
  auto pool = Make(3);
  for (uint64_t k : {1, 2, 3}) Fill(*pool, {Key(k)});
  pool->LeasePrefix(std::vector{Key(1), Key(2), Key(3), Key(1), Key(2)});  // a cycle of parents
  EXPECT_TRUE(pool->Reserve(3).ok());
  EXPECT_EQ(pool->stats().free, 3u);
}

TEST_F(BlockPoolTest, PrefixEndsAtTheFirstGap) {
  auto pool = Make(4);
  Fill(*pool, {Key(1)});
  Fill(*pool, {Key(3)});
  const auto chain = Chain(1, 3);
  EXPECT_EQ(pool->MatchPrefix(chain), 1u);
  EXPECT_EQ(pool->LeasePrefix(chain).size(), 1u);
}

TEST_F(BlockPoolTest, EventsTellEveryChangeInOrder) {
  auto pool = Make(2);
  EventReader reader(pool->events());
  Fill(*pool, {Key(1)});
  Fill(*pool, {Key(2)});
  Fill(*pool, {Key(3)});  // evicts 1
  auto first = reader.Read(3);
  EXPECT_FALSE(first.lost);
  ASSERT_EQ(first.events.size(), 3u);
  EXPECT_EQ(first.events[0], (PoolEvent{.seq = 1, .key = Key(1)}));
  EXPECT_EQ(first.events[1], (PoolEvent{.seq = 2, .key = Key(2)}));
  EXPECT_EQ(first.events[2], (PoolEvent{.seq = 3, .kind = PoolEventKind::kRemoved, .key = Key(1)}));
  auto second = reader.Read(3);
  ASSERT_EQ(second.events.size(), 1u);
  EXPECT_EQ(second.events[0], (PoolEvent{.seq = 4, .key = Key(3)}));
  EXPECT_TRUE(reader.Read(3).events.empty());
}

TEST_F(BlockPoolTest, ReaderThatIsTooLateIsToldAndGoesOnFromAListing) {
  auto pool = Make(8, /*max_events=*/4);
  EventReader late(pool->events());
  for (uint64_t k = 1; k <= 6; ++k) Fill(*pool, {Key(k)});
  const auto page = late.Read();
  EXPECT_TRUE(page.lost);
  EXPECT_TRUE(page.events.empty());
  EXPECT_EQ(metrics_.AddCounter("tidepool_pool_events_lost_total", "").value(), 2u);
  EXPECT_EQ(Keys(*pool).size(), 6u);
  Fill(*pool, {Key(7)});
  const auto next = late.Read();
  EXPECT_FALSE(next.lost);
  ASSERT_EQ(next.events.size(), 1u);
  EXPECT_EQ(next.events[0].key, Key(7));
}

TEST_F(BlockPoolTest, QuarantinedSlotIsNeverUsedAgain) {
  auto pool = Make(3);
  auto leases = *pool->Reserve(1);
  const SlotRef bad = leases[0].ref();
  pool->Quarantine(std::move(leases[0]));
  EXPECT_EQ(pool->stats().quarantined, 1u);
  EXPECT_EQ(pool->stats().leased, 0u);
  for (int round = 0; round < 5; ++round) {
    auto two = pool->Reserve(2);
    ASSERT_TRUE(two.ok());
    for (auto& lease : *two) EXPECT_NE(lease.ref().slot, bad.slot);
    EXPECT_FALSE(pool->Reserve(1).ok());
  }
  EXPECT_EQ(metrics_.AddGauge("tidepool_pool_quarantined_objects", "", {{"tier", "host"}}).value(), 1);
}

TEST_F(BlockPoolTest, QuarantineOfPublishedBlockMakesItAMissAtOnce) {
  auto pool = Make(2);
  Fill(*pool, Chain(1, 2));
  auto lease = pool->Lease(Key(1));
  auto other = pool->Lease(Key(1));
  pool->Quarantine(std::move(*lease));
  EXPECT_FALSE(pool->Lease(Key(1)).has_value());
  other.reset();
  EXPECT_EQ(pool->stats().quarantined, 1u);
  EXPECT_EQ(pool->stats().free, 0u);
  EXPECT_TRUE(pool->Reserve(1).ok()) << "the child is an ordinary block now";
  EXPECT_EQ(
      metrics_.AddCounter("tidepool_pool_evictions_total", "", {{"tier", "host"}, {"reason", "quarantine"}})
          .value(),
      1u);
}

TEST_F(BlockPoolTest, MetricsFollowTheSlots) {
  auto pool = Make(4);
  auto& usage = metrics_.AddGauge("tidepool_kv_cache_usage_ratio", "");
  auto& bytes = metrics_.AddGauge("tidepool_pool_bytes", "", {{"tier", "host"}});
  auto& objects = metrics_.AddGauge("tidepool_pool_objects", "", {{"tier", "host"}});
  auto& evictions =
      metrics_.AddCounter("tidepool_pool_evictions_total", "", {{"tier", "host"}, {"reason", "capacity"}});
  const auto block = static_cast<double>(layout_.block_bytes());
  {
    auto two = pool->Reserve(2);
    EXPECT_EQ(usage.value(), 0.5);
    EXPECT_EQ(bytes.value(), 2 * block);
  }
  EXPECT_EQ(usage.value(), 0);
  EXPECT_EQ(bytes.value(), 0);
  Fill(*pool, Chain(1, 3));
  EXPECT_EQ(usage.value(), 0) << "reusable cache counts as free";
  EXPECT_EQ(bytes.value(), 3 * block);
  EXPECT_EQ(objects.value(), 3);
  auto four = pool->Reserve(4);
  EXPECT_EQ(evictions.value(), 3u);
  EXPECT_EQ(objects.value(), 0);
  EXPECT_EQ(usage.value(), 1);
}

using BlockPoolDeathTest = BlockPoolTest;

TEST_F(BlockPoolDeathTest, MisuseByTheProgrammerAborts) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  auto pool = Make(2);
  EXPECT_DEATH(
      {
        auto lease = pool->Publish(std::move(pool->Reserve(1)->front()), Named(Key(1)));
        lease = pool->Publish(std::move(lease), Named(Key(2)));
      },
      "check failed");
  EXPECT_DEATH(BlockLease().data(), "check failed");
  EXPECT_DEATH(
      {
        auto lease = std::move(pool->Reserve(1)->front());
        pool.reset();
      },
      "leases == 0");
}

// The pool against an obvious model: a map of what must be there and what is held.
TEST_F(BlockPoolTest, AgreesWithDumbModelOverRandomOperations) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Rng rng(seed);
    const uint32_t slots = 1 + static_cast<uint32_t>(rng.Below(24));
    auto pool = Make(slots, /*max_events=*/1 << 12);
    struct Held {
      BlockLease lease;
      std::optional<BlockKey> key;
    };
    std::vector<Held> held;
    std::set<BlockKey> known;  // rebuilt from events only
    EventReader reader(pool->events());
    uint32_t quarantined = 0;
    std::map<uint32_t, uint64_t> generations;

    for (int step = 0; step < 3000; ++step) {
      SCOPED_TRACE("seed " + std::to_string(seed) + " step " + std::to_string(step));
      const auto key = Key(rng.Below(40));
      switch (rng.Below(8)) {
        case 0:
        case 1: {  // reserve
          const size_t n = rng.Below(4);
          std::set<uint32_t> leased_slots;
          for (auto& h : held) leased_slots.insert(h.lease.ref().slot);
          const bool fits = n + leased_slots.size() + quarantined <= slots;
          auto got = pool->Reserve(n);
          ASSERT_EQ(got.ok(), fits);
          if (!got.ok()) break;
          for (auto& lease : *got) {
            ASSERT_FALSE(leased_slots.contains(lease.ref().slot)) << "a leased slot was handed out again";
            auto& last = generations[lease.ref().slot];
            ASSERT_GT(lease.ref().generation, last);
            last = lease.ref().generation;
            held.push_back({std::move(lease), std::nullopt});
          }
          break;
        }
        case 2:
        case 3:  // publish: the content is the key, so that a mix-up would show
          for (auto& h : held) {
            if (h.key) continue;
            std::memcpy(h.lease.data().data(), key.bytes.data(), key.bytes.size());
            const BlockKey parent = Key(rng.Below(40));
            h.lease = pool->Publish(std::move(h.lease), Named(key, rng.Chance(0.5) ? &parent : nullptr));
            h.key = key;
            break;
          }
          break;
        case 4:  // drop
          if (held.empty()) break;
          held.erase(held.begin() + static_cast<std::ptrdiff_t>(rng.Below(held.size())));
          break;
        case 5:  // lease
          if (auto lease = pool->Lease(key)) held.push_back({std::move(*lease), key});
          break;
        case 6: {  // a prefix
          std::vector<BlockKey> keys;
          for (size_t i = 0, n = rng.Below(5); i < n; ++i) keys.push_back(Key(rng.Below(40)));
          const size_t expect = pool->MatchPrefix(keys);
          auto leases = pool->LeasePrefix(keys);
          ASSERT_EQ(leases.size(), expect);
          if (rng.Chance(0.5)) break;
          for (size_t i = 0; i < leases.size(); ++i) held.push_back({std::move(leases[i]), keys[i]});
          break;
        }
        case 7:
          if (held.empty() || !rng.Chance(0.1)) break;
          if (rng.Chance(0.9)) {
            held.push_back({held[0].lease.Clone(), held[0].key});
            // An unpublished clone could be published under a second key by this test; drop it at once.
            if (!held.back().key) held.pop_back();
          } else if (!held.back().key) {
            pool->Quarantine(std::move(held.back().lease));
            held.pop_back();
            ++quarantined;
          }
          break;
      }
      const auto page = reader.Read();
      ASSERT_FALSE(page.lost);
      for (const auto& e : page.events) {
        if (e.kind == PoolEventKind::kRemoved) {
          ASSERT_EQ(known.erase(e.key), 1u) << "removed twice or never added";
        } else {
          ASSERT_TRUE(known.insert(e.key).second) << "added twice";
        }
      }
      std::set<uint32_t> leased_slots;
      for (auto& h : held) {
        leased_slots.insert(h.lease.ref().slot);
        if (h.key) {
          ASSERT_TRUE(known.contains(*h.key)) << "a leased published block vanished";
          ASSERT_EQ(std::memcmp(h.lease.data().data(), h.key->bytes.data(), 32), 0);
        }
      }
      const auto stats = pool->stats();
      ASSERT_EQ(stats.published, known.size());
      ASSERT_EQ(stats.leased, leased_slots.size());
      ASSERT_EQ(stats.quarantined, quarantined);
      ASSERT_EQ(stats.free + stats.evictable + stats.leased + stats.quarantined, slots);
    }
    ASSERT_EQ(Keys(*pool), known);
    held.clear();
  }
}

TEST_F(BlockPoolTest, ThreadsShareItWithoutLosingOrMixingBlocks) {
  auto pool = Make(16);
  std::atomic<int> wrong{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(t + 1);
      for (int i = 0; i < 2000; ++i) {
        const auto key = Key(rng.Below(24));
        if (auto lease = pool->Lease(key)) {
          if (std::memcmp(lease->data().data(), key.bytes.data(), 32) != 0) ++wrong;
          auto clone = lease->Clone();
          lease.reset();
          if (std::memcmp(clone.data().data(), key.bytes.data(), 32) != 0) ++wrong;
          continue;
        }
        auto got = pool->Reserve(1 + rng.Below(3));
        if (!got.ok()) continue;
        std::memcpy(got->front().data().data(), key.bytes.data(), 32);
        auto published = pool->Publish(std::move(got->front()), Named(key));
        if (std::memcmp(published.data().data(), key.bytes.data(), 32) != 0) ++wrong;
      }
    });
  }
  std::thread drainer([&] {
    EventReader reader(pool->events());
    while (!stop) {
      reader.State();
      pool->stats();
      pool->List(0, 64);
    }
  });
  for (auto& t : threads) t.join();
  stop = true;
  drainer.join();
  EXPECT_EQ(wrong, 0);
  const auto stats = pool->stats();
  EXPECT_EQ(stats.leased, 0u);
  EXPECT_EQ(stats.free + stats.evictable, 16u);
}

}  // namespace
}  // namespace tidepool
