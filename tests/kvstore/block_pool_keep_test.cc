// What the pool keeps and what it lets go: pins, quotas, removals, sessions, wiping, policies.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <map>
#include <set>
#include <thread>

#include "kvstore/pool_core.h"
#include "tests/kvstore/block_pool_fixture.h"
#include "tests/kvstore/event_reader.h"

namespace tidepool {
namespace {

using testing::HasSubstr;
using testing::UnorderedElementsAre;

class BlockPoolKeepTest : public BlockPoolFixture {
 protected:
  // One request: leases what is there, publishes the rest, lets go. Returns what it found.
  size_t Request(BlockPool& pool, const std::vector<BlockKey>& keys, const std::string& tenant = "",
                 uint64_t session = 0) {
    auto leases = pool.LeasePrefix(keys, {.tenant = tenant, .session = session});
    const size_t hits = leases.size();
    auto fresh = pool.Reserve(keys.size() - hits, {.tenant = tenant});
    EXPECT_TRUE(fresh.ok()) << fresh.status();
    if (!fresh.ok()) return hits;
    for (size_t i = hits; i < keys.size(); ++i) {
      BlockInfo info{
          .key = keys[i], .tenant = tenant, .session = session, .position = static_cast<uint32_t>(i)};
      info.parent = i > 0 ? keys[i - 1] : Key(1u << 30);
      info.tokens = {static_cast<int32_t>(i), 1, 2, 3};
      leases.push_back(pool.Publish(std::move((*fresh)[i - hits]), std::move(info)));
    }
    BlockLease::DropAll(std::move(leases));
    return hits;
  }
  static bool Has(const BlockPool& pool, uint64_t n) { return pool.Contains(std::vector{Key(n)})[0]; }
  uint64_t Count(const char* name, Labels labels = {}) {
    labels["tier"] = "host";
    return metrics_.AddCounter(name, "", labels).value();
  }
};

// --- leases by kind, many at once ---

TEST_F(BlockPoolKeepTest, LeasesAreCountedByWhatTheyAreFor) {
  auto pool = Make(8);
  Request(*pool, Chain(1, 3));
  auto sequence = pool->LeasePrefix(Chain(1, 3));
  auto transfer = pool->Lease(Key(1), LeaseKind::kTransfer);
  auto peers = pool->LeaseMany({{Key(1), Key(9), Key(3)}}, LeaseKind::kPeer);
  auto io = transfer->Clone(LeaseKind::kTierIo);
  ASSERT_EQ(peers.size(), 3u);
  EXPECT_TRUE(peers[1].empty());
  EXPECT_EQ(peers[2].kind(), LeaseKind::kPeer);
  using L = std::array<uint64_t, kLeaseKinds>;
  EXPECT_EQ(pool->stats().leases, (L{3, 1, 1, 2}));
  EXPECT_EQ(metrics_.AddGauge("tidepool_pool_leases", "", {{"tier", "host"}, {"kind", "peer"}}).value(), 2);
  BlockLease::DropAll(std::move(peers));
  EXPECT_EQ(pool->stats().leases, (L{3, 1, 1, 0}));
  BlockLease::DropAll(std::move(sequence));
  transfer.reset();
  EXPECT_EQ(pool->stats().leased, 1u);
  io = {};
  EXPECT_EQ(pool->stats().leases, (L{}));
  EXPECT_EQ(pool->stats().evictable, 3u);
}

TEST_F(BlockPoolKeepTest, DropAllTakesLeasesOfSeveralPoolsAndEmptyOnes) {
  auto a = Make(4), b = Make(4);
  std::vector<BlockLease> mixed;
  for (auto* pool : {a.get(), b.get(), a.get()}) {
    mixed.push_back(std::move(pool->Reserve(1)->front()));
    mixed.emplace_back();
  }
  mixed.push_back(mixed[0].Clone(LeaseKind::kTransfer));
  BlockLease::DropAll(std::move(mixed));
  EXPECT_EQ(a->stats().free, 4u);
  EXPECT_EQ(b->stats().free, 4u);
}

TEST_F(BlockPoolKeepTest, LookingAtABlockOrCopyingItAwayIsNoUse) {
  auto pool = Make(2);
  Request(*pool, {Key(1)});
  Request(*pool, {Key(2)});
  BlockLease::DropAll(pool->LeaseMany(std::vector{Key(1)}, LeaseKind::kTierIo));
  pool->MatchPrefix(std::vector{Key(1)});
  pool->Contains(std::vector{Key(1)});
  pool->Info(Key(1));
  pool->List(0, 10);
  auto one = pool->Reserve(1);
  EXPECT_FALSE(Has(*pool, 1));
  EXPECT_TRUE(Has(*pool, 2));
}

TEST_F(BlockPoolKeepTest, RecencyCountsFromWhenABlockIsLetGo) {
  auto pool = Make(2);
  Request(*pool, {Key(1)});
  Request(*pool, {Key(2)});
  BlockLease::DropAll(pool->LeaseMany(std::vector{Key(1)}, LeaseKind::kPeer));
  auto one = pool->Reserve(1);
  EXPECT_TRUE(Has(*pool, 1));
}

// --- what is known of a block ---

TEST_F(BlockPoolKeepTest, InfoIsWhatThePublisherSaidWhileTheBlockIsReadable) {
  auto pool = Make(1);
  BlockInfo info{.key = Key(1),
                 .parent = Key(7),
                 .tokens = {1, 2, 3, 4},
                 .tenant = "acme",
                 .session = 5,
                 .turn = 2,
                 .position = 3,
                 .compute_seconds = 0.25f};
  auto lease = pool->Publish(std::move(pool->Reserve(1)->front()), info);
  EXPECT_EQ(pool->Info(Key(1)), info);
  EXPECT_EQ(pool->Info(Key(2)), std::nullopt);
  lease = {};
  auto other = pool->Reserve(1);
  EXPECT_EQ(pool->Info(Key(1)), std::nullopt);
}

TEST_F(BlockPoolKeepTest, ListingSelectsByTenantSessionAndRoot) {
  auto pool = Make(16);
  Request(*pool, Chain(1, 3), "a", 1);
  Request(*pool, Chain(11, 2), "a", 2);
  Request(*pool, Chain(21, 2), "b", 3);
  EXPECT_EQ(Keys(*pool).size(), 7u);
  EXPECT_EQ(Keys(*pool, {.tenant = "a"}).size(), 5u);
  EXPECT_THAT(Keys(*pool, {.tenant = "a", .session = 2}), UnorderedElementsAre(Key(11), Key(12)));
  EXPECT_EQ(Keys(*pool, {.root = Key(1u << 30)}).size(), 7u);
  EXPECT_TRUE(Keys(*pool, {.root = Key(5)}).empty());
  EXPECT_TRUE(Keys(*pool, {.tenant = "b", .session = 2}).empty());
  EXPECT_FALSE(pool->List(99999, 5).next.has_value());
}

// --- removal ---

TEST_F(BlockPoolKeepTest, ErasedBlocksAreMissesAtOnceAndFreeWhenTheLastLeaseEnds) {
  auto pool = Make(4);
  EventReader reader(pool->events());
  Request(*pool, Chain(1, 3));
  auto held = pool->Lease(Key(2));
  std::memset(held->data().data(), 0x77, held->data().size());
  const auto removed = pool->Erase(std::vector{Key(2), Key(3), Key(99)});
  EXPECT_EQ(removed.blocks, 2u);
  EXPECT_EQ(removed.leased, 1u);
  EXPECT_EQ(removed.bytes, 2 * layout_.block_bytes());
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 3)), 1u);
  EXPECT_EQ(pool->stats().free, 2u);
  EXPECT_EQ(held->data()[0], std::byte{0x77}) << "the holder reads on";
  EXPECT_THAT(reader.State(), UnorderedElementsAre(Key(1)));
  // The holder may make it readable again.
  BlockLease again = pool->Publish(std::move(*held), {.key = Key(2), .parent = Key(1)});
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 3)), 2u);
  again = {};
  EXPECT_EQ(pool->stats().evictable, 2u);
  EXPECT_EQ(Count("tidepool_pool_evictions_total", {{"reason", "erased"}}), 2u);
}

TEST_F(BlockPoolKeepTest, MovedBlocksSaySoInOneEvent) {
  auto pool = Make(4);
  Request(*pool, {Key(1)});
  EventReader reader(pool->events());
  reader.Read();
  EXPECT_EQ(pool->Erase(std::vector{Key(1)}, false, Tier::kDisk).blocks, 1u);
  const auto page = reader.Read();
  ASSERT_EQ(page.events.size(), 1u);
  EXPECT_EQ(
      page.events[0],
      (PoolEvent{
          .seq = 2, .kind = PoolEventKind::kMoved, .tier = Tier::kDisk, .from = Tier::kHost, .key = Key(1)}));
}

TEST_F(BlockPoolKeepTest, ClearTakesWhatMatchesAndLeavesTheRest) {
  auto pool = Make(16);
  EventReader reader(pool->events());
  Request(*pool, Chain(1, 4), "a", 1);
  Request(*pool, Chain(11, 2), "a", 2);
  Request(*pool, Chain(21, 3), "b", 3);
  EXPECT_EQ(pool->Clear({.session = 2}).blocks, 2u);
  EXPECT_EQ(pool->Clear({.tenant = "b"}).blocks, 3u);
  EXPECT_EQ(pool->Clear({.tenant = "nobody"}).blocks, 0u);
  EXPECT_EQ(Keys(*pool).size(), 4u);
  EXPECT_EQ(reader.State(), Keys(*pool));
  EXPECT_EQ(pool->stats().free, 12u);
}

TEST_F(BlockPoolKeepTest, ClearOfEverythingIsOneEvent) {
  auto pool = Make(16);
  Request(*pool, Chain(1, 9));
  EventReader reader(pool->events());
  reader.Read();
  EXPECT_EQ(pool->Clear({}).blocks, 9u);
  const auto page = reader.Read();
  ASSERT_EQ(page.events.size(), 1u);
  EXPECT_EQ(page.events[0].kind, PoolEventKind::kCleared);
  EXPECT_EQ(pool->stats().free, 16u);
}

TEST_F(BlockPoolKeepTest, ClearLeavesHardPinsUnlessTold) {
  auto pool = Make(16);
  EventReader reader(pool->events());
  Request(*pool, Chain(1, 4));
  ASSERT_TRUE(pool->Pin(Key(2), PinKind::kHard, absl::Minutes(1)).ok());
  const auto first = pool->Clear({});
  EXPECT_EQ(first.blocks, 2u);
  EXPECT_EQ(first.pinned, 2u);
  EXPECT_EQ(reader.State(), Keys(*pool));
  EXPECT_EQ(pool->Clear({}, /*pinned=*/true).blocks, 2u);
  EXPECT_TRUE(reader.State().empty());
  EXPECT_EQ(pool->stats().hard_pinned, 0u);
  EXPECT_EQ(pool->stats().free, 16u);
  EXPECT_TRUE(pool->Unpin(Key(2))) << "the pin itself is still there, on nothing";
}

TEST_F(BlockPoolKeepTest, WhatWasReadBeforeAClearIsNotKeptAfterIt) {
  auto pool = Make(16);
  const auto load = [&](BlockLease& slot, BlockInfo info) {
    return pool->PublishLoaded(slot, std::move(info));
  };
  auto slots = std::move(*pool->Reserve(8));
  EXPECT_TRUE(load(slots[0], {.key = Key(1), .tenant = "a"})) << "nothing was cleared";
  pool->Clear({.tenant = "a"});
  EXPECT_FALSE(Has(*pool, 1));
  EXPECT_FALSE(load(slots[1], {.key = Key(1), .tenant = "a"}));
  EXPECT_FALSE(Has(*pool, 1));
  EXPECT_FALSE(slots[1].empty()) << "its holder goes on with it";
  EXPECT_EQ(Count("tidepool_pool_ops_total", {{"op", "publish"}, {"result", "cleared"}}), 1u);
  EXPECT_TRUE(load(slots[2], {.key = Key(2), .tenant = "b"})) << "another's";
  EXPECT_FALSE(load(slots[0], {.key = Key(1), .tenant = "a"})) << "the slot held it when it was cleared";
  auto later = std::move(*pool->Reserve(3));
  EXPECT_TRUE(load(later[0], {.key = Key(1), .tenant = "a"})) << "read after the clear";
  EXPECT_TRUE(load(slots[1], {.key = Key(1), .tenant = "a"})) << "it is here anyhow";

  pool->Erase(std::vector{Key(3)});
  EXPECT_FALSE(load(slots[3], {.key = Key(3)}));
  EXPECT_TRUE(load(slots[4], {.key = Key(4)}));
  pool->Erase(std::vector{Key(5)}, /*pinned=*/false, Tier::kDisk);
  EXPECT_TRUE(load(slots[5], {.key = Key(5)})) << "moved, not forgotten";

  pool->Clear({.session = 7});
  EXPECT_FALSE(load(slots[6], {.key = Key(6), .session = 7}));
  EXPECT_TRUE(load(slots[6], {.key = Key(6), .session = 8}));
  EXPECT_TRUE(load(slots[7], {.key = Key(7)}));
}

TEST_F(BlockPoolKeepTest, AClearedChainIsNotReadBackFromItsMiddle) {
  auto pool = Make(16);
  auto slots = std::move(*pool->Reserve(4));
  const BlockKey root = Key(100), other = Key(200);
  pool->Publish(std::move(slots[3]), {.key = Key(9), .parent = other, .position = 0});
  pool->Clear({.root = root});
  EXPECT_FALSE(pool->PublishLoaded(slots[0], {.key = Key(1), .parent = root, .position = 0}));
  EXPECT_FALSE(pool->PublishLoaded(slots[1], {.key = Key(2), .parent = Key(1), .position = 1}))
      << "what it hangs on is gone: nobody knows whose it is";
  EXPECT_TRUE(pool->PublishLoaded(slots[2], {.key = Key(10), .parent = Key(9), .position = 1}));
}

TEST_F(BlockPoolKeepTest, AReadThatOutlastsAllRememberedClearsIsNotKept) {
  auto pool = Make(4);
  auto slot = std::move(*pool->Reserve(1));
  for (size_t i = 0; i < PoolCore::kClearsMax; ++i) pool->Clear({.tenant = "somebody"});
  EXPECT_TRUE(pool->PublishLoaded(slot[0], {.key = Key(1), .tenant = "a"}));
  slot = std::move(*pool->Reserve(1));
  for (size_t i = 0; i <= PoolCore::kClearsMax; ++i) pool->Clear({.tenant = "somebody"});
  EXPECT_FALSE(pool->PublishLoaded(slot[0], {.key = Key(2), .tenant = "a"}));
}

TEST_F(BlockPoolKeepTest, ReadersAreRightAboutWhatIsPublishedDuringAClear) {
  auto pool = Make(2000);  // several steps
  EventReader reader(pool->events());
  std::atomic<bool> stop{false};
  std::thread publisher([&] {
    for (uint64_t n = 1; !stop.load(); ++n) {
      auto slot = pool->Reserve(1);
      if (slot.ok()) pool->Publish(std::move((*slot)[0]), {.key = Key(n % 3000)});
    }
  });
  for (int i = 0; i < 200; ++i) {
    pool->Clear({});
    reader.State();
  }
  stop.store(true);
  publisher.join();
  EXPECT_EQ(reader.State(), Keys(*pool));
}

TEST_F(BlockPoolKeepTest, LeasesAreClonedTogether) {
  auto a = Make(4), b = Make(4);
  std::vector<BlockLease> mixed = std::move(*a->Reserve(2));
  mixed.emplace_back();
  auto others = std::move(*b->Reserve(1));
  mixed.push_back(std::move(others[0]));
  std::vector<BlockLease> more = BlockLease::CloneAll(mixed, LeaseKind::kPeer);
  ASSERT_EQ(more.size(), 4u);
  EXPECT_TRUE(more[2].empty());
  EXPECT_EQ(more[3].owner(), b.get());
  EXPECT_EQ(more[1].ref(), mixed[1].ref());
  BlockLease::DropAll(std::move(mixed));
  using L = std::array<uint64_t, kLeaseKinds>;
  EXPECT_EQ(a->stats().leases, (L{0, 0, 0, 2}));
  EXPECT_EQ(b->stats().leased, 1u);
  BlockLease::DropAll(std::move(more));
  EXPECT_EQ(a->stats().free, 4u);
}

// --- pins ---

TEST_F(BlockPoolKeepTest, HardPinHoldsAChainUntilItsTimeIsOver) {
  auto pool = Make(10);
  Request(*pool, Chain(1, 4));
  const auto pinned = pool->Pin(Key(3), PinKind::kHard, absl::Seconds(10));
  ASSERT_TRUE(pinned.ok()) << pinned.status();
  EXPECT_EQ(pinned->blocks, 3u) << "the block and what comes before it";
  EXPECT_EQ(pinned->bytes, 3 * layout_.block_bytes());
  EXPECT_EQ(pool->stats().hard_pinned, 3u);
  { EXPECT_TRUE(pool->Reserve(7).ok()); }
  EXPECT_FALSE(Has(*pool, 4));
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 4)), 3u);
  const auto refused = pool->Reserve(8);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("3 pinned"));
  clock_.Advance(absl::Seconds(10));
  EXPECT_TRUE(pool->Reserve(8).ok());
  EXPECT_EQ(pool->stats().hard_pinned, 0u);
  EXPECT_EQ(Count("tidepool_pool_pins_expired_total"), 1u);
  EXPECT_FALSE(pool->Unpin(Key(3)));
}

TEST_F(BlockPoolKeepTest, SoftPinIsTakenOnlyWhenNothingElseIsLeft) {
  auto pool = Make(6);
  Request(*pool, Chain(1, 2));  // oldest
  Request(*pool, Chain(11, 2));
  Request(*pool, Chain(21, 2));
  ASSERT_TRUE(pool->Pin(Key(2), PinKind::kSoft, absl::Minutes(1)).ok());
  EXPECT_EQ(pool->stats().soft_pinned, 2u);
  { EXPECT_TRUE(pool->Reserve(4).ok()); }
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 2)), 2u);
  { EXPECT_TRUE(pool->Reserve(5).ok()); }
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 2)), 1u);
  EXPECT_EQ(pool->stats().soft_pinned, 1u);
}

TEST_F(BlockPoolKeepTest, PinsOfDifferentClientsHoldIndependently) {
  auto pool = Make(10);
  Request(*pool, Chain(1, 3));
  Request(*pool, {Key(1), Key(2), Key(50)});
  ASSERT_TRUE(pool->Pin(Key(3), PinKind::kHard, absl::Minutes(1)).ok());
  ASSERT_TRUE(pool->Pin(Key(50), PinKind::kHard, absl::Minutes(5)).ok());
  EXPECT_EQ(pool->stats().hard_pinned, 4u);
  EXPECT_TRUE(pool->Unpin(Key(3)));
  EXPECT_EQ(pool->stats().hard_pinned, 3u) << "the shared head is pinned by the other";
  // Pinning again replaces: the old ttl does not end the new pin.
  ASSERT_TRUE(pool->Pin(Key(50), PinKind::kHard, absl::Minutes(60)).ok());
  EXPECT_EQ(pool->stats().pins, 1u);
  clock_.Advance(absl::Minutes(10));
  EXPECT_EQ(pool->stats().hard_pinned, 3u);
  // From hard to soft.
  ASSERT_TRUE(pool->Pin(Key(50), PinKind::kSoft, absl::Minutes(60)).ok());
  EXPECT_EQ(pool->stats().hard_pinned, 0u);
  EXPECT_EQ(pool->stats().soft_pinned, 3u);
}

TEST_F(BlockPoolKeepTest, HardPinsAreBoundedByAShareOfThePool) {
  auto pool = Make({.slots = 10, .hard_pin_share = 0.4});
  Request(*pool, Chain(1, 3));
  Request(*pool, Chain(11, 3));
  ASSERT_TRUE(pool->Pin(Key(3), PinKind::kHard, absl::Minutes(1)).ok());
  const auto refused = pool->Pin(Key(13), PinKind::kHard, absl::Minutes(1));
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("kv.hard_pin_percent"));
  EXPECT_EQ(pool->stats().hard_pinned, 3u) << "all or nothing";
  EXPECT_TRUE(pool->Pin(Key(13), PinKind::kSoft, absl::Minutes(1)).ok());
  EXPECT_TRUE(pool->Pin(Key(3), PinKind::kHard, absl::Minutes(2)).ok()) << "renewing needs no more room";
  EXPECT_TRUE(pool->Pin(Key(11), PinKind::kHard, absl::Minutes(1)).ok());
}

TEST_F(BlockPoolKeepTest, PinRefusesNonsense) {
  auto pool = Make(4);
  Request(*pool, {Key(1)});
  EXPECT_EQ(pool->Pin(Key(9), PinKind::kSoft, absl::Seconds(1)).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(pool->Pin(Key(1), PinKind::kSoft, absl::ZeroDuration()).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(pool->PinSession(0, PinKind::kSoft, absl::Seconds(1)).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(pool->Pin(Key(1), PinKind::kSoft, absl::InfiniteDuration()).ok()) << "until it is unpinned";
  clock_.Advance(absl::Hours(24 * 365));
  EXPECT_TRUE(pool->Unpin(Key(1)));
}

TEST_F(BlockPoolKeepTest, SessionPinHoldsWhatIsThereAndWhatComes) {
  auto pool = Make(12);
  Request(*pool, Chain(1, 2), "t", 7);
  Request(*pool, Chain(21, 2), "t", 8);
  const auto pinned = pool->PinSession(7, PinKind::kHard, absl::Seconds(30));
  ASSERT_TRUE(pinned.ok()) << pinned.status();
  EXPECT_EQ(pinned->blocks, 2u);
  Request(*pool, Chain(1, 4), "t", 7);
  EXPECT_EQ(pool->stats().hard_pinned, 4u);
  { EXPECT_TRUE(pool->Reserve(8).ok()); }
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 4)), 4u);
  EXPECT_FALSE(Has(*pool, 21));
  EXPECT_TRUE(pool->UnpinSession(7));
  EXPECT_FALSE(pool->UnpinSession(7));
  EXPECT_TRUE(pool->Reserve(12).ok());
  EXPECT_TRUE(pool->PinSession(99, PinKind::kSoft, absl::Seconds(1)).ok()) << "no block yet is no error";
}

TEST_F(BlockPoolKeepTest, SessionPinStopsAtTheShareOfHardPins) {
  auto pool = Make({.slots = 10, .hard_pin_share = 0.3});
  ASSERT_TRUE(pool->PinSession(7, PinKind::kHard, absl::Minutes(1)).ok());
  Request(*pool, Chain(1, 5), "t", 7);
  EXPECT_EQ(pool->stats().hard_pinned, 3u);
  EXPECT_EQ(Count("tidepool_pool_pins_refused_total"), 2u);
  EXPECT_TRUE(pool->Reserve(7).ok());
}

// --- tenants ---

TEST_F(BlockPoolKeepTest, TenantAtItsQuotaPaysWithItsOwnBlocks) {
  auto pool = Make({.slots = 10, .tenant_quota_bytes = 4 * layout_.block_bytes()});
  Request(*pool, Chain(1, 3), "old");
  for (uint64_t r = 0; r < 5; ++r) Request(*pool, Chain(100 + 10 * r, 2), "busy");
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 3)), 3u) << "the other tenant's blocks are older, and stay";
  EXPECT_EQ(Keys(*pool, {.tenant = "busy"}).size(), 4u);
  EXPECT_EQ(pool->MatchPrefix(Chain(140, 2)), 2u);
  EXPECT_EQ(pool->stats().free, 3u) << "room alone is no reason to exceed the quota";
  EXPECT_EQ(Count("tidepool_pool_evictions_total", {{"reason", "quota"}}), 6u);
  const auto usage = pool->tenants();
  ASSERT_EQ(usage.size(), 2u);
  EXPECT_EQ(usage[0].tenant, "busy");
  EXPECT_EQ(usage[0].bytes, 4 * layout_.block_bytes());
  EXPECT_EQ(usage[0].quota, 4 * layout_.block_bytes());
}

TEST_F(BlockPoolKeepTest, RunningRequestMayExceedTheQuotaButLeavesNothingBeyondIt) {
  auto pool = Make({.slots = 10, .tenant_quotas = {{"small", 2 * layout_.block_bytes()}}});
  Request(*pool, Chain(1, 6), "small");
  EXPECT_EQ(Keys(*pool, {.tenant = "small"}).size(), 2u);
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 6)), 2u) << "its chain's head";
  Request(*pool, Chain(11, 6), "free");
  EXPECT_EQ(Keys(*pool, {.tenant = "free"}).size(), 6u) << "no quota by default";
}

TEST_F(BlockPoolKeepTest, QuotasOfARunningPoolHoldAtOnceForWhatIsThere) {
  for (const std::string policy : {"turn-aware", "lru", "auto"}) {
    SCOPED_TRACE(policy);
    auto pool = Make({.slots = 12, .policy = policy});
    EventReader reader(pool->events());
    const size_t block = layout_.block_bytes();
    Request(*pool, Chain(1, 5), "a");
    Request(*pool, Chain(11, 5), "b");
    // The first quotas that there are.
    pool->SetTenantQuotas(0, {{"a", 2 * block}});
    EXPECT_EQ(pool->MatchPrefix(Chain(1, 5)), 2u) << "its chain's head";
    EXPECT_EQ(pool->MatchPrefix(Chain(11, 5)), 5u);
    EXPECT_EQ(reader.State(), Keys(*pool));
    Request(*pool, Chain(21, 3), "a");
    EXPECT_LE(Keys(*pool, {.tenant = "a"}).size(), 2u);
    // Others, of all and of one.
    pool->SetTenantQuotas(3 * block, {{"a", 0}});
    EXPECT_EQ(Keys(*pool, {.tenant = "b"}).size(), 3u);
    Request(*pool, Chain(31, 4), "a");
    EXPECT_GE(Keys(*pool, {.tenant = "a"}).size(), 4u);
    Request(*pool, Chain(41, 4), "new");
    EXPECT_EQ(Keys(*pool, {.tenant = "new"}).size(), 3u) << "also whom the pool did not know before";
    // Less than a block is one, and none is none.
    pool->SetTenantQuotas(1, {{"a", 0}});
    for (const auto& usage : pool->tenants()) EXPECT_EQ(usage.quota, usage.tenant == "a" ? 0u : block);
    pool->SetTenantQuotas(0, {});
    Request(*pool, Chain(51, 6), "new");
    EXPECT_GE(Keys(*pool, {.tenant = "new"}).size(), 6u);
    for (const auto& usage : pool->tenants()) EXPECT_EQ(usage.quota, 0u);
  }
}

TEST_F(BlockPoolKeepTest, WhatIsLeasedWhenAQuotaComesGoesWhenItIsReleased) {
  auto pool = Make({.slots = 10});
  Request(*pool, Chain(1, 6), "a");
  std::vector<BlockLease> leases = pool->LeasePrefix(Chain(1, 6), {.tenant = "a"});
  ASSERT_EQ(leases.size(), 6u);
  pool->SetTenantQuotas(2 * layout_.block_bytes(), {});
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 6)), 6u);
  BlockLease::DropAll(std::move(leases));
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 6)), 2u);
}

// --- requests that were swapped out

TEST_F(BlockPoolKeepTest, WhatIsSwappedOutIsEvictedAfterAllThatIsNot) {
  auto pool = Make(10);
  Request(*pool, Chain(1, 4));
  auto leases = pool->LeasePrefix(Chain(1, 4));
  SwappedBlocks away = pool->SwapOut(std::move(leases));
  EXPECT_FALSE(away.empty());
  EXPECT_EQ(pool->stats().leased, 0u) << "no slot is kept for it";
  EXPECT_EQ(pool->stats().leases[static_cast<size_t>(LeaseKind::kSwapped)], 4u);
  Request(*pool, Chain(10, 6));  // used later
  { EXPECT_TRUE(pool->Reserve(6).ok()); }
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 4)), 4u);
  EXPECT_EQ(pool->MatchPrefix(Chain(10, 6)), 0u);
  { EXPECT_TRUE(pool->Reserve(9).ok()) << "it goes where nothing else is left"; }
  EXPECT_EQ(pool->MatchPrefix(Chain(1, 4)), 1u) << "from its end";
  away.Drop();
  EXPECT_TRUE(away.empty());
  EXPECT_EQ(pool->stats().leases[static_cast<size_t>(LeaseKind::kSwapped)], 0u);
  EXPECT_EQ(pool->stats().soft_pinned, 0u);
}

TEST_F(BlockPoolKeepTest, WhatWasSwappedInAgainIsAnOrdinaryEntry) {
  auto pool = Make(8);
  Request(*pool, Chain(1, 4));
  // By name, which is no further turn: turn-aware would keep it for that.
  SwappedBlocks away = pool->SwapOut(pool->LeaseMany(Chain(1, 4), LeaseKind::kSequence));
  auto back = pool->LeaseMany(Chain(1, 4), LeaseKind::kSequence);
  away = {};
  EXPECT_EQ(pool->stats().leased, 4u);
  BlockLease::DropAll(std::move(back));
  Request(*pool, Chain(10, 4));
  { EXPECT_TRUE(pool->Reserve(4).ok()); }
  EXPECT_EQ(pool->MatchPrefix(Chain(10, 4)), 4u) << "the older went first";
}

TEST_F(BlockPoolKeepTest, OnlyPublishedBlocksOfThisPoolAreSwappedOut) {
  auto pool = Make(8), other = Make(2);
  std::vector<BlockLease> leases = *pool->Reserve(2);
  leases.emplace_back();
  auto foreign = *other->Reserve(1);
  leases.push_back(std::move(foreign[0]));
  const SwappedBlocks away = pool->SwapOut(std::move(leases));
  EXPECT_TRUE(away.empty());
  EXPECT_EQ(pool->stats().free, 8u);
  EXPECT_EQ(other->stats().free, 2u);
}

TEST_F(BlockPoolKeepTest, ClearForgetsWhatIsSwappedOutToo) {
  auto pool = Make(8);
  Request(*pool, Chain(1, 4));
  SwappedBlocks away = pool->SwapOut(pool->LeasePrefix(Chain(1, 4)));
  EXPECT_EQ(pool->Clear({}).blocks, 4u);
  EXPECT_EQ(pool->stats().free, 8u);
  Request(*pool, Chain(20, 4));  // in the same slots
  away.Drop();
  EXPECT_EQ(pool->stats().leases[static_cast<size_t>(LeaseKind::kSwapped)], 0u);
  EXPECT_EQ(pool->MatchPrefix(Chain(20, 4)), 4u);
}

TEST_F(BlockPoolKeepTest, SlotThatPassesToAnotherTenantIsWiped) {
  auto pool = Make(1);
  const auto write = [&](const char* tenant) {
    auto lease = std::move(pool->Reserve(1, {.tenant = tenant})->front());
    std::memset(lease.data().data(), 0x5a, lease.data().size());
  };
  const auto clean = [&](const char* tenant) {
    auto lease = std::move(pool->Reserve(1, {.tenant = tenant})->front());
    return std::all_of(lease.data().begin(), lease.data().end(),
                       [](std::byte b) { return b == std::byte{0}; });
  };
  write("a");
  EXPECT_FALSE(clean("a")) << "its own data need not be wiped";
  EXPECT_TRUE(clean("b"));
  write("b");
  EXPECT_TRUE(clean("")) << "nor does somebody unnamed get to see it";
  EXPECT_EQ(Count("tidepool_pool_zeroed_total"), 2u);
  // A block that was published for another tenant than the slot was reserved for is that tenant's.
  {
    auto lease = std::move(pool->Reserve(1)->front());
    std::memset(lease.data().data(), 0x5a, lease.data().size());
    pool->Publish(std::move(lease), {.key = Key(1), .tenant = "c"});
  }
  EXPECT_TRUE(clean(""));
}

// --- sessions and policies ---

TEST_F(BlockPoolKeepTest, FurtherTurnsAreRecognisedFromTheChain) {
  auto pool = Make(64);
  const auto turns = [&] { return Count("tidepool_pool_session_turns_total"); };
  Request(*pool, Chain(1, 4));
  EXPECT_EQ(turns(), 0u);
  Request(*pool, Chain(1, 6));
  EXPECT_EQ(turns(), 1u) << "carries on where the first ended";
  Request(*pool, Chain(1, 8));
  EXPECT_EQ(turns(), 2u);
  // Another conversation under the same system prompt ends nowhere that a conversation ended.
  Request(*pool, {Key(1), Key(2), Key(70), Key(71)});
  EXPECT_EQ(turns(), 2u);
  // One block is no conversation.
  Request(*pool, {Key(80)});
  Request(*pool, {Key(80), Key(81)});
  EXPECT_EQ(turns(), 2u);
}

TEST_F(BlockPoolKeepTest, FurtherTurnIsRecognisedAfterItsBlocksWereEvicted) {
  auto pool = Make(8);
  Request(*pool, Chain(1, 4));
  Request(*pool, Chain(100, 8));
  ASSERT_FALSE(Has(*pool, 1));
  Request(*pool, Chain(1, 6));
  EXPECT_EQ(Count("tidepool_pool_session_turns_total"), 1u);
}

TEST_F(BlockPoolKeepTest, NamedSessionNeedsNoCommonBlocks) {
  auto pool = Make(32);
  Request(*pool, Chain(1, 2), "t", 5);
  Request(*pool, Chain(11, 2), "t", 6);
  EXPECT_EQ(Count("tidepool_pool_session_turns_total"), 0u);
  Request(*pool, Chain(21, 2), "t", 5);  // the client shortened the history
  EXPECT_EQ(Count("tidepool_pool_session_turns_total"), 1u);
}

TEST_F(BlockPoolKeepTest, ConversationThatCameBackOutlivesNewerPrompts) {
  for (const char* policy : {"lru", "turn-aware"}) {
    auto pool = Make({.slots = 12, .policy = policy});
    Request(*pool, Chain(1, 2));
    Request(*pool, Chain(1, 4));  // its second turn
    for (uint64_t r = 0; r < 6; ++r) Request(*pool, Chain(100 + 10 * r, 4));
    EXPECT_EQ(pool->MatchPrefix(Chain(1, 4)), policy == std::string("lru") ? 0u : 4u) << policy;
  }
}

TEST_F(BlockPoolKeepTest, TunedPoolGoesOverToWhatDoesBetter) {
  auto pool = Make({.slots = 100, .policy = "auto"});
  EXPECT_EQ(pool->stats().policy, "turn-aware");
  // A loop over more than fits is LRU's worst case.
  for (int i = 0; i < 60000; ++i) Request(*pool, {Key(static_cast<uint64_t>(i) % 130)});
  EXPECT_NE(pool->stats().policy, "turn-aware");
  EXPECT_GE(Count("tidepool_pool_policy_switches_total"), 1u);
  size_t hits = 0;
  for (int i = 0; i < 1300; ++i) hits += Request(*pool, {Key(static_cast<uint64_t>(i) % 130)});
  EXPECT_GT(hits, 300u);
}

TEST_F(BlockPoolKeepTest, RefusesOptionsThatMakeNoSense) {
  for (BlockPool::Options options : {BlockPool::Options{.slots = 4, .policy = "mru"},
                                     BlockPool::Options{.slots = 4, .hard_pin_share = 1.5},
                                     BlockPool::Options{.slots = 4, .policy = "belady"}}) {
    options.layout = layout_;
    options.metrics = &metrics_;
    EXPECT_EQ(BlockPool::Create(options).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

// --- all of it at once ---

// Random operations under every policy against a model that knows what must hold whatever is evicted when.
class BlockPoolRandomTest : public BlockPoolKeepTest, public testing::WithParamInterface<std::string> {};

TEST_P(BlockPoolRandomTest, InvariantsHoldOverRandomOperations) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    Rng rng(seed);
    const auto slots = static_cast<uint32_t>(8 + rng.Below(40));
    const size_t block = layout_.block_bytes();
    const uint64_t quota = 3 + rng.Below(slots);
    auto pool = Make({.slots = slots,
                      .policy = GetParam(),
                      .tenant_quotas = {{"t1", quota * block}},
                      .hard_pin_share = 0.4});
    EventReader reader(pool->events());
    std::vector<BlockLease> held;
    std::map<uint64_t, absl::Time> hard;  // tail of a chain pinned hard, until when
    const auto max_hard = static_cast<uint32_t>(0.4 * slots);
    for (int step = 0; step < 2500; ++step) {
      SCOPED_TRACE("seed " + std::to_string(seed) + " step " + std::to_string(step));
      const uint64_t tree = 1000 * (1 + rng.Below(6));
      const std::string tenant = "t" + std::to_string(tree / 1000 % 3);
      std::vector<BlockKey> keys = {Key(tree)};
      for (size_t i = rng.Below(5); i > 0; --i) keys.push_back(Key(tree + 10 * keys.size() + rng.Below(2)));
      const uint64_t tail = tree + (keys.size() > 1 ? 10 * (keys.size() - 1) : 0);
      // Quotas come and go while everything else goes on.
      if (rng.Chance(0.01))
        pool->SetTenantQuotas(rng.Below(slots) * block, {{"t1", (3 + rng.Below(slots)) * block}});
      switch (rng.Below(9)) {
        case 0:
        case 1:
        case 2: {
          auto leases = pool->LeasePrefix(keys, {.tenant = tenant, .session = rng.Below(3)});
          auto fresh = pool->Reserve(keys.size() - leases.size(), {.tenant = tenant});
          if (!fresh.ok()) break;
          for (size_t i = leases.size(); i < keys.size(); ++i) {
            BlockInfo info{.key = keys[i], .tenant = tenant, .session = rng.Below(4)};
            info.position = static_cast<uint32_t>(i);
            if (i > 0) info.parent = keys[i - 1];
            auto& lease = (*fresh)[0];
            std::memcpy(lease.data().data(), keys[i].bytes.data(), 32);
            leases.push_back(pool->Publish(std::move(lease), std::move(info)));
            fresh->erase(fresh->begin());
          }
          for (size_t i = 0; i < leases.size(); ++i) {
            ASSERT_EQ(std::memcmp(leases[i].data().data(), keys[i].bytes.data(), 32), 0)
                << "another block's bytes";
            if (rng.Chance(0.2)) held.push_back(std::move(leases[i]));
          }
          BlockLease::DropAll(std::move(leases));
          break;
        }
        case 3:
          if (held.empty()) break;
          std::swap(held[rng.Below(held.size())], held.back());
          held.pop_back();
          break;
        case 4: {
          const bool here = Has(*pool, tail);
          const auto ttl = absl::Seconds(1 + rng.Below(20));
          const auto kind = rng.Chance(0.5) ? PinKind::kHard : PinKind::kSoft;
          const auto pinned = pool->Pin(Key(tail), kind, ttl);
          ASSERT_EQ(pinned.status().code() == absl::StatusCode::kNotFound, !here);
          if (!pinned.ok()) break;
          hard.erase(tail);
          if (kind == PinKind::kHard) hard[tail] = clock_.Now() + ttl;
          break;
        }
        case 5:
          pool->Unpin(Key(tail));
          hard.erase(tail);
          break;
        case 6:
          clock_.Advance(absl::Seconds(rng.Below(5)));
          break;
        case 7:
          if (rng.Chance(0.3)) pool->Erase(keys);
          if (rng.Chance(0.05)) pool->Clear({.tenant = tenant});
          if (rng.Chance(0.02)) pool->Clear({});
          break;
        case 8: {
          const size_t n = rng.Below(slots / 2 + 1);
          const auto before = pool->stats();
          const auto got = pool->Reserve(n, {.tenant = tenant});
          if (n <= before.free) {
            ASSERT_TRUE(got.ok());
          }
          if (n > before.free + before.evictable) {
            ASSERT_FALSE(got.ok());
          }
          break;
        }
      }
      std::erase_if(hard, [&](const auto& pin) { return pin.second <= clock_.Now(); });
      const auto stats = pool->stats();
      ASSERT_EQ(stats.free + stats.evictable + stats.leased, slots);
      ASSERT_LE(stats.hard_pinned, max_hard);
      ASSERT_EQ(stats.leases[0], held.size());
      const std::set<BlockKey> keys_now = Keys(*pool);
      ASSERT_EQ(stats.published, keys_now.size());
      ASSERT_EQ(reader.State(), keys_now) << "the events do not tell what happened";
      for (const auto& [pinned, until] : hard)
        ASSERT_TRUE(keys_now.contains(Key(pinned))) << "pinned block " << pinned;
      for (const auto& t : pool->tenants()) {
        if (t.quota > 0 && held.empty() && stats.hard_pinned == 0) {
          ASSERT_LE(t.bytes, t.quota);
        }
      }
    }
    held.clear();
    for (uint64_t tree = 1000; tree <= 6000; tree += 1000) {
      for (uint64_t i = 0; i < 60; ++i) pool->Unpin(Key(tree + i));
    }
    const auto end = pool->stats();
    EXPECT_EQ(end.leased, 0u);
    EXPECT_EQ(end.hard_pinned + end.soft_pinned + end.pins, 0u);
    EXPECT_TRUE(pool->Reserve(slots).ok()) << "everything can go";
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, BlockPoolRandomTest,
                         testing::Values("lru", "lfu", "s3-fifo", "gdsf", "pgdsf", "turn-aware", "auto"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST_F(BlockPoolKeepTest, ThreadsPinListEraseAndClearWhileOthersUseIt) {
  auto pool = Make({.slots = 48, .policy = "auto", .tenant_quotas = {{"t1", 10 * layout_.block_bytes()}}});
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> users;
  for (uint64_t t = 0; t < 3; ++t) {
    users.emplace_back([&, t] {
      Rng rng(t + 1);
      for (int i = 0; i < 1500; ++i) {
        const uint64_t tree = 1000 * (1 + rng.Below(8));
        const std::string tenant = "t" + std::to_string(tree / 1000 % 2);
        std::vector<BlockKey> keys;
        for (size_t k = 0, n = 1 + rng.Below(5); k < n; ++k)
          keys.push_back(Key(tree + 10 * k + rng.Below(2)));
        auto leases = pool->LeasePrefix(keys, {.tenant = tenant, .session = rng.Below(4)});
        auto fresh = pool->Reserve(keys.size() - leases.size(), {.tenant = tenant});
        if (!fresh.ok()) continue;
        for (size_t k = leases.size(), f = 0; k < keys.size(); ++k, ++f) {
          BlockInfo info{.key = keys[k], .tenant = tenant, .session = rng.Below(4)};
          info.position = static_cast<uint32_t>(k);
          if (k > 0) info.parent = keys[k - 1];
          std::memcpy((*fresh)[f].data().data(), keys[k].bytes.data(), 32);
          leases.push_back(pool->Publish(std::move((*fresh)[f]), std::move(info)));
        }
        for (size_t k = 0; k < keys.size(); ++k) {
          if (std::memcmp(leases[k].data().data(), keys[k].bytes.data(), 32) != 0) ++wrong;
        }
        BlockLease::DropAll(std::move(leases));
      }
    });
  }
  std::thread admin([&] {
    Rng rng(99);
    EventReader reader(pool->events());
    while (!stop) {
      const BlockKey key = Key(1000 * (1 + rng.Below(8)) + 10 * rng.Below(5));
      switch (rng.Below(8)) {
        case 0:
          (void)pool->Pin(key, rng.Chance(0.5) ? PinKind::kHard : PinKind::kSoft, absl::Seconds(5));
          break;
        case 1:
          pool->Unpin(key);
          break;
        case 2:
          pool->Erase(std::vector{key});
          break;
        case 3:
          (void)pool->PinSession(1 + rng.Below(3), PinKind::kSoft, absl::Seconds(1));
          break;
        case 4:
          Keys(*pool, {.tenant = "t1"});
          break;
        case 5:
          if (rng.Chance(0.1)) pool->Clear({});
          break;
        case 6:
          clock_.Advance(absl::Seconds(1));
          break;
        case 7:
          reader.Read();
          pool->stats();
          pool->tenants();
          break;
      }
    }
  });
  for (auto& t : users) t.join();
  stop = true;
  admin.join();
  EXPECT_EQ(wrong, 0);
  clock_.Advance(absl::Hours(1));
  EXPECT_EQ(pool->stats().leased, 0u);
  EXPECT_EQ(pool->stats().pins, 0u);
  EXPECT_TRUE(pool->Reserve(48).ok());
}

}  // namespace
}  // namespace tidepool
