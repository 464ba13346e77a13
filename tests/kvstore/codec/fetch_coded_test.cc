// Fetching blocks that travel encoded: kvstore/fetch_* with a codec.
#include <gtest/gtest.h>

#include "kvstore/codec/block_codec.h"
#include "kvstore/fetch_client.h"
#include "tests/kvstore/codec/synthetic_kv.h"
#include "tests/kvstore/fetch_node_contract.h"
#include "transport/inproc_transport.h"
#include "transport/rate_limit.h"

namespace tidepool {

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FetchNodeContract);

namespace {

using Bytes = std::vector<std::byte>;

// fp8, but a block takes a quarter of a second to decode: 32 of them longer than a node's shutdown may.
class SlowCodec final : public BlockCodec {
 public:
  std::string_view name() const override { return inner_.name(); }
  CodecId id() const override { return inner_.id(); }
  bool Decodes(CodecId id) const override { return inner_.Decodes(id); }
  size_t MaxEncodedBytes(const BlockLayout& layout) const override { return inner_.MaxEncodedBytes(layout); }
  absl::StatusOr<size_t> Encode(const BlockLayout& layout, std::span<const std::byte> block,
                                std::span<std::byte> out) const override {
    return inner_.Encode(layout, block, out);
  }
  absl::Status Decode(const BlockLayout& layout, std::span<const std::byte> payload,
                      std::span<std::byte> block) const override {
    begun = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(250));
    return inner_.Decode(layout, payload, block);
  }

  mutable std::atomic<bool> begun{false};

 private:
  const BlockCodec& inner_ = *FindBlockCodec("fp8");
};

class FetchCodedTest : public testing::Test {
 protected:
  std::unique_ptr<TestNode> Node(const char* name, const char* codec) {
    return std::make_unique<TestNode>([this] { return network_.NewTransport(); },
                                      NodeSpec{.worker = name,
                                               .boot = std::string("boot-") + name,
                                               .codec = *codec == 0 ? nullptr : FindBlockCodec(codec)});
  }
  static std::vector<BlockKey> Publish(TestNode& node, uint64_t first, size_t n) {
    std::vector<BlockKey> keys;
    for (BlockLease& slot : node.Slots(n)) {
      const Bytes block = SyntheticBlock(node.spec.layout, first + keys.size());
      std::memcpy(slot.data().data(), block.data(), block.size());
      keys.push_back(TestKey(first + keys.size()));
      node.pool->Publish(std::move(slot), {.key = keys.back()});
    }
    return keys;
  }
  static FetchSpec Spec(TestNode& to, const TestNode& from, const std::vector<BlockKey>& keys,
                        const char* request = "req", absl::Duration within = absl::Seconds(15)) {
    FetchSpec spec;
    spec.request_id = request;
    spec.peer = from.peer();
    spec.keys = keys;
    spec.slots = to.Slots(keys.size());
    spec.deadline = Clock::Real().Now() + within;
    return spec;
  }
  static FetchResult Fetch(TestNode& to, FetchSpec spec) {
    Waiter w;
    to.node->Fetch(std::move(spec), w.Callback());
    return std::move(w.Get());
  }
  static Bytes Trip(const BlockCodec& codec, const BlockLayout& layout, const Bytes& block) {
    Bytes payload(codec.MaxEncodedBytes(layout)), out(block.size());
    payload.resize(*codec.Encode(layout, block, payload));
    EXPECT_TRUE(codec.Decode(layout, payload, out).ok());
    return out;
  }
  static bool Equal(const BlockLease& slot, const Bytes& want) {
    return std::memcmp(slot.data().data(), want.data(), want.size()) == 0;
  }

  InprocNetwork network_{&Clock::Real(),
                         {.seed = 7,
                          .delay_min = absl::Microseconds(5),
                          .delay_max = absl::Microseconds(100),
                          .bulk_pieces = 3}};
};

TEST_F(FetchCodedTest, SealedBlocksArriveAsTheCodecMakesThemInFewerBytes) {
  for (const char* name : {"int8", "fp8", "int4", "cachegen-2"}) {
    SCOPED_TRACE(name);
    auto a = Node("a", name), b = Node("b", name);
    const auto keys = Publish(*b, 1, 40);
    FetchResult r = Fetch(*a, Spec(*a, *b, keys));
    ASSERT_TRUE(r.status.ok()) << r.status;
    for (size_t i = 0; i < keys.size(); ++i) {
      ASSERT_TRUE(r.filled[i]);
      EXPECT_TRUE(Equal(r.slots[i],
                        Trip(*FindBlockCodec(name), a->spec.layout, SyntheticBlock(a->spec.layout, 1 + i))));
    }
    EXPECT_EQ(r.bytes, 40 * a->spec.layout.block_bytes());  // of KV
    EXPECT_LT(b->Metric("tidepool_kv_transfer_bytes_total{direction=\"out\"}"),
              40 * a->spec.layout.block_bytes() * 52 / 100);  // on the wire
    EXPECT_EQ(b->Metric("tidepool_kv_codec_bytes_total{form=\"raw\",place=\"wire\"}"),
              40 * a->spec.layout.block_bytes());
    EXPECT_TRUE(Eventually([&] { return b->node->active_fetches() == 0; }));
    EXPECT_TRUE(Eventually([&] { return b->pool->stats().leased == 0; }));
  }
}

TEST_F(FetchCodedTest, AFetchIsEndedByAShutdownWhileItsBlocksAreBeingDecoded) {
  const SlowCodec slow;
  TestNode a([this] { return network_.NewTransport(); }, {.worker = "a", .boot = "boot-a", .codec = &slow});
  auto b = Node("b", "fp8");
  const auto keys = Publish(*b, 1, 32);
  Waiter w;
  a.node->Fetch(Spec(a, *b, keys), w.Callback());
  ASSERT_TRUE(Eventually([&] { return slow.begun.load(); }));
  const absl::Time began = Clock::Real().Now();
  a.node.reset();
  EXPECT_LT(Clock::Real().Now() - began, absl::Seconds(4));
  ASSERT_EQ(w.times(), 1);
  EXPECT_TRUE(absl::IsCancelled(w.Get().status)) << w.Get().status;
  for (const BlockLease& slot : w.Get().slots) EXPECT_FALSE(slot.empty());
  w.Get().slots.clear();
  EXPECT_EQ(a.pool->stats().free, a.spec.slots);
}

TEST_F(FetchCodedTest, TheUnsealedTailArrivesExactly) {
  auto a = Node("a", "int4"), b = Node("b", "int4");
  auto keys = Publish(*b, 1, 3);
  std::vector<BlockLease> tail = b->Slots(1);
  Fill(tail[0].data(), 77);
  b->node->Offer("req", TestKey(77), tail[0].Clone());
  keys.push_back(TestKey(77));
  FetchResult r = Fetch(*a, Spec(*a, *b, keys));
  ASSERT_TRUE(r.status.ok()) << r.status;
  EXPECT_TRUE(Holds(r.slots[3].data(), 77));
  EXPECT_FALSE(Equal(r.slots[0], SyntheticBlock(a->spec.layout, 1)));
}

TEST_F(FetchCodedTest, ASealedBlockOnOfferIsEncodedToo) {
  auto a = Node("a", "int4"), b = Node("b", "int4");
  const auto keys = Publish(*b, 1, 1);
  b->node->Offer("req", keys[0], std::move(*b->pool->Lease(keys[0])));
  FetchResult r = Fetch(*a, Spec(*a, *b, keys));
  ASSERT_TRUE(r.status.ok()) << r.status;
  EXPECT_TRUE(
      Equal(r.slots[0], Trip(*FindBlockCodec("int4"), a->spec.layout, SyntheticBlock(a->spec.layout, 1))));
}

TEST_F(FetchCodedTest, ABlockThatNoCodecTakesTravelsAsItIs) {
  auto a = Node("a", "cachegen-3"), b = Node("b", "cachegen-3");
  Bytes block = SyntheticBlock(b->spec.layout, 1);
  KvSetElement(DType::kBF16, block.data(), 9, std::nanf(""));
  std::vector<BlockLease> slot = b->Slots(1);
  std::memcpy(slot[0].data().data(), block.data(), block.size());
  b->pool->Publish(std::move(slot[0]), {.key = TestKey(5)});
  FetchResult r = Fetch(*a, Spec(*a, *b, {TestKey(5)}));
  ASSERT_TRUE(r.status.ok()) << r.status;
  EXPECT_TRUE(Equal(r.slots[0], block));
}

TEST_F(FetchCodedTest, NodesOfDifferentCodecsRefuseEachOtherByName) {
  auto a = Node("a", "int8"), b = Node("b", ""), c = Node("c", "cachegen");
  const auto keys = Publish(*b, 1, 1);
  const FetchResult r = Fetch(*a, Spec(*a, *b, keys));
  EXPECT_EQ(r.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(r.status.ToString().find("kv.codec int8"), std::string::npos) << r.status;
  EXPECT_EQ(Fetch(*c, Spec(*c, *a, keys)).status.code(), absl::StatusCode::kFailedPrecondition);
  // "none" is what nothing was before.
  auto d = Node("d", "none");
  EXPECT_TRUE(Fetch(*d, Spec(*d, *b, keys)).status.ok());
}

// 20 blocks of 64 KiB over 8 MB/s take a sixth of a second: exact where there is time, and in fewer bytes
// where there is not, once the link is known.
TEST_F(FetchCodedTest, TheAdaptiveCodecSendsWhatTheLinkBringsInTime) {
  auto a = Node("a", "cachegen");
  TestNode b([this] { return LimitRate(network_.NewTransport(), 8'000'000); },
             {.worker = "b", .boot = "boot-b", .codec = FindBlockCodec("cachegen")});
  const auto keys = Publish(b, 1, 20);
  const char* const kRaw = "tidepool_kv_codec_bytes_total{form=\"raw\",place=\"wire\"}";
  for (int i = 0; i < 3; ++i) {
    FetchResult r = Fetch(*a, Spec(*a, b, keys, ("slow" + std::to_string(i)).c_str(), absl::Seconds(15)));
    ASSERT_TRUE(r.status.ok()) << r.status;
    EXPECT_TRUE(Equal(r.slots[0], SyntheticBlock(a->spec.layout, 1)));
  }
  EXPECT_EQ(b.Metric(kRaw), 0u);
  Fetch(*a, Spec(*a, b, keys, "hurry", absl::Milliseconds(100))).status.IgnoreError();
  EXPECT_GT(b.Metric(kRaw), 0u);
}

TEST_F(FetchCodedTest, FetchesThatEndInTheMiddleLeaveNothingBehind) {
  auto a = Node("a", "cachegen-1"), b = Node("b", "cachegen-1");
  const auto keys = Publish(*b, 1, 48);
  Rng rng(3);
  for (int i = 0; i < 60; ++i) {
    Waiter w;
    const std::string request = "r" + std::to_string(i);
    FetchSpec spec = Spec(*a, *b, keys, request.c_str(),
                          rng.Chance(0.3) ? absl::Milliseconds(1 + rng.Below(20)) : absl::Seconds(10));
    spec.request_id = request;
    a->node->Fetch(std::move(spec), w.Callback());
    if (rng.Chance(0.6)) {
      for (uint64_t n = rng.Below(2000); n > 0; --n) std::this_thread::yield();
      a->node->Abort(request, 0);
    }
    FetchResult r = std::move(w.Get());
    EXPECT_EQ(w.times(), 1);
    if (!r.status.ok()) continue;
    for (size_t k = 0; k < keys.size(); ++k) {
      ASSERT_TRUE(Equal(r.slots[k], Trip(*FindBlockCodec("cachegen-1"), a->spec.layout,
                                         SyntheticBlock(a->spec.layout, 1 + k))));
    }
  }
  EXPECT_TRUE(Eventually([&] { return a->node->active_fetches() + b->node->active_fetches() == 0; }));
  EXPECT_TRUE(Eventually([&] { return a->pool->stats().leased + b->pool->stats().leased == 0; }));
  EXPECT_EQ(a->pool->stats().quarantined + b->pool->stats().quarantined, 0u);
  EXPECT_TRUE(Fetch(*a, Spec(*a, *b, keys, "last")).status.ok());
}

TEST_F(FetchCodedTest, ANodeGoesAwayInTheMiddleOfCoding) {
  for (int i = 0; i < 10; ++i) {
    auto a = Node("a", "cachegen-1"), b = Node("b", "cachegen-1");
    const auto keys = Publish(*b, 1, 48);
    Waiter w;
    a->node->Fetch(Spec(*a, *b, keys), w.Callback());
    for (int n = 0; n < 300 * i; ++n) std::this_thread::yield();
    if (i % 2 == 0) {
      a->node.reset();
      b->node.reset();
    } else {
      b->node.reset();
      a->node.reset();
    }
    w.Get();
    EXPECT_EQ(w.times(), 1);
  }
}

// What is being decoded when its connection goes is waited for, not closed for.
TEST_F(FetchCodedTest, ADecodingThatOutlivesItsConnectionIsWaitedFor) {
  const BlockLayout layout = {.layers = 4, .kv_heads = 2, .head_dim = 64, .block_tokens = 32};
  MetricRegistry metrics;
  const auto pool = *BlockPool::Create({.layout = layout, .slots = 2, .metrics = &metrics});
  const BlockCodec& codec = *FindBlockCodec("int8");
  FetchClient client({.worker_id = "a",
                      .boot_id = "ba",
                      .fingerprint = "m",
                      .layout = layout,
                      .codec = &codec,
                      .window = {}});
  absl::Time now = absl::UnixEpoch();
  FetchSpec spec;
  spec.request_id = "r";
  spec.peer = {"b", "bb", "link", ""};
  spec.keys = {TestKey(1)};
  spec.slots = *pool->Reserve(1);
  spec.deadline = now + absl::Seconds(20);
  const SlotRef slot = spec.slots[0].ref();
  client.Step(ClientStart{1, std::move(spec)}, now);
  const auto from = [](auto body) {
    FetchWireFrame frame{.sender_boot = "bb", .receiver_boot = "ba"};
    frame.body = std::move(body);
    return frame;
  };
  FetchId id;
  for (const ClientAction& action : client.Step(ClientMessage{1, from(HelloAckFrame{"b"})}, now)) {
    if (const auto* send = std::get_if<ClientSend>(&action))
      id = std::get<FetchFrame>(DecodeFetchFrame(send->frame)->body).id;
  }
  Bytes payload(codec.MaxEncodedBytes(layout));
  payload.resize(*codec.Encode(layout, SyntheticBlock(layout, 1), payload));
  const DataRange range{
      0, slot, 0, layout.layers, static_cast<uint8_t>(codec.id()), payload.size(), PayloadChecksum(payload)};
  ClientActions actions;
  const BulkVerdict verdict = client.StepBulk(1, from(DataFrame{id, range}), payload.size(), now, actions);
  ASSERT_EQ(verdict.dst.size(), payload.size());
  std::memcpy(verdict.dst.data(), payload.data(), payload.size());
  actions = client.Step(ClientBulkDone{verdict.receive, absl::OkStatus()}, now);
  ASSERT_EQ(actions.size(), 1u);
  ASSERT_TRUE(std::holds_alternative<ClientDecode>(actions[0]));

  client.Step(ClientCancel{"r", 0}, now);
  now += absl::Seconds(1);
  EXPECT_TRUE(client.Step(ClientTick{}, now).empty()) << "no connection is closed for what it cannot end";
  EXPECT_EQ(client.Step(ClientLaneDown{1, absl::UnavailableError("cut")}, now).size(), 1u);
  client.Step(ClientLaneQuiesced{1}, now);
  now += absl::Seconds(1);
  EXPECT_TRUE(client.Step(ClientTick{}, now).empty());
  EXPECT_EQ(client.active(), 1u);
  actions = client.Step(ClientDecoded{verdict.receive, absl::OkStatus()}, now);
  ASSERT_EQ(actions.size(), 1u);
  const FetchResult& result = std::get<ClientFinish>(actions[0]).result;
  EXPECT_TRUE(absl::IsCancelled(result.status));
  EXPECT_EQ(result.slots[0].ref(), slot);
}

}  // namespace
}  // namespace tidepool
