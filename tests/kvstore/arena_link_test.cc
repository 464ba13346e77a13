// Sharing an arena, both sides in this process. arena_process_test.cc has them in two.
#include "kvstore/arena_link.h"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>

#include "kvstore/fetch_node.h"
#include "tests/kvstore/arena_test_util.h"
#include "transport/inproc_transport.h"

namespace tidepool {
namespace {

class ArenaLinkTest : public testing::Test {
 protected:
  // Mapped: what is on offer from now on is taken without a message.
  void Map() {
    owner_.Publish(900'000, 1);
    auto taken = TakeNow(*client_, owner_.peer(), "map", 900'000, 1);
    ASSERT_TRUE(taken.status.ok()) << taken.status;
    taken.blocks = BlockRun();
    ASSERT_TRUE(EventuallyTrue([&] { return owner_.Idle(); }));
    ASSERT_EQ(client_->peers(), 1u);
  }

  ArenaOwner owner_;
  MetricRegistry metrics_;
  std::unique_ptr<ArenaClient> client_ = MakeArenaClient(&metrics_);
};

TEST_F(ArenaLinkTest, OfferedBlocksAreTakenWhereTheyLie) {
  Map();
  owner_.Offer("r", 1, 100);
  auto taken = client_->TryTake(owner_.peer(), "r", TestKeys(1, 100));
  ASSERT_TRUE(taken.has_value());
  ExpectHolds(taken->blocks, 1, 100);
  EXPECT_FALSE(client_->TryTake(owner_.peer(), "r", TestKeys(1, 101)).has_value()) << "one is not on offer";
  EXPECT_FALSE(client_->TryTake(owner_.peer(), "s", TestKeys(1, 1)).has_value());
}

TEST_F(ArenaLinkTest, WhatIsTakenOutlivesItsOfferAndGoesWithItsLastLease) {
  Map();
  owner_.Offer("r", 1, 10);
  auto first = client_->TryTake(owner_.peer(), "r", TestKeys(1, 4));
  auto second = client_->TryTake(owner_.peer(), "r", TestKeys(5, 6));
  ASSERT_TRUE(first && second);
  EXPECT_TRUE(client_->Done(owner_.peer(), "r"));
  ASSERT_TRUE(EventuallyTrue([&] { return owner_.leases(LeaseKind::kPeer) == 10; })) << "counted as a peer's";
  EXPECT_EQ(owner_.offers->size(), 0u);
  EXPECT_EQ(owner_.server->held_blocks(), 10u);
  first.reset();
  BlockRun last = std::move(second->blocks);
  second.reset();
  last.Shorten(1);
  EXPECT_EQ(owner_.server->held_blocks(), 10u);
  ExpectHolds(last, 5, 1);
  last = BlockRun();
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.Idle(); }));
}

TEST_F(ArenaLinkTest, WhatWasLetGoBeforeTheOfferEndedIsNotHeld) {
  Map();
  owner_.Offer("r", 1, 10);
  client_->TryTake(owner_.peer(), "r", TestKeys(1, 10));
  owner_.offers->Release("r");
  EXPECT_TRUE(owner_.Idle());
}

TEST_F(ArenaLinkTest, AnOfferThatRanOutIsHeldForWhoTookIt) {
  Map();
  owner_.Offer("r", 1, 3);
  auto taken = client_->TryTake(owner_.peer(), "r", TestKeys(1, 3));
  ASSERT_TRUE(taken.has_value());
  EXPECT_EQ(owner_.offers->Expire(Clock::Real().Now() + absl::Hours(1)), 3u);
  EXPECT_EQ(owner_.pool->stats().leased, 3u);
  EXPECT_FALSE(client_->TryTake(owner_.peer(), "r", TestKeys(1, 3)).has_value()) << "the offer is over";
  // Its slots stay out of use: everything else may be written.
  auto others = owner_.pool->Reserve(owner_.pool->stats().slots - 3);
  ASSERT_TRUE(others.ok()) << others.status();
  for (BlockLease& slot : *others) std::memset(slot.data().data(), 0xee, slot.data().size());
  ExpectHolds(taken->blocks, 1, 3);
}

TEST_F(ArenaLinkTest, PublishedBlocksAreGrantedOnRequest) {
  owner_.Publish(1, 20);
  auto taken = TakeNow(*client_, owner_.peer(), "r", 1, 20);
  ASSERT_TRUE(taken.status.ok()) << taken.status;
  ExpectHolds(taken.blocks, 1, 20);
  EXPECT_EQ(owner_.leases(LeaseKind::kPeer), 20u);
  // Not to be evicted meanwhile.
  EXPECT_FALSE(owner_.pool->Reserve(owner_.pool->stats().slots - 19).ok());
  taken.blocks = BlockRun();
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.Idle(); }));
}

TEST_F(ArenaLinkTest, WhereThePeerHasNotAllNothingIsHeldOfIt) {
  owner_.Publish(1, 20);
  auto taken = TakeNow(*client_, owner_.peer(), "r", 1, 25);
  ASSERT_TRUE(taken.status.ok()) << taken.status;
  EXPECT_TRUE(taken.blocks.empty());
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.Idle(); }));
}

TEST_F(ArenaLinkTest, AGrowingOfferIsWaitedForUntilItIsComplete) {
  Map();
  owner_.Offer("r", 1, 2, /*layers=*/1);
  EXPECT_FALSE(client_->TryTake(owner_.peer(), "r", TestKeys(1, 2)).has_value());
  std::mutex mu;
  std::condition_variable cv;
  std::optional<ArenaClient::Taken> got;
  client_->Take(owner_.peer(), "r", 1, TestKeys(1, 2), Clock::Real().Now() + absl::Seconds(10),
                [&](ArenaClient::Taken t) {
                  std::lock_guard lock(mu);
                  got = std::move(t);
                  cv.notify_all();
                });
  // A second question goes the same way and comes back: the first was heard.
  owner_.Publish(50, 1);
  TakeNow(*client_, owner_.peer(), "s", 50, 1);
  {
    std::lock_guard lock(mu);
    EXPECT_FALSE(got.has_value());
  }
  owner_.offers->Advance("r", {}, kArenaLayout.layers, Clock::Real().Now());
  std::unique_lock lock(mu);
  ASSERT_TRUE(cv.wait_for(lock, std::chrono::seconds(10), [&] { return got.has_value(); }));
  ASSERT_TRUE(got->status.ok()) << got->status;
  ExpectHolds(got->blocks, 1, 2);
}

TEST_F(ArenaLinkTest, ARevokedOfferIsAnsweredAsAbsent) {
  owner_.Offer("r", 1, 1, /*layers=*/1);
  std::thread revoke([&] {
    EXPECT_TRUE(EventuallyTrue([&] { return owner_.server->connections() == 1; }));
    owner_.offers->Revoke("r");
  });
  auto taken = TakeNow(*client_, owner_.peer(), "r", 1, 1);
  revoke.join();
  ASSERT_TRUE(taken.status.ok()) << taken.status;
  EXPECT_TRUE(taken.blocks.empty());
}

TEST_F(ArenaLinkTest, AnAbortDuringTheHandoverReachesTheTransport) {
  MetricRegistry metrics;
  const auto pool = *BlockPool::Create({.layout = kArenaLayout, .slots = 4, .metrics = &metrics});
  std::atomic<int> handed_over = 0, aborted = 0;
  std::unique_ptr<ArenaLink> link;
  link = std::make_unique<ArenaLink>(ArenaLink::Options{
      .worker_id = "reader",
      .boot_id = "reader",
      .fingerprint = "model",
      .pool = pool.get(),
      .offers = std::make_shared<OfferTable>(kArenaLayout.layers, absl::Seconds(30)),
      .metrics = &metrics,
      .otherwise =
          [&](FetchSpec spec, ArenaLink::Done) {
            if (spec.request_id == "r") link->Abort("r", 3);
            ++handed_over;
          },
      .abort_otherwise = [&](const std::string& request,
                             uint32_t attempt) { aborted += request == "r" && attempt == 3; }});
  for (const char* request : {"other", "r"}) {
    FetchSpec spec;
    spec.request_id = request;
    spec.attempt = 3;
    spec.peer = {"owner", "boot", "", owner_.server->address()};
    spec.keys = TestKeys(7, 1);  // not there
    spec.slots = *pool->Reserve(1);
    spec.deadline = Clock::Real().Now() + absl::Seconds(10);
    ArenaLink::Done done = [](FetchResult) {};
    ASSERT_TRUE(link->Fetch(spec, done));
  }
  EXPECT_TRUE(EventuallyTrue([&] { return aborted == 1; }));
  EXPECT_TRUE(EventuallyTrue([&] { return handed_over == 2; }));
  link.reset();
  EXPECT_EQ(aborted, 1);
}

TEST_F(ArenaLinkTest, ATakeEndsAtItsDeadlineAndWhenItIsCancelled) {
  owner_.Offer("r", 1, 1, /*layers=*/1);
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(TakeNow(*client_, owner_.peer(), "r", 1, 1, absl::Milliseconds(30)).status) ||
      TakeNow(*client_, owner_.peer(), "r", 1, 1, absl::Milliseconds(30)).blocks.empty());
  std::thread cancel([&] {
    EXPECT_TRUE(EventuallyTrue([&] { return client_->active() == 1; }));
    client_->Cancel("r", 1);
  });
  EXPECT_TRUE(absl::IsCancelled(TakeNow(*client_, owner_.peer(), "r", 1, 1).status));
  cancel.join();
  EXPECT_EQ(client_->active(), 0u);
}

TEST_F(ArenaLinkTest, AnOwnerShortOfRoomSaysSo) {
  Map();
  auto most = owner_.pool->Reserve(owner_.pool->stats().slots * 4 / 5);
  ASSERT_TRUE(most.ok());
  owner_.Offer("r", 1, 1);
  EXPECT_TRUE(client_->TryTake(owner_.peer(), "r", TestKeys(1, 1))->short_of_room);
  owner_.Publish(20, 1);
  EXPECT_TRUE(TakeNow(*client_, owner_.peer(), "s", 20, 1).short_of_room);
}

TEST_F(ArenaLinkTest, WhoeverMeansAnotherProcessOrModelIsRefused) {
  owner_.Publish(1, 1);
  EXPECT_TRUE(
      absl::IsUnavailable(TakeNow(*client_, {owner_.peer().arena, "an earlier boot"}, "r", 1, 1).status));
  EXPECT_FALSE(client_->Reaches(owner_.peer())) << "left alone for a while";

  RawReader wrong_token(owner_.peer().arena);
  ArenaHello hello = wrong_token.Hello();
  hello.token = std::string(32, '0');
  wrong_token.Send(hello);
  EXPECT_EQ(wrong_token.Refused(), ArenaRefusal::kToken);
  EXPECT_FALSE(wrong_token.Receive().has_value()) << "and closed";

  for (auto change : std::vector<std::function<void(ArenaHello&)>>{
           [](ArenaHello& h) { h.fingerprint = "other"; }, [](ArenaHello& h) { h.layout = "other"; },
           [](ArenaHello& h) { h.version = 99; }}) {
    RawReader r(owner_.peer().arena);
    hello = r.Hello();
    change(hello);
    r.Send(hello);
    EXPECT_EQ(r.Refused(), ArenaRefusal::kMismatch);
  }
  EXPECT_TRUE(RawReader(owner_.peer().arena).Welcome());
}

TEST_F(ArenaLinkTest, AddressesOfOtherMachinesAndBrokenOnesAreNotTried) {
  ArenaAddress a;
  ASSERT_TRUE(ArenaAddress::Parse(owner_.peer().arena, a));
  EXPECT_EQ(a.ToString(), owner_.peer().arena);
  a.machine = "0123456789abcdef";
  EXPECT_FALSE(client_->Reaches({a.ToString(), "boot"}));
  for (const char* text :
       {"", "1", "1.a.b", "2.a.b.cccccccccccccccccccccccccccccccc", "1.a.b.short", "1...."})
    EXPECT_FALSE(client_->Reaches({text, "boot"})) << text;
}

TEST_F(ArenaLinkTest, GarbageCostsItsConnectionAndNobodyElse) {
  Map();
  Rng rng(1);
  for (int i = 0; i < 200; ++i) {
    RawReader r(owner_.peer().arena);
    if (i % 2 == 0) {
      ASSERT_TRUE(r.Welcome());
    }
    std::string bytes(rng.Below(i % 10 == 0 ? 150'000 : 200), '\0');
    for (char& c : bytes) c = static_cast<char>(rng.Next());
    if (!bytes.empty()) bytes[0] = static_cast<char>(rng.Below(24));  // types that exist, mostly
    for (int k = 0; k < 3 && r.Send(bytes); ++k) {
    }
  }
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.server->connections() == 1; }));
  owner_.Offer("r", 1, 3);
  EXPECT_TRUE(client_->TryTake(owner_.peer(), "r", TestKeys(1, 3)).has_value());
  EXPECT_EQ(TakeNow(*client_, owner_.peer(), "r", 1, 3).blocks.size(), 3u);
}

TEST_F(ArenaLinkTest, AReaderThatIsThrownOutKeepsWhatItReads) {
  owner_.Publish(1, 5);
  auto bad = std::make_unique<RawReader>(owner_.peer().arena);
  ASSERT_TRUE(bad->Welcome());
  bad->Send(ArenaTake{.id = 1, .time_left_ms = 1000, .request = "r", .keys = TestKeys(1, 5)});
  ASSERT_TRUE(bad->Receive().has_value());
  bad->Send(std::string("\x7f"));
  EXPECT_EQ(bad->Refused(), ArenaRefusal::kMalformed);
  bad->Send(ArenaTake{.id = 2, .time_left_ms = 1000, .request = "r", .keys = TestKeys(1, 5)});
  bad->ShutDown();
  {
    RawReader other(owner_.peer().arena);  // both of its turns come after what the first one did
    ASSERT_TRUE(other.Welcome());
  }
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.server->connections() == 1; }));
  EXPECT_EQ(owner_.server->held_blocks(), 5u) << "it may still read, and gets nothing more";
  bad.reset();
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.Idle(); }));
}

TEST_F(ArenaLinkTest, UnknownAndRepeatedReleasesDoNothing) {
  owner_.Publish(1, 5);
  RawReader r(owner_.peer().arena);
  ASSERT_TRUE(r.Welcome());
  const ArenaTake take{.id = 1, .time_left_ms = 1000, .request = "r", .keys = TestKeys(1, 5)};
  r.Send(take);
  ASSERT_TRUE(r.Receive().has_value());
  r.Send(take);  // the same id again: nothing is granted twice under one name
  const auto again = r.Receive();
  ASSERT_TRUE(again.has_value());
  for (const SlotRef& slot : std::get<ArenaGrant>(*again).slots) EXPECT_EQ(slot.slot, kAbsentSlot);
  r.Send(ArenaRelease{{7, 8, 9}});
  r.Send(ArenaRelease{{1, 1}});
  r.Send(ArenaRelease{{1}});
  r.Send(ArenaRelease{});
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.Idle(); }));
}

TEST_F(ArenaLinkTest, ReadersAreLimited) {
  ArenaOwner small(16, {.max_connections = 2});
  RawReader a(small.peer().arena), b(small.peer().arena);
  ASSERT_TRUE(a.Welcome() && b.Welcome());
  EXPECT_EQ(RawReader(small.peer().arena).Refused(), ArenaRefusal::kBusy);
}

TEST_F(ArenaLinkTest, ASilentConnectionIsClosed) {
  ArenaOwner quick(16, {.hello_timeout = absl::Milliseconds(20)});
  RawReader r(quick.peer().arena);
  EXPECT_EQ(r.Refused(), ArenaRefusal::kMalformed);
  EXPECT_TRUE(EventuallyTrue([&] { return quick.server->connections() == 0; }));
}

TEST_F(ArenaLinkTest, TheOwnersEndLeavesReadersWithWhatTheyRead) {
  auto owner = std::make_unique<ArenaOwner>();
  owner->Publish(900, 1);
  ASSERT_TRUE(TakeNow(*client_, owner->peer(), "map", 900, 1).status.ok());
  owner->Offer("r", 1, 3);
  auto taken = client_->TryTake(owner->peer(), "r", TestKeys(1, 3));
  auto granted = TakeNow(*client_, owner->peer(), "s", 900, 1);
  ASSERT_TRUE(taken.has_value() && granted.status.ok());
  owner->server.reset();
  EXPECT_EQ(owner->pool->stats().quarantined, 4u) << "never to be written again";
  owner.reset();
  ExpectHolds(taken->blocks, 1, 3);
  ExpectHolds(granted.blocks, 900, 1);
  client_.reset();
  ExpectHolds(taken->blocks, 1, 3);
}

TEST_F(ArenaLinkTest, ManyThreadsTakeAndLetGoWhileOffersComeAndGo) {
  Map();
  std::atomic<uint64_t> read{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(t);
      for (int i = 0; i < 700; ++i) {
        const std::string request = "r" + std::to_string(rng.Below(4));
        const uint64_t first = rng.Below(4) * 100;
        auto taken = client_->TryTake(owner_.peer(), request, TestKeys(first, 3));
        if (!taken) continue;
        for (size_t k = 0; k < 3; ++k) read += Holds(taken->blocks.data(k), first + k) ? 1 : 1'000'000;
        if (rng.Below(3) == 0) client_->Done(owner_.peer(), request);
      }
    });
  }
  threads.emplace_back([&] {
    Rng rng(77);
    for (int i = 0; i < 1500; ++i) {
      const uint64_t r = rng.Below(4);
      if (owner_.pool->stats().free > 20) owner_.Offer("r" + std::to_string(r), r * 100, 3);
      if (i % 4 == 0) owner_.offers->Release("r" + std::to_string(rng.Below(4)));
    }
  });
  for (std::thread& t : threads) t.join();
  EXPECT_LT(read.load(), 1'000'000u) << "somebody read what had been given to another";
  owner_.offers->Clear();
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.Idle(); }));
}

// --- FetchNode ---

struct Node {
  Node(InprocNetwork& network, const std::string& name, bool share = true, uint32_t slots = 64) : name(name) {
    pool = *BlockPool::Create({.layout = kArenaLayout, .slots = slots, .metrics = &metrics});
    node = *FetchNode::Start({.worker_id = name,
                              .boot_id = name,
                              .fingerprint = "model",
                              .pool = pool.get(),
                              .transport = network.NewTransport(),
                              .metrics = &metrics,
                              .share_arena = share});
  }
  PeerAddress peer() const { return {name, name, node->address(), node->arena_address()}; }
  FetchSpec Spec(const Node& from, uint64_t first, size_t n, const std::string& request = "r") {
    FetchSpec spec;
    spec.request_id = request;
    spec.peer = from.peer();
    spec.keys = TestKeys(first, n);
    spec.slots = *pool->Reserve(n);
    spec.deadline = Clock::Real().Now() + absl::Seconds(10);
    return spec;
  }
  FetchResult Fetch(FetchSpec spec) {
    std::mutex mu;
    std::condition_variable cv;
    std::optional<FetchResult> out;
    node->Fetch(std::move(spec), [&](FetchResult r) {
      std::lock_guard lock(mu);
      out = std::move(r);
      cv.notify_all();
    });
    std::unique_lock lock(mu);
    cv.wait(lock, [&] { return out.has_value(); });
    return std::move(*out);
  }
  void Offer(const std::string& request, uint64_t first, size_t n) {
    auto slots = *pool->Reserve(n);
    for (size_t i = 0; i < n; ++i) {
      Fill(slots[i].data(), first + i);
      node->Offer(request, TestKey(first + i), std::move(slots[i]));
    }
  }

  const std::string name;
  MetricRegistry metrics;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<FetchNode> node;
};

class ArenaFetchTest : public testing::Test {
 protected:
  InprocNetwork network_;
};

TEST_F(ArenaFetchTest, InPlaceBlocksStayWhereTheyAreAndTheTailIsCopied) {
  Node a(network_, "a"), b(network_, "b");
  b.Offer("r", 1, 5);
  FetchSpec spec = a.Spec(b, 1, 5);
  spec.in_place = true;
  spec.tail_tokens = 3;
  FetchResult got = a.Fetch(std::move(spec));
  ASSERT_TRUE(got.status.ok()) << got.status;
  EXPECT_EQ(got.transport, "arena");
  EXPECT_EQ(got.bytes, 5 * kArenaLayout.block_bytes());
  EXPECT_EQ(got.filled, std::vector<bool>(5, true));
  ExpectHolds(got.in_place, 1, 4);
  EXPECT_EQ(CheckFetchSlots(got.slots, *a.pool), absl::OkStatus()) << "the spec's come back";
  std::vector<std::byte> whole(kArenaLayout.block_bytes());
  Fill(whole, 5);
  for (uint32_t layer = 0; layer < kArenaLayout.layers; ++layer) {
    for (bool v : {false, true}) {
      for (uint32_t head = 0; head < kArenaLayout.kv_heads; ++head) {
        const size_t at = kArenaLayout.Offset(layer, v, head, 0), bytes = 3 * kArenaLayout.head_dim * 2;
        EXPECT_EQ(std::memcmp(got.slots[4].data().data() + at, whole.data() + at, bytes), 0);
      }
    }
  }
  a.node->SendRelease(b.peer(), "r");
  got.in_place = BlockRun();
  EXPECT_TRUE(EventuallyTrue([&] { return b.pool->stats().leased == 0; }));
}

TEST_F(ArenaFetchTest, WithoutInPlaceBlocksAreCopiedAndLetGoAtOnce) {
  Node a(network_, "a"), b(network_, "b");
  b.Offer("r", 1, 5);
  for (int part = 0; part < 2; ++part) {  // the first connects, the second claims
    FetchSpec spec = a.Spec(b, 1, 5);
    spec.part = static_cast<uint32_t>(part);
    FetchResult got = a.Fetch(std::move(spec));
    ASSERT_TRUE(got.status.ok()) << got.status;
    EXPECT_EQ(got.transport, "arena");
    for (size_t i = 0; i < 5; ++i) {
      EXPECT_TRUE(got.in_place.empty());
      EXPECT_TRUE(Holds(got.slots[i].data(), 1 + i));
    }
    b.node->ReleaseOffers(part == 0 ? "none" : "r");
    if (part == 1) {
      EXPECT_TRUE(EventuallyTrue([&] { return b.pool->stats().leased == 0; }));
    }
  }
}

TEST_F(ArenaFetchTest, AnOwnerShortOfRoomGetsItsSlotsBack) {
  Node a(network_, "a"), b(network_, "b", true, 16);
  auto most = *b.pool->Reserve(12);
  b.Offer("r", 1, 3);
  FetchSpec spec = a.Spec(b, 1, 3);
  spec.in_place = true;
  FetchResult got = a.Fetch(std::move(spec));
  ASSERT_TRUE(got.status.ok()) << got.status;
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(got.in_place.empty());
    EXPECT_TRUE(Holds(got.slots[i].data(), 1 + i));
  }
  b.node->ReleaseOffers("r");
  EXPECT_TRUE(EventuallyTrue([&] { return b.pool->stats().leased == 12; }));
}

TEST_F(ArenaFetchTest, WhereEitherDoesNotShareTheTransportIsUsed) {
  for (const auto& [a_shares, b_shares] : std::vector<std::pair<bool, bool>>{{false, true}, {true, false}}) {
    Node a(network_, "a", a_shares), b(network_, "b", b_shares);
    EXPECT_EQ(b.node->arena_address().empty(), !b_shares);
    b.Offer("r", 1, 2);
    FetchSpec spec = a.Spec(b, 1, 2);
    spec.in_place = true;
    FetchResult got = a.Fetch(std::move(spec));
    ASSERT_TRUE(got.status.ok()) << got.status;
    EXPECT_EQ(got.transport, a.node->transport_name());
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_TRUE(got.in_place.empty());
      EXPECT_TRUE(Holds(got.slots[i].data(), 1 + i));
    }
  }
}

TEST_F(ArenaFetchTest, AnArenaThatCannotBeReachedLeavesTheTransport) {
  Node a(network_, "a"), b(network_, "b");
  b.Offer("r", 1, 2);
  FetchSpec spec = a.Spec(b, 1, 2);
  ArenaAddress nobody;
  ASSERT_TRUE(ArenaAddress::Parse(spec.peer.arena, nobody));
  nobody.socket += "x";
  spec.peer.arena = nobody.ToString();
  FetchResult got = a.Fetch(std::move(spec));
  ASSERT_TRUE(got.status.ok()) << got.status;
  EXPECT_EQ(got.transport, a.node->transport_name());
}

TEST_F(ArenaFetchTest, AnAbsentBlockIsAskedForByTheTransportAndReportedAbsent) {
  Node a(network_, "a"), b(network_, "b");
  b.Offer("r", 1, 2);
  FetchSpec spec = a.Spec(b, 1, 3);
  spec.in_place = true;
  FetchResult got = a.Fetch(std::move(spec));
  ASSERT_TRUE(got.status.ok()) << got.status;
  EXPECT_EQ(got.filled, (std::vector<bool>{true, true, false}));
}

// 10,000 requests that are given up at any moment leave nothing behind. (TIDEPOOL_LONG_TESTS=1; else 1,000.)
TEST_F(ArenaFetchTest, RequestsAbortedAtAnyMomentLeakNothing) {
  const int requests = std::getenv("TIDEPOOL_LONG_TESTS") != nullptr ? 10'000 : 1'000;
  Node a(network_, "a", true, 256), b(network_, "b", true, 256);
  struct Open {
    std::string request;
    uint64_t first;
    std::shared_ptr<FetchResult> result;
    std::shared_ptr<std::atomic<int>> ended;
  };
  std::vector<Open> open;
  Rng rng(5);
  uint64_t wrong = 0, in_place = 0;
  const auto close = [&](size_t i) {
    Open o = std::move(open[i]);
    open.erase(open.begin() + static_cast<std::ptrdiff_t>(i));
    if (o.ended->load() == 0 && rng.Below(2) == 0) a.node->Abort(o.request, 0);
    ASSERT_TRUE(EventuallyTrue([&] { return o.ended->load() > 0; }));
    ASSERT_EQ(o.ended->load(), 1);
    for (size_t k = 0; k < o.result->slots.size(); ++k) {
      if (!o.result->filled[k]) continue;
      const bool there = k < o.result->in_place.size();
      wrong += !Holds(there ? o.result->in_place.data(k) : o.result->slots[k].data(), o.first + k);
      in_place += there;
    }
    if (rng.Below(2) == 0) o.result->in_place = BlockRun();
    if (rng.Below(4) > 0) a.node->SendRelease(b.peer(), o.request);
    b.node->ReleaseOffers(o.request);
  };
  for (int i = 0; i < requests; ++i) {
    const std::string request = "r" + std::to_string(i);
    const uint64_t first = 10 * static_cast<uint64_t>(i);
    const size_t n = 1 + rng.Below(6), offered = rng.Below(n + 1);
    while (!open.empty() && (open.size() > 8 || b.pool->stats().free < 32 || a.pool->stats().free < 32))
      ASSERT_NO_FATAL_FAILURE(close(rng.Below(open.size())));
    const bool growing = rng.Below(3) == 0;
    auto slots = *b.pool->Reserve(offered);
    for (size_t k = 0; k < offered; ++k) {
      Fill(slots[k].data(), first + k);
      b.node->Offer(request, TestKey(first + k), std::move(slots[k]), growing ? 1 : kArenaLayout.layers);
    }
    FetchSpec spec = a.Spec(b, first, n, request);
    spec.in_place = rng.Below(4) > 0;
    Open o{request, first, std::make_shared<FetchResult>(), std::make_shared<std::atomic<int>>(0)};
    a.node->Fetch(std::move(spec), [result = o.result, ended = o.ended](FetchResult r) {
      *result = std::move(r);
      ended->fetch_add(1);
    });
    if (growing && rng.Below(3) > 0) {
      b.node->AdvanceOffer(request, kArenaLayout.layers);
    } else if (growing) {
      b.node->RevokeOffers(request);
    }
    open.push_back(std::move(o));
    if (rng.Below(4) == 0) {
      ASSERT_NO_FATAL_FAILURE(close(rng.Below(open.size())));
    }
  }
  while (!open.empty()) ASSERT_NO_FATAL_FAILURE(close(0));
  EXPECT_EQ(wrong, 0u);
  EXPECT_GT(in_place, 0u);
  EXPECT_TRUE(EventuallyTrue([&] { return b.pool->stats().leased == 0; })) << b.pool->stats().leased;
  EXPECT_EQ(a.pool->stats().leased, 0u);
  EXPECT_EQ(a.pool->stats().quarantined + b.pool->stats().quarantined, 0u);
}

}  // namespace
}  // namespace tidepool
