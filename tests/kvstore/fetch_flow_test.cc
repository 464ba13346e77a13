// What is under way at once, and whose turn it is: two cores joined by a link of a given speed that carries
// one byte after the other, on a clock that only the link moves.

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "kvstore/fetch_client.h"
#include "kvstore/fetch_fair.h"
#include "kvstore/fetch_server.h"
#include "kvstore/fetch_window.h"
#include "tests/kvstore/fake_block_tier.h"
#include "tests/kvstore/fetch_test_util.h"

namespace tidepool {
namespace {

constexpr BlockLayout kLayout = {.layers = 4, .kv_heads = 1, .head_dim = 16, .block_tokens = 32};  // 8 KiB
constexpr uint64_t kBlock = 8192;
constexpr double kLinkBytesPerSecond = 125e6;
constexpr absl::Duration kDelay = absl::Microseconds(50);

// One holder, one fetcher.
class Link {
  std::deque<MetricRegistry> metrics_;

 public:
  std::unique_ptr<BlockPool> holder_, fetcher_;  // outlive all leases
  std::shared_ptr<OfferTable> offers_;
  explicit Link(const FetchFlow& flow, uint32_t slots = 5000, size_t lanes = 1)
      : holder_(MakePool(slots)),
        fetcher_(MakePool(slots)),
        offers_(std::make_shared<OfferTable>(kLayout.layers, absl::Seconds(30))),
        server_({.worker_id = "b",
                 .boot_id = "bb",
                 .fingerprint = "m",
                 .pool = holder_.get(),
                 .offers = offers_,
                 .flow = flow}),
        client_(
            {.worker_id = "a",
             .boot_id = "ba",
             .fingerprint = "m",
             .layout = kLayout,
             .lanes = lanes,
             .window = {.min = flow.window_bytes, .max = flow.window_bytes, .start = flow.window_bytes}}) {}

  std::vector<BlockKey> Publish(uint64_t first, size_t n) {
    std::vector<BlockKey> keys;
    auto slots = std::move(*holder_->Reserve(n));
    for (BlockLease& slot : slots) {
      Fill(slot.data(), first + keys.size());
      keys.push_back(TestKey(first + keys.size()));
      holder_->Publish(std::move(slot), {.key = keys.back()});
    }
    return keys;
  }
  uint64_t Fetch(const std::string& request, const std::vector<BlockKey>& keys) {
    FetchSpec spec;
    spec.request_id = request;
    spec.peer = {"b", "bb", "link"};
    spec.keys = keys;
    spec.slots = std::move(*fetcher_->Reserve(keys.size()));
    spec.deadline = now_ + absl::Seconds(20);
    const uint64_t handle = next_handle_++;
    started_[handle] = now_;
    Do(client_.Step(ClientStart{handle, std::move(spec)}, now_));
    return handle;
  }
  // Until the fetch has ended, or for so long.
  void Run(uint64_t until, absl::Duration at_most = absl::Seconds(20)) {
    const absl::Time limit = now_ + at_most;
    while (!results.contains(until) && now_ < limit) {
      absl::Time next = std::min({limit, client_.next_timer(), server_.next_timer()});
      if (!control_.empty()) next = std::min(next, control_.begin()->first);
      if (!bulk_.empty()) next = std::min(next, bulk_.front().arrives);
      now_ = std::max(now_, next);
      if (!control_.empty() && control_.begin()->first <= now_) {
        auto deliver = std::move(control_.begin()->second);
        control_.erase(control_.begin());
        deliver();
      } else if (!bulk_.empty() && bulk_.front().arrives <= now_) {
        Bulk bulk = std::move(bulk_.front());
        bulk_.pop_front();
        Arrive(bulk);
      } else {
        if (now_ >= client_.next_timer()) Do(client_.Step(ClientTick{}, now_));
        if (now_ >= server_.next_timer()) Do(server_.Step(ServerTick{}, now_));
      }
    }
  }
  absl::Duration Took(uint64_t handle) const { return ended_.at(handle) - started_.at(handle); }
  void OffersMoved() { Do(server_.Step(ServerOffersMoved{}, now_)); }

  std::map<uint64_t, FetchResult> results;
  uint64_t most_outstanding = 0;  // bytes sent and not told to have arrived, over all lanes
  size_t transfers = 0;
  size_t frames = 0;

 private:
  struct Bulk {
    LaneId lane;
    uint64_t send;
    std::string header;
    std::span<const std::byte> payload;
    absl::Time arrives;
  };

  std::unique_ptr<BlockPool> MakePool(uint32_t slots) {
    BlockPool::Options options;
    options.layout = kLayout;
    options.slots = slots;
    options.metrics = &metrics_.emplace_back();
    return std::move(*BlockPool::Create(options));
  }
  void Do(ClientActions actions) {
    for (ClientAction& action : actions) {
      if (auto* send = std::get_if<ClientSend>(&action)) {
        ++frames;
        control_.emplace(now_ + kDelay, [this, lane = send->lane, bytes = send->frame] {
          auto frame = DecodeFetchFrame(bytes);
          ASSERT_TRUE(frame.ok());
          Do(server_.Step(ServerMessage{lane, std::move(*frame)}, now_));
        });
      } else if (auto* finish = std::get_if<ClientFinish>(&action)) {
        ended_[finish->handle] = now_;
        results[finish->handle] = std::move(finish->result);
      } else if (auto* count = std::get_if<ClientCount>(&action)) {
        ADD_FAILURE() << kFetchReasonNames[static_cast<size_t>(count->reason)];
      }
    }
  }
  void Do(ServerActions actions) {
    uint64_t outstanding = 0;
    for (LaneId lane = 1; lane < 8; ++lane) outstanding += server_.outstanding(lane);
    most_outstanding = std::max(most_outstanding, outstanding);
    for (ServerAction& action : actions) {
      if (auto* send = std::get_if<ServerSend>(&action)) {
        control_.emplace(now_ + kDelay, [this, lane = send->lane, bytes = send->frame] {
          auto frame = DecodeFetchFrame(bytes);
          ASSERT_TRUE(frame.ok());
          Do(client_.Step(ClientMessage{lane, std::move(*frame)}, now_));
        });
      } else if (auto* bulk = std::get_if<ServerSendBulk>(&action)) {
        ++transfers;
        const auto size = static_cast<double>(bulk->payload.size());
        link_free_ = std::max(link_free_, now_) + absl::Seconds(size / kLinkBytesPerSecond);
        bulk_.push_back({bulk->lane, bulk->send, bulk->header, bulk->payload, link_free_ + kDelay});
      }
    }
  }
  void Arrive(const Bulk& bulk) {
    auto frame = DecodeFetchFrame(bulk.header);
    ASSERT_TRUE(frame.ok());
    ClientActions actions;
    const BulkVerdict verdict = client_.StepBulk(bulk.lane, *frame, bulk.payload.size(), now_, actions);
    Do(std::move(actions));
    ASSERT_EQ(verdict.dst.size(), bulk.payload.size());
    std::memcpy(verdict.dst.data(), bulk.payload.data(), bulk.payload.size());
    Do(server_.Step(ServerSendDone{bulk.send, absl::OkStatus()}, now_));
    Do(client_.Step(ClientBulkDone{verdict.receive, absl::OkStatus()}, now_));
  }

  absl::Time now_ = absl::UnixEpoch();
  absl::Time link_free_ = now_;
  std::multimap<absl::Time, std::function<void()>> control_;
  std::deque<Bulk> bulk_;
  FetchServer server_;
  FetchClient client_;
  uint64_t next_handle_ = 1;
  std::map<uint64_t, absl::Time> started_, ended_;
};

absl::Duration OnTheWire(uint64_t blocks) {
  return absl::Seconds(static_cast<double>(blocks * kBlock) / kLinkBytesPerSecond);
}

FetchFlow SmallWindow() {
  FetchFlow flow;
  flow.window_bytes = 512 << 10;
  return flow;
}

TEST(FetchFlowTest, ALargeFetchDoesNotStarveASmallOne) {
  Link link(SmallWindow());
  const auto large = link.Publish(0, 4096);
  const auto small = link.Publish(10000, 4);
  const uint64_t first = link.Fetch("large", large);
  link.Run(first, OnTheWire(1000));
  ASSERT_FALSE(link.results.contains(first));
  const uint64_t second = link.Fetch("small", small);
  link.Run(second);
  ASSERT_TRUE(link.results[second].status.ok());
  // What the window lets be queued in front of it, one turn of the other, and some delays.
  EXPECT_LE(link.Took(second),
            absl::Seconds((512e3 * 1.05 + 2 * 256e3) / kLinkBytesPerSecond) + OnTheWire(4) + 8 * kDelay);
  EXPECT_LT(link.Took(second), OnTheWire(4096) / 10);
  link.Run(first);
  ASSERT_TRUE(link.results[first].status.ok());
  EXPECT_LT(link.Took(first), OnTheWire(4100) * 1.1 + 20 * kDelay) << "the link was left idle";
}

TEST(FetchFlowTest, RequestsOfOneConnectionProgressAlike) {
  Link link(SmallWindow());
  const uint64_t a = link.Fetch("a", link.Publish(0, 1000));
  const uint64_t b = link.Fetch("b", link.Publish(2000, 1000));
  link.Run(b);
  link.Run(a);
  ASSERT_TRUE(link.results[a].status.ok() && link.results[b].status.ok());
  EXPECT_LT(link.Took(b) - link.Took(a), OnTheWire(200));
  EXPECT_GT(link.Took(a), OnTheWire(1700)) << "one was served before the other";
}

// A second connection of a peer is no second helping for the same request, and no starvation for another.
TEST(FetchFlowTest, ConnectionsTakeTurns) {
  Link link(SmallWindow(), 6000, /*lanes=*/2);
  const uint64_t large = link.Fetch("large", link.Publish(0, 4000));
  link.Run(large, OnTheWire(500));
  const uint64_t small = link.Fetch("small", link.Publish(10000, 4));  // opens the second lane
  link.Run(small);
  ASSERT_TRUE(link.results[small].status.ok());
  EXPECT_LT(link.Took(small), OnTheWire(4000) / 10);
}

TEST(FetchFlowTest, TheSenderNeverExceedsTheWindow) {
  for (uint64_t window : {uint64_t{2048}, uint64_t{8192}, uint64_t{20000}, uint64_t{1} << 20}) {
    FetchFlow flow;
    flow.window_bytes = window;
    Link link(flow);
    const uint64_t a = link.Fetch("a", link.Publish(0, 300));
    const uint64_t b = link.Fetch("b", link.Publish(1000, 50));
    link.Run(a);
    link.Run(b);
    ASSERT_TRUE(link.results[a].status.ok() && link.results[b].status.ok()) << window;
    EXPECT_LE(link.most_outstanding, window);
    EXPECT_GT(link.most_outstanding, window / 2);
    for (uint64_t i = 0; i < 300; ++i) ASSERT_TRUE(Holds(link.results[a].slots[i].data(), i));
  }
}

TEST(FetchFlowTest, SmallBlocksShareTransfersAndLargeOnesDoNot) {
  FetchFlow flow;
  flow.batch_below = 16 << 10;
  flow.batch_bytes = 256 << 10;
  {
    Link link(flow);
    const uint64_t f = link.Fetch("r", link.Publish(0, 310));
    link.Run(f);
    ASSERT_TRUE(link.results[f].status.ok());
    EXPECT_EQ(link.transfers, 10u);  // 31 blocks of 8 KiB and their directory in 256 KiB
    for (uint64_t i = 0; i < 310; ++i) ASSERT_TRUE(Holds(link.results[f].slots[i].data(), i));
  }
  flow.batch_below = kBlock;
  Link link(flow);
  const uint64_t f = link.Fetch("r", link.Publish(0, 310));
  link.Run(f);
  EXPECT_EQ(link.transfers, 310u);
}

TEST(FetchFlowTest, AGrowingBlockIsSentAsItGrowsAndFilledOnlyWhenItIsWhole) {
  Link link(FetchFlow{});
  std::vector<BlockLease> slots = std::move(*link.holder_->Reserve(2));
  std::vector<std::byte> whole(kBlock);
  for (size_t i = 0; i < slots.size(); ++i) {
    std::memset(slots[i].data().data(), 0, kBlock);
    link.offers_->Offer("r", TestKey(70 + i), slots[i].Clone(), 0, absl::UnixEpoch());
  }
  const uint64_t f = link.Fetch("r", {TestKey(70), TestKey(71)});
  size_t transfers = 0;
  for (uint32_t layers = 1; layers <= kLayout.layers; ++layers) {
    link.Run(f, absl::Milliseconds(300));
    ASSERT_FALSE(link.results.contains(f)) << "readable with " << layers - 1 << " layers";
    EXPECT_EQ(link.transfers, transfers);
    for (size_t i = 0; i < slots.size(); ++i) {
      Fill(whole, 70 + i);
      const size_t at = (layers - 1) * kLayout.layer_bytes();
      std::memcpy(slots[i].data().data() + at, whole.data() + at, kLayout.layer_bytes());
    }
    link.offers_->Advance("r", {}, layers, absl::UnixEpoch());
    link.OffersMoved();
    EXPECT_EQ(link.transfers, ++transfers);  // both blocks' layer in one
  }
  link.Run(f);
  ASSERT_TRUE(link.results[f].status.ok()) << link.results[f].status;
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(link.results[f].filled[i]);
    EXPECT_TRUE(Holds(link.results[f].slots[i].data(), 70 + i));
  }
}

TEST(FetchFlowTest, ARevokedBlockIsAbsentAndTheOthersOfItsFetchArrive) {
  Link link(FetchFlow{});
  std::vector<BlockKey> keys = link.Publish(5, 1);
  std::vector<BlockLease> slots = std::move(*link.holder_->Reserve(1));
  link.offers_->Offer("r", TestKey(70), slots[0].Clone(), 2, absl::UnixEpoch());
  keys.push_back(TestKey(70));
  const uint64_t f = link.Fetch("r", keys);
  link.Run(f, absl::Milliseconds(50));
  ASSERT_FALSE(link.results.contains(f));
  link.offers_->Revoke("r");
  link.OffersMoved();
  link.Run(f);
  ASSERT_TRUE(link.results[f].status.ok()) << link.results[f].status;
  EXPECT_TRUE(link.results[f].filled[0]);
  EXPECT_FALSE(link.results[f].filled[1]);
  slots.clear();
  EXPECT_EQ(link.holder_->stats().leased, 0u);
}

// What the client sent, decoded: of one kind, with the lane it went over.
template <typename Frame>
std::vector<std::pair<LaneId, Frame>> Sent(const ClientActions& actions) {
  std::vector<std::pair<LaneId, Frame>> out;
  for (const ClientAction& action : actions) {
    const auto* send = std::get_if<ClientSend>(&action);
    if (send == nullptr) continue;
    const auto frame = DecodeFetchFrame(send->frame);
    if (const auto* body = frame.ok() ? std::get_if<Frame>(&frame->body) : nullptr) {
      out.emplace_back(send->lane, *body);
    }
  }
  return out;
}

FetchWireFrame FromHolder(auto body) {
  FetchWireFrame frame{.sender_boot = "bb", .receiver_boot = "ba"};
  frame.body = std::move(body);
  return frame;
}

TEST(FetchFlowTest, ALostConnectionRestartsOnlyItsOwnFetches) {
  MetricRegistry metrics;
  BlockPool::Options options{.layout = kLayout, .slots = 8, .metrics = &metrics};
  const auto pool = std::move(*BlockPool::Create(options));
  FetchClient client(
      {.worker_id = "a", .boot_id = "ba", .fingerprint = "m", .layout = kLayout, .lanes = 2, .window = {}});
  absl::Time now = absl::UnixEpoch();
  std::vector<FetchId> asked;
  for (uint64_t handle : {1, 2}) {
    FetchSpec spec;
    spec.request_id = "r" + std::to_string(handle);
    spec.peer = {"b", "bb", "link"};
    spec.keys = {TestKey(handle)};
    spec.slots = std::move(*pool->Reserve(1));
    spec.deadline = now + absl::Seconds(20);
    ASSERT_EQ(Sent<HelloFrame>(client.Step(ClientStart{handle, std::move(spec)}, now)).size(), 1u);
    const auto fetches =
        Sent<FetchFrame>(client.Step(ClientMessage{handle, FromHolder(HelloAckFrame{"b"})}, now));
    ASSERT_EQ(fetches.size(), 1u);
    EXPECT_EQ(fetches[0].first, handle) << "the second fetch takes a lane of its own";
    asked.push_back(fetches[0].second.id);
  }
  const auto actions = client.Step(ClientLaneDown{1, absl::UnavailableError("cut")}, now);
  for (const ClientAction& action : actions) {
    if (const auto* close = std::get_if<ClientClose>(&action)) {
      EXPECT_EQ(close->lane, 1u);
    }
    EXPECT_FALSE(std::holds_alternative<ClientFinish>(action));
  }
  client.Step(ClientLaneQuiesced{1}, now);
  now += absl::Milliseconds(60);
  const auto again = Sent<FetchFrame>(client.Step(ClientTick{}, now));
  ASSERT_EQ(again.size(), 1u) << "the first begins again, the second goes on";
  EXPECT_EQ(again[0].first, 2u);
  EXPECT_EQ(again[0].second.id.request, "r1");
  EXPECT_GT(again[0].second.id.try_number, asked[0].try_number);

  // The second's own try is still the one that counts.
  CommitFrame commit{asked[1], 0, 0, 0, {{false, 0}}};
  commit.digest = ManifestDigest({{TestKey(2), {}}}, commit.items);
  bool finished = false;
  for (ClientAction& action : client.Step(ClientMessage{2, FromHolder(commit)}, now)) {
    if (auto* finish = std::get_if<ClientFinish>(&action)) {
      finished = true;
      EXPECT_EQ(finish->handle, 2u);
      EXPECT_TRUE(finish->result.status.ok()) << finish->result.status;
    }
  }
  EXPECT_TRUE(finished);
  client.Step(ClientShutdown{}, now);
}

TEST(FetchFlowTest, APeerOfTheFirstVersionIsRefusedByName) {
  MetricRegistry metrics;
  BlockPool::Options options{.layout = kLayout, .slots = 8, .metrics = &metrics};
  const auto pool = std::move(*BlockPool::Create(options));
  FetchServer server({.worker_id = "b",
                      .boot_id = "bb",
                      .fingerprint = "m",
                      .pool = pool.get(),
                      .offers = std::make_shared<OfferTable>(kLayout.layers, absl::Seconds(1))});
  FetchWireFrame hello{.version = 1, .sender_boot = "ba", .receiver_boot = "bb"};
  hello.body = HelloFrame{"a", "m", kLayout.ToString()};
  std::string text;
  for (const ServerAction& action : server.Step(ServerMessage{1, hello}, absl::UnixEpoch())) {
    const auto* send = std::get_if<ServerSend>(&action);
    if (send == nullptr) continue;
    const auto frame = DecodeFetchFrame(send->frame);
    ASSERT_TRUE(frame.ok());
    if (const auto* refuse = std::get_if<RefuseFrame>(&frame->body)) text = refuse->text;
  }
  EXPECT_EQ(text, "protocol version is '1', here it is '3'");
}

FetchWireFrame ToHolder(auto body, const std::string& boot = "ba") {
  FetchWireFrame frame{.sender_boot = boot, .receiver_boot = "bb"};
  frame.body = std::move(body);
  return frame;
}

// A holder, and peers that take what it sends at once, or never.
class Peers {
  MetricRegistry metrics_;

 public:
  explicit Peers(const FetchFlow& flow, BlockTier* disk = nullptr)
      : pool(*BlockPool::Create({.layout = kLayout, .slots = 256, .metrics = &metrics_})),
        offers(std::make_shared<OfferTable>(kLayout.layers, absl::Seconds(30))),
        server({.worker_id = "b",
                .boot_id = "bb",
                .fingerprint = "m",
                .pool = pool.get(),
                .offers = offers,
                .disk = disk,
                .flow = flow}) {}

  void Say(LaneId lane, auto body, const std::string& boot = "ba") {
    Step(ServerMessage{lane, ToHolder(std::move(body), boot)});
  }
  void Hello(LaneId lane, const std::string& boot = "ba") {
    Say(lane, HelloFrame{"a", "m", kLayout.ToString()}, boot);
  }
  void Fetch(LaneId lane, const std::string& request, const std::vector<BlockKey>& keys, uint64_t window) {
    FetchFrame fetch;
    fetch.id = {request, 0, 0, 1};
    fetch.time_left_ms = 20000;
    fetch.window = window;
    for (const BlockKey& key : keys) fetch.items.push_back({key, {}});
    Say(lane, std::move(fetch));
  }
  void Step(ServerEvent event) {
    events_.push_back(std::move(event));
    if (events_.size() > 1) return;
    for (; !events_.empty(); events_.pop_front()) {
      for (ServerAction& action : server.Step(std::move(events_.front()), now)) Do(action);
    }
  }

  const std::unique_ptr<BlockPool> pool;
  const std::shared_ptr<OfferTable> offers;
  FetchServer server;
  absl::Time now = absl::UnixEpoch();
  std::set<LaneId> stopped;
  std::map<LaneId, size_t> sent;  // transfers
  std::vector<uint64_t> held;     // those of the stopped ones, which have not ended
  std::map<LaneId, CommitFrame> commits;
  std::map<LaneId, RefuseReason> refused;
  std::set<LaneId> closed;

 private:
  void Do(ServerAction& action) {
    if (auto* bulk = std::get_if<ServerSendBulk>(&action)) {
      ++sent[bulk->lane];
      if (stopped.contains(bulk->lane)) {
        held.push_back(bulk->send);
      } else {
        events_.push_back(ServerSendDone{bulk->send, absl::OkStatus()});
      }
    } else if (auto* load = std::get_if<ServerLoad>(&action)) {
      events_.push_back(
          ServerLoaded{load->load, std::move(load->slot), BlockTier::Record{{.key = load->key}, kBlock}});
    } else if (auto* close = std::get_if<ServerClose>(&action)) {
      closed.insert(close->lane);
    } else if (auto* send = std::get_if<ServerSend>(&action)) {
      auto frame = DecodeFetchFrame(send->frame);
      ASSERT_TRUE(frame.ok());
      if (auto* commit = std::get_if<CommitFrame>(&frame->body)) commits[send->lane] = std::move(*commit);
      if (auto* refuse = std::get_if<RefuseFrame>(&frame->body)) refused[send->lane] = refuse->reason;
    }
  }

  std::deque<ServerEvent> events_;
};

std::vector<BlockKey> KeysFrom(uint64_t first, size_t n) {
  std::vector<BlockKey> keys;
  for (size_t i = 0; i < n; ++i) keys.push_back(TestKey(first + i));
  return keys;
}

void Store(FakeBlockTier& disk, std::span<const BlockKey> keys) {
  const std::vector<std::byte> bytes(kBlock);
  for (const BlockKey& key : keys)
    disk.Write({.key = key}, bytes, [](absl::Status s) { EXPECT_TRUE(s.ok()); });
}

TEST(FetchFlowTest, PeersThatTakeNothingDoNotStopTheOthers) {
  FetchFlow flow;
  flow.batch_below = 0;
  flow.max_sends = 4;
  Peers peers(flow);
  const std::vector<BlockKey> keys = KeysFrom(0, 40);
  auto slots = std::move(*peers.pool->Reserve(keys.size()));
  for (size_t i = 0; i < keys.size(); ++i) peers.pool->Publish(std::move(slots[i]), {.key = keys[i]});
  peers.stopped = {1, 2, 3, 4, 5, 6};
  for (LaneId lane = 1; lane <= 7; ++lane) {
    peers.Hello(lane);
    peers.Fetch(lane, "r" + std::to_string(lane), keys, 64 << 20);
  }
  EXPECT_EQ(peers.sent[1], 2u) << "half of the transfers, and no more";
  EXPECT_EQ(peers.sent[7], 40u);
  EXPECT_EQ(peers.commits[7].blocks, 40u);
}

TEST(FetchFlowTest, PeersThatTakeNothingDoNotStopLoadsForTheOthers) {
  FetchFlow flow;
  flow.batch_below = 0;
  flow.max_loads = 2;
  flow.max_load_bytes = 4 * kBlock;
  FakeBlockTier disk(kBlock, 1000);
  const std::vector<BlockKey> keys = KeysFrom(0, 100);
  Store(disk, keys);
  Peers peers(flow, &disk);
  peers.stopped = {1, 2, 3, 4, 5};
  for (LaneId lane = 1; lane <= 6; ++lane) {
    peers.Hello(lane);
    const auto at = keys.begin() + 15 * (static_cast<std::ptrdiff_t>(lane) - 1);
    // The window holds one block, and no credit comes.
    peers.Fetch(lane, "r" + std::to_string(lane), {at, at + 15}, lane == 6 ? 64 << 20 : kBlock);
  }
  EXPECT_EQ(peers.sent[1], 1u);
  EXPECT_EQ(peers.sent[6], 15u);
  EXPECT_EQ(peers.commits[6].blocks, 15u);
  EXPECT_LE(peers.pool->stats().leased, 4u + 5u);
}

TEST(FetchFlowTest, InAFullPoolAStoppedPeersBlocksAreNotWaitedForLong) {
  FetchFlow flow;
  flow.batch_below = 0;
  FakeBlockTier disk(kBlock, 1000);
  const std::vector<BlockKey> keys = KeysFrom(0, 10);
  Store(disk, keys);
  Peers peers(flow, &disk);
  auto used = std::move(*peers.pool->Reserve(peers.pool->stats().slots - 1));
  peers.stopped = {1};
  peers.Hello(1);
  peers.Fetch(1, "r1", {keys[0]}, 64 << 20);
  EXPECT_EQ(peers.sent[1], 1u) << "it has the last slot, and does not read";
  peers.Hello(2);
  peers.Fetch(2, "r2", {keys.begin() + 1, keys.end()}, 64 << 20);
  EXPECT_FALSE(peers.commits.contains(2)) << "a slot may come back soon";
  const absl::Time asked = peers.now;
  while (!peers.commits.contains(2) && peers.server.next_timer() < asked + absl::Seconds(10)) {
    peers.now = peers.server.next_timer();
    peers.Step(ServerTick{});
  }
  ASSERT_TRUE(peers.commits.contains(2));
  EXPECT_EQ(peers.commits[2].blocks, 0u) << "absent: to be computed";
  EXPECT_LE(peers.now - asked, absl::Milliseconds(100));
  // Room again, and it is used.
  used.clear();
  peers.Fetch(2, "r3", {keys.begin() + 1, keys.end()}, 64 << 20);
  EXPECT_EQ(peers.commits[2].blocks, 9u);
}

TEST(FetchFlowTest, InAFullPoolASlowPeersBlocksAreWaitedForAsLongAsTheyTake) {
  FetchFlow flow;
  flow.batch_below = 0;
  FakeBlockTier disk(kBlock, 1000);
  const std::vector<BlockKey> keys = KeysFrom(0, 3);
  Store(disk, keys);
  Peers peers(flow, &disk);
  auto used = std::move(*peers.pool->Reserve(peers.pool->stats().slots - 1));
  peers.stopped = {1};
  const auto arrive_after = [&](absl::Duration taken) {
    const absl::Time end = peers.now + taken;
    while (peers.server.next_timer() < end) {
      peers.now = std::max(peers.now, peers.server.next_timer());
      peers.Step(ServerTick{});
    }
    peers.now = end;
    for (uint64_t send : std::exchange(peers.held, {})) peers.Step(ServerSendDone{send, absl::OkStatus()});
  };
  peers.Hello(1);
  peers.Fetch(1, "r1", {keys[0]}, 64 << 20);
  arrive_after(absl::Seconds(1));
  peers.Say(1, CommitAckFrame{{"r1", 0, 0, 1}});
  peers.commits.clear();
  peers.Fetch(1, "r2", {keys[1], keys[2]}, 64 << 20);
  EXPECT_EQ(peers.sent[1], 2u) << "the other one waits for its slot";
  arrive_after(absl::Seconds(1));
  EXPECT_EQ(peers.sent[1], 3u);
  arrive_after(absl::Seconds(1));
  ASSERT_TRUE(peers.commits.contains(1));
  EXPECT_EQ(peers.commits[1].blocks, 2u);

  // One that reads no more is waited for at most half of what the fetch may take.
  peers.Fetch(1, "r3", {keys[0]}, 64 << 20);
  arrive_after(absl::Seconds(10));
  peers.Say(1, CommitAckFrame{{"r3", 0, 0, 1}});
  peers.Fetch(1, "r4", {keys[1]}, 64 << 20);
  peers.Hello(2);
  const absl::Time asked = peers.now;
  peers.Fetch(2, "r5", {keys[2]}, 64 << 20);
  while (!peers.commits.contains(2) && peers.server.next_timer() < asked + absl::Seconds(60)) {
    peers.now = std::max(peers.now, peers.server.next_timer());
    peers.Step(ServerTick{});
  }
  ASSERT_TRUE(peers.commits.contains(2));
  EXPECT_EQ(peers.commits[2].blocks, 0u);
  EXPECT_EQ(peers.now - asked, absl::Seconds(10));
}

TEST(FetchFlowTest, AWaitForASlotThatWasGivenUpDoesNotShortenTheNextOne) {
  FetchFlow flow;
  flow.batch_below = 0;
  flow.max_load_bytes = 2 * kBlock;
  FakeBlockTier disk(kBlock, 1000);
  const std::vector<BlockKey> keys = KeysFrom(0, 4);
  Store(disk, keys);
  Peers peers(flow, &disk);
  auto used = std::move(*peers.pool->Reserve(peers.pool->stats().slots - 1));
  peers.stopped = {1};
  for (LaneId lane = 1; lane <= 3; ++lane) peers.Hello(lane);
  // The second one waits for the first's end, for as long as the first is held.
  peers.Fetch(1, "r1", {keys[0], keys[1]}, 64 << 20);
  EXPECT_EQ(peers.sent[1], 1u);
  peers.Fetch(2, "r2", {keys[2]}, 64 << 20);
  EXPECT_FALSE(peers.commits.contains(2)) << "it waits for a slot";
  peers.Say(2, AbortFrame{{"r2", 0, 0, 1}});
  peers.now += absl::Seconds(1);
  peers.Fetch(3, "r3", {keys[3]}, 64 << 20);
  EXPECT_FALSE(peers.commits.contains(3)) << "a slot may come back soon";
}

TEST(FetchFlowTest, AConnectionThatChangesItsBootIdIsClosed) {
  Peers peers(FetchFlow{});
  auto slot = std::move(*peers.pool->Reserve(1));
  peers.offers->Offer("r", TestKey(1), std::move(slot[0]), 1, peers.now);
  peers.Hello(1);
  peers.Fetch(1, "r", {TestKey(1)}, 1 << 20);
  EXPECT_EQ(peers.server.active(), 1u);
  peers.Hello(1, "another");
  EXPECT_EQ(peers.refused[1], RefuseReason::kStaleBoot);
  EXPECT_TRUE(peers.closed.contains(1));
  EXPECT_EQ(peers.server.active(), 0u);
  peers.Step(ServerLaneQuiesced{1});
  // The first one comes back and asks for what it had: it is known to have ended.
  peers.Hello(2);
  peers.Say(2, CreditFrame{{"r", 0, 0, 1}, 0, 1 << 20, true});
  EXPECT_EQ(peers.refused[2], RefuseReason::kFailed);
  peers.Fetch(2, "s", {TestKey(2)}, 1 << 20);
  EXPECT_EQ(peers.commits[2].blocks, 0u);
}

TEST(FetchFlowTest, LayersOfAnOfferThatWasBegunAgainInTheSameSlotAreNotMixed) {
  Peers peers(FetchFlow{});
  auto slot = std::move(*peers.pool->Reserve(1));
  peers.offers->Offer("r", TestKey(1), slot[0].Clone(), 2, peers.now);
  peers.Hello(1);
  peers.Fetch(1, "r", {TestKey(1)}, 1 << 20);
  EXPECT_EQ(peers.sent[1], 1u);
  peers.offers->Revoke("r");
  peers.offers->Offer("r", TestKey(1), slot[0].Clone(), kLayout.layers, peers.now);
  peers.Step(ServerOffersMoved{});
  ASSERT_TRUE(peers.commits.contains(1));
  EXPECT_EQ(peers.commits[1].blocks, 0u);
  EXPECT_EQ(peers.sent[1], 1u);
}

TEST(DeficitRingTest, FlowsAreServedAlikeWhateverTheirSizes) {
  Rng rng(1);
  for (int round = 0; round < 50; ++round) {
    const uint64_t quantum = 1 + rng.Below(5000);
    DeficitRing<int> ring(quantum);
    std::map<int, uint64_t> size, served;
    uint64_t largest = 0;
    for (int flow = 0; flow < 5; ++flow) {
      ring.Add(flow);
      size[flow] = 1 + rng.Below(3000);
      served[flow] = 0;
      largest = std::max(largest, size[flow]);
    }
    for (int n = 0; n < 3000; ++n) {
      const auto flow = ring.Next([&](int f) { return std::optional(size[f]); });
      ASSERT_TRUE(flow.has_value());
      ring.Charge(*flow, size[*flow]);
      served[*flow] += size[*flow];
    }
    for (auto& [flow, bytes] : served) {
      EXPECT_LE(bytes, served[0] + 2 * (quantum + largest));
      EXPECT_GE(bytes + 2 * (quantum + largest), served[0]);
    }
  }
}

TEST(DeficitRingTest, AFlowWithNothingToSendSavesNothingAndHoldsUpNobody) {
  DeficitRing<int> ring(10);
  ring.Add(1);
  ring.Add(2);
  for (int n = 0; n < 100; ++n) {
    const auto flow = ring.Next([](int f) { return f == 1 ? std::optional<uint64_t>(10) : std::nullopt; });
    ASSERT_EQ(flow, std::optional(1));
    ring.Charge(1, 10);
  }
  int second = 0;
  for (int n = 0; n < 10; ++n) {
    const auto flow = ring.Next([](int) { return std::optional<uint64_t>(10); });
    second += *flow == 2;
    ring.Charge(*flow, 10);
  }
  EXPECT_EQ(second, 5);
  EXPECT_EQ(ring.Next([](int) { return std::optional<uint64_t>(); }), std::nullopt);
}

TEST(FetchWindowTest, TheWindowFollowsTheLinkWithinItsLimits) {
  const FetchWindow::Options options{
      .min = 1 << 20, .max = 64 << 20, .start = 4 << 20, .target = absl::Milliseconds(10)};
  // Bytes a second, and the window that holds ten milliseconds of it.
  for (auto [speed, want] : {std::pair{125e6, 1.25e6}, {1e9, 10e6}, {10e6, 1e6 * 1.048576}, {50e9, 67.1e6}}) {
    FetchWindow window(options);
    absl::Time now = absl::UnixEpoch();
    window.Restart(now);
    for (int n = 0; n < 3000; ++n) {
      // A sender that is let have a window on its way, over a round trip of 100 us.
      const double rate = std::min(speed, static_cast<double>(window.bytes()) / 100e-6);
      now += absl::Seconds(65536 / rate);
      window.OnArrived(65536, now);
    }
    EXPECT_NEAR(static_cast<double>(window.bytes()), want, want * 0.05) << speed;
  }
}

}  // namespace
}  // namespace tidepool
