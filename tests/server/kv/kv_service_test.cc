#include "server/kv/kv_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvstore/keys.h"
#include "server/kv/tier_events.h"
#include "server/rpc/kv_convert.h"
#include "tests/kvstore/fake_block_tier.h"
#include "transport/inproc_transport.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

constexpr char kToken[] = "0123456789abcdef";
const BlockLayout kLayout{2, 1, 4, 4, DType::kBF16};
constexpr uint32_t kSlots = 64;

// Node: the pool of one process with all that its control API needs.
struct Node {
  Node(const std::string& id, InprocNetwork& network, ChannelCache& channels, uint32_t slots = kSlots,
       size_t max_events = 1 << 16) {
    BlockPool::Options options;
    options.layout = kLayout;
    options.slots = slots;
    options.max_events = max_events;
    options.metrics = &metrics;
    pool = BlockPool::Create(options).value();
    disk = std::make_unique<FakeBlockTier>(kLayout.block_bytes(), 1000);
    disk_events = std::make_unique<TierEvents>(*disk, pool->events());
    FetchNode::Options fetch_options;
    fetch_options.worker_id = id;
    fetch_options.boot_id = "boot-" + id;
    fetch_options.fingerprint = "model";
    fetch_options.pool = pool.get();
    fetch_options.transport = network.NewTransport();
    fetch_options.metrics = &metrics;
    fetch_options.share_arena = false;
    fetch_options.disk = disk.get();
    fetch = FetchNode::Start(std::move(fetch_options)).value();
    context.self.set_worker_id(id);
    context.self.set_boot_id("boot-" + id);
    context.self.set_transport(fetch->address());
    context.fingerprint = "model";
    context.layout = kLayout;
    context.cluster_token = kToken;
    context.pool = pool.get();
    context.disk = disk.get();
    context.fetch = fetch.get();
    context.channels = &channels;
    kv = std::make_unique<KvService>(context, metrics);
    rpc = StartRpcServer("127.0.0.1:0", kv.get()).value();
    address = context.self;
    address.set_grpc("127.0.0.1:" + std::to_string(rpc.port));
    stub = v1::Kv::NewStub(channels.Get(address.grpc()));
  }
  ~Node() {
    kv->Stop();
    rpc.server->Shutdown();
    rpc.server->Wait();
  }

  MetricRegistry metrics;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<FakeBlockTier> disk;
  std::unique_ptr<TierEvents> disk_events;
  std::unique_ptr<FetchNode> fetch;
  KvContext context;
  std::unique_ptr<KvService> kv;
  RpcServer rpc;
  v1::WorkerAddress address;
  std::unique_ptr<v1::Kv::Stub> stub;
};

class KvServiceTest : public testing::Test {
 protected:
  // Tokens of a chain of `blocks` blocks; `name` makes chains differ.
  static std::vector<int32_t> Tokens(int name, size_t blocks) {
    std::vector<int32_t> out;
    for (size_t i = 0; i < blocks * kLayout.block_tokens; ++i)
      out.push_back(static_cast<int32_t>(1000 * name + i));
    return out;
  }
  static std::vector<BlockKey> Keys(int name, size_t blocks) {
    return BlockKeys(RootKey("model", kLayout, "salt", "none"), Tokens(name, blocks), kLayout.block_tokens);
  }
  static std::byte Fill(int name, size_t block) { return static_cast<std::byte>(16 * name + block + 1); }
  static BlockInfo Info(int name, size_t block, const std::string& tenant = "t", uint64_t session = 0) {
    const auto tokens = Tokens(name, block + 1);
    const auto keys = Keys(name, block + 1);
    return {.key = keys[block],
            .parent = block == 0 ? RootKey("model", kLayout, "salt", "none") : keys[block - 1],
            .tokens = {tokens.end() - kLayout.block_tokens, tokens.end()},
            .tenant = tenant,
            .session = session,
            .position = static_cast<uint32_t>(block)};
  }
  static void Publish(Node& node, int name, size_t blocks, const std::string& tenant = "t",
                      uint64_t session = 0) {
    for (size_t i = 0; i < blocks; ++i) {
      auto lease = node.pool->Reserve(1, {.tenant = tenant, .session = session}).value();
      std::ranges::fill(lease[0].data(), Fill(name, i));
      node.pool->Publish(std::move(lease[0]), Info(name, i, tenant, session));
    }
  }
  static bool Holds(Node& node, int name, size_t block) {
    auto lease = node.pool->Lease(Keys(name, block + 1)[block]);
    return lease && std::ranges::all_of(lease->data(), [&](std::byte b) { return b == Fill(name, block); });
  }
  static v1::KvSelector Select(const std::vector<BlockKey>& keys) {
    v1::KvSelector out;
    for (const BlockKey& key : keys) out.mutable_keys()->add_keys(std::string(KeyBytes(key)));
    return out;
  }
  static v1::KvSelector SelectSession(uint64_t session) {
    v1::KvSelector out;
    out.set_session(session);
    return out;
  }

  static void Arm(grpc::ClientContext& context, std::string_view token = kToken) {
    AddClusterToken(context, token);
    SetTimeout(context, absl::Seconds(20));
  }
  template <typename Method, typename In, typename Out>
  static grpc::Status Call(Node& node, Method method, const In& in, Out* out) {
    grpc::ClientContext context;
    Arm(context);
    return (node.stub.get()->*method)(&context, in, out);
  }
  // The last message of a long operation.
  template <typename Method, typename In>
  static grpc::Status Watch(Node& node, Method method, const In& in, v1::KvProgress* last) {
    grpc::ClientContext context;
    Arm(context);
    const auto stream = (node.stub.get()->*method)(&context, in);
    v1::KvProgress progress;
    while (stream->Read(&progress)) *last = progress;
    return stream->Finish();
  }
  static v1::KvCopyRequest CopyFrom(const Node& from, const std::vector<BlockKey>& keys) {
    v1::KvCopyRequest out;
    for (const BlockKey& key : keys) out.add_keys(std::string(KeyBytes(key)));
    *out.mutable_from() = from.address;
    return out;
  }

  InprocNetwork network_;
  ChannelCache channels_;
  Node a_{"a", network_, channels_};
};

TEST_F(KvServiceTest, LookupCountsRunsByTierForKeysAndForTokens) {
  Publish(a_, 1, 2);
  a_.disk->Write(Info(1, 2), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  v1::KvLookupRequest request;
  *request.mutable_blocks() = Select(Keys(1, 5));
  v1::KvLookupReply reply;
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Lookup, request, &reply).ok());
  EXPECT_EQ(reply.chain_blocks(), 5u);
  EXPECT_EQ(reply.blocks(), 3u);
  EXPECT_EQ(reply.host_blocks(), 2u);
  EXPECT_EQ(reply.block_tokens(), kLayout.block_tokens);

  request.mutable_blocks()->mutable_tokens()->set_salt("salt");
  const auto tokens = Tokens(1, 5);
  request.mutable_blocks()->mutable_tokens()->mutable_tokens()->Add(tokens.begin(), tokens.end());
  reply.Clear();
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Lookup, request, &reply).ok());
  EXPECT_EQ(reply.blocks(), 3u);
  request.mutable_blocks()->set_fingerprint("another model");
  reply.Clear();
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Lookup, request, &reply).ok());
  EXPECT_EQ(reply.blocks(), 0u);
}

TEST_F(KvServiceTest, CallsWithoutTheClusterTokenAreRefused) {
  Publish(a_, 1, 1);
  grpc::ClientContext unary, stream_context, subscription;
  for (auto* context : {&unary, &stream_context, &subscription}) Arm(*context, "not the token......");
  v1::KvLookupRequest lookup;
  *lookup.mutable_blocks() = Select(Keys(1, 1));
  v1::KvLookupReply reply;
  EXPECT_EQ(a_.stub->Lookup(&unary, lookup, &reply).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  v1::KvClearRequest clear;
  clear.mutable_blocks()->set_all(true);
  v1::KvProgress progress;
  const auto stream = a_.stub->Clear(&stream_context, clear);
  EXPECT_FALSE(stream->Read(&progress));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAUTHENTICATED);
  v1::KvEventBatch batch;
  const auto events = a_.stub->Subscribe(&subscription, v1::KvSubscribeRequest());
  EXPECT_FALSE(events->Read(&batch));
  EXPECT_EQ(events->Finish().error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(a_.pool->stats().published, 1u);
}

TEST_F(KvServiceTest, BadSelectorsAreNamed) {
  v1::KvWhereReply reply;
  const auto why = [&](const v1::KvSelector& selector) {
    v1::KvWhereRequest request;
    *request.mutable_blocks() = selector;
    const grpc::Status status = Call(a_, &v1::Kv::Stub::Where, request, &reply);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    return status.error_message();
  };
  v1::KvSelector selector;
  EXPECT_THAT(why(selector), HasSubstr("blocks: is missing"));
  selector.mutable_keys();
  EXPECT_THAT(why(selector), HasSubstr("blocks.keys: is empty"));
  selector.mutable_keys()->add_keys("short");
  EXPECT_THAT(why(selector), HasSubstr("32 bytes, not 5"));
  selector.mutable_tokens()->add_tokens(1);
  EXPECT_THAT(why(selector), HasSubstr("fewer than one block of 4"));
  selector.set_session(0);
  EXPECT_THAT(why(selector), HasSubstr("0 is no session"));
  selector.set_tenant("");
  EXPECT_THAT(why(selector), HasSubstr("blocks.tenant: is empty"));
}

TEST_F(KvServiceTest, WhereTellsWhatIsKnown) {
  Publish(a_, 1, 2, "team", 77);
  a_.disk->Write(Info(1, 1, "team", 77), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  a_.disk->Write(Info(2, 0, "team", 77), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  v1::KvWhereRequest request;
  *request.mutable_blocks() = SelectSession(77);
  request.set_with_tokens(true);
  v1::KvWhereReply reply;
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Where, request, &reply).ok());
  ASSERT_EQ(reply.blocks_size(), 3);
  EXPECT_EQ(reply.selected(), 3u);
  const v1::KvBlock& second = reply.blocks(1);
  EXPECT_EQ(second.key(), KeyBytes(Keys(1, 2)[1]));
  EXPECT_EQ(second.parent(), KeyBytes(Keys(1, 1)[0]));
  EXPECT_EQ(std::vector<int>(second.tiers().begin(), second.tiers().end()),
            (std::vector<int>{v1::KV_TIER_HOST, v1::KV_TIER_DISK}));
  EXPECT_EQ(second.position(), 1u);
  EXPECT_EQ(second.tenant(), "team");
  EXPECT_EQ(second.tokens_size(), 4);
  // Asked by key, an absent block is one without tiers.
  *request.mutable_blocks() = Select({Keys(3, 1)[0]});
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Where, request, &reply).ok());
  ASSERT_EQ(reply.blocks_size(), 1);
  EXPECT_TRUE(reply.blocks(0).tiers().empty());
}

TEST_F(KvServiceTest, HardPinnedBlocksOutliveAFullPool) {
  Publish(a_, 1, 4);
  v1::KvPinRequest pin;
  *pin.mutable_blocks() = Select(Keys(1, 5));
  pin.set_kind(v1::KV_PIN_KIND_HARD);
  pin.set_ttl_seconds(60);
  v1::KvPinReply pinned;
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Pin, pin, &pinned).ok());
  EXPECT_EQ(pinned.pinned(), 4u);
  EXPECT_EQ(pinned.missing(), 1u);
  for (int chain = 2; chain < 12; ++chain) Publish(a_, chain, 10);
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(1, 4)), 4u);
  v1::KvStatsReply stats;
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Stats, v1::KvStatsRequest(), &stats).ok());
  EXPECT_EQ(stats.hard_pinned(), 4u);

  // Evict leaves them, and says so.
  v1::KvEvictRequest evict;
  *evict.mutable_blocks() = Select(Keys(1, 4));
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Evict, evict, &progress).ok());
  EXPECT_EQ(progress.done(), 0u);
  EXPECT_EQ(progress.skipped(), 4u);
  EXPECT_THAT(progress.note(), HasSubstr("pinned"));

  v1::KvUnpinRequest unpin;
  *unpin.mutable_blocks() = Select(Keys(1, 4));
  v1::KvUnpinReply unpinned;
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Unpin, unpin, &unpinned).ok());
  EXPECT_GE(unpinned.unpinned(), 1u);
  for (int chain = 20; chain < 30; ++chain) Publish(a_, chain, 10);
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(1, 4)), 0u);
}

TEST_F(KvServiceTest, PinWantsATimeToLive) {
  v1::KvPinRequest pin;
  *pin.mutable_blocks() = SelectSession(1);
  v1::KvPinReply reply;
  for (const double ttl : {0.0, -1.0, 86401.0, std::numeric_limits<double>::quiet_NaN()}) {
    pin.set_ttl_seconds(ttl);
    const grpc::Status status = Call(a_, &v1::Kv::Stub::Pin, pin, &reply);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << ttl;
    EXPECT_THAT(status.error_message(), HasSubstr("ttl_seconds"));
  }
}

TEST_F(KvServiceTest, CopyTransfersAndInsertsInOneCall) {
  Node b("b", network_, channels_);
  Publish(a_, 1, 10, "team", 7);
  v1::KvProgress progress;
  auto keys = Keys(1, 10);
  keys.push_back(Keys(2, 1)[0]);  // nobody has it
  const auto status = Watch(b, &v1::Kv::Stub::Copy, CopyFrom(a_, keys), &progress);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_TRUE(progress.finished());
  EXPECT_EQ(progress.total(), 11u);
  EXPECT_EQ(progress.done(), 10u);
  EXPECT_EQ(progress.skipped(), 1u);
  EXPECT_EQ(progress.bytes(), 10 * kLayout.block_bytes());
  for (size_t i = 0; i < 10; ++i) EXPECT_TRUE(Holds(b, 1, i)) << i;
  // With all that is known of them: the next copy, and a session's pin, work from there.
  const auto info = b.pool->Info(Keys(1, 10)[9]);
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(*info, Info(1, 9, "team", 7));
  EXPECT_EQ(b.pool->stats().leased, 0u);
  EXPECT_EQ(a_.pool->stats().leased, 0u);
}

TEST_F(KvServiceTest, CopyTakesWhatIsOnThePeersDisk) {
  Node b("b", network_, channels_);
  std::vector<std::byte> bytes(kLayout.block_bytes(), Fill(1, 0));
  Publish(a_, 1, 1);
  a_.disk->Write(Info(1, 0), bytes, [](absl::Status) {});
  v1::KvEvictRequest evict;
  *evict.mutable_blocks() = Select(Keys(1, 1));
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Evict, evict, &progress).ok());
  ASSERT_EQ(a_.pool->MatchPrefix(Keys(1, 1)), 0u);
  ASSERT_TRUE(Watch(b, &v1::Kv::Stub::Copy, CopyFrom(a_, Keys(1, 1)), &progress).ok());
  EXPECT_TRUE(Holds(b, 1, 0));
}

TEST_F(KvServiceTest, CopyIntoAPoolWithoutRoomSkipsAndLeaksNothing) {
  Node b("b", network_, channels_, /*slots=*/8);
  Publish(a_, 1, 4);
  const auto held = b.pool->Reserve(8).value();
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(b, &v1::Kv::Stub::Copy, CopyFrom(a_, Keys(1, 4)), &progress).ok());
  EXPECT_EQ(progress.done(), 0u);
  EXPECT_EQ(progress.skipped(), 4u);
  EXPECT_THAT(progress.note(), HasSubstr("no room"));
  EXPECT_EQ(b.pool->stats().leased, 8u);
}

// A peer that answers `where` with blocks nobody asked for, and says everything many times.
class Liar final : public v1::Kv::Service {
 public:
  explicit Liar(std::vector<BlockInfo> blocks) : blocks_(std::move(blocks)) {}
  grpc::Status Where(grpc::ServerContext*, const v1::KvWhereRequest*, v1::KvWhereReply* reply) override {
    for (int i = 0; i < 100; ++i) {
      for (const BlockInfo& info : blocks_) {
        v1::KvBlock* block = reply->add_blocks();
        block->set_key(std::string(KeyBytes(info.key)));
        block->set_parent(std::string(KeyBytes(*info.parent)));
        block->add_tiers(v1::KV_TIER_HOST);
        block->mutable_tokens()->Add(info.tokens.begin(), info.tokens.end());
      }
    }
    return grpc::Status::OK;
  }

 private:
  const std::vector<BlockInfo> blocks_;
};

TEST_F(KvServiceTest, CopyTakesOnlyWhatItAskedForAndEachOnce) {
  Node b("b", network_, channels_);
  Publish(a_, 1, 2);
  Publish(a_, 2, 1);
  Liar liar({Info(1, 0), Info(1, 1), Info(2, 0)});
  const RpcServer server = StartRpcServer("127.0.0.1:0", &liar).value();
  v1::KvCopyRequest request = CopyFrom(a_, Keys(1, 2));
  request.mutable_from()->set_grpc("127.0.0.1:" + std::to_string(server.port));
  v1::KvProgress progress;
  const auto status = Watch(b, &v1::Kv::Stub::Copy, request, &progress);
  server.server->Shutdown();
  server.server->Wait();
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(progress.total(), 2u);
  EXPECT_EQ(progress.done(), 2u);
  EXPECT_EQ(progress.skipped(), 0u);
  EXPECT_EQ(b.pool->stats().published, 2u);
  EXPECT_TRUE(Holds(b, 1, 1));
}

TEST_F(KvServiceTest, WhereCountsAllAndListsTheFirst) {
  Node big("big", network_, channels_, /*slots=*/6000);
  Publish(big, 1, 4);
  // Chains of one block each: more than one answer holds.
  for (int chain = 2; chain < 5000; ++chain) Publish(big, chain, 1);
  v1::KvWhereRequest request;
  request.mutable_blocks()->set_all(true);
  v1::KvWhereReply reply;
  ASSERT_TRUE(Call(big, &v1::Kv::Stub::Where, request, &reply).ok());
  EXPECT_EQ(reply.selected(), 5002u);
  ASSERT_EQ(reply.blocks_size(), 4096);
  for (const v1::KvBlock& block : reply.blocks()) EXPECT_EQ(block.position(), 0u);
}

TEST_F(KvServiceTest, CopyFromNobodyFailsWithItsName) {
  v1::KvProgress progress;
  v1::KvCopyRequest request = CopyFrom(a_, Keys(1, 1));
  EXPECT_THAT(Watch(a_, &v1::Kv::Stub::Copy, request, &progress).error_message(),
              HasSubstr("this worker itself"));
  request.mutable_from()->set_worker_id("gone");
  request.mutable_from()->set_grpc("127.0.0.1:1");
  const auto status = Watch(a_, &v1::Kv::Stub::Copy, request, &progress);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("gone"));
}

TEST_F(KvServiceTest, CopyIsPacedAndCancellable) {
  // Room for both copies at once: the first may still be giving its slots back.
  Node b("b", network_, channels_, /*slots=*/128);
  Publish(a_, 1, 40);
  auto request = CopyFrom(a_, Keys(1, 40));
  request.set_bytes_per_second(kLayout.block_bytes());  // 40 s of it
  grpc::ClientContext context;
  Arm(context);
  const auto stream = b.stub->Copy(&context, request);
  context.TryCancel();
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  // Its thread is free again: the next one does not wait for those 40 s.
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(b, &v1::Kv::Stub::Copy, CopyFrom(a_, Keys(1, 40)), &progress).ok());
  EXPECT_EQ(progress.done(), 40u);
}

// A peer whose process stands still: it takes calls and answers none.
class SilentPeer final : public v1::Kv::Service {
 public:
  grpc::Status Where(grpc::ServerContext* context, const v1::KvWhereRequest*, v1::KvWhereReply*) override {
    asked = true;
    while (!context->IsCancelled()) std::this_thread::yield();
    return grpc::Status::CANCELLED;
  }
  std::atomic<bool> asked{false};
};

TEST_F(KvServiceTest, StopDoesNotWaitForAPeerThatSaysNothing) {
  SilentPeer silent;
  const RpcServer server = StartRpcServer("127.0.0.1:0", &silent).value();
  v1::KvCopyRequest request;
  request.add_keys(std::string(KeyBytes(Keys(1, 1)[0])));
  request.mutable_from()->set_worker_id("silent");
  request.mutable_from()->set_grpc("127.0.0.1:" + std::to_string(server.port));
  grpc::Status ended;
  std::thread copy([&] {
    v1::KvProgress last;
    ended = Watch(a_, &v1::Kv::Stub::Copy, request, &last);
  });
  while (!silent.asked) std::this_thread::yield();
  const absl::Time began = Clock::Real().Now();
  a_.kv->Stop();
  copy.join();
  // What a call to a peer may take is 5 s.
  EXPECT_LT(Clock::Real().Now() - began, absl::Seconds(3));
  EXPECT_FALSE(ended.ok());
  EXPECT_EQ(a_.pool->stats().leased, 0u);
  server.server->Shutdown();
  server.server->Wait();
}

TEST_F(KvServiceTest, StatsTellWhatEachTenantHoldsWhereAskedFor) {
  Publish(a_, 1, 3, "few");
  Publish(a_, 2, 5, "many");
  v1::KvStatsRequest request;
  v1::KvStatsReply reply;
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Stats, request, &reply).ok());
  EXPECT_EQ(reply.tenants_size(), 0);
  request.set_with_tenants(true);
  ASSERT_TRUE(Call(a_, &v1::Kv::Stub::Stats, request, &reply).ok());
  ASSERT_EQ(reply.tenants_size(), 2);
  EXPECT_EQ(reply.tenants(0).tenant(), "many");
  EXPECT_EQ(reply.tenants(0).host_bytes(), 5 * kLayout.block_bytes());
  EXPECT_EQ(reply.tenants(1).tenant(), "few");
  EXPECT_EQ(reply.tenants(1).host_bytes(), 3 * kLayout.block_bytes());
}

TEST_F(KvServiceTest, MoveLeavesTheBlocksAtTheReceiverOnly) {
  Node b("b", network_, channels_);
  Publish(a_, 1, 3);
  v1::KvMoveRequest request;
  *request.mutable_blocks() = Select(Keys(1, 3));
  *request.mutable_from() = a_.address;
  v1::KvProgress progress;
  const auto status = Watch(b, &v1::Kv::Stub::Move, request, &progress);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(progress.done(), 3u);
  EXPECT_EQ(b.pool->MatchPrefix(Keys(1, 3)), 3u);
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(1, 3)), 0u);
}

TEST_F(KvServiceTest, MoveToDiskAndPrefetchBringTheSameBytesBack) {
  Publish(a_, 1, 3, "t", 5);
  v1::KvMoveRequest move;
  *move.mutable_blocks() = SelectSession(5);
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Move, move, &progress).ok());
  EXPECT_EQ(progress.done(), 3u) << progress.note();
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(1, 3)), 0u);
  EXPECT_TRUE(a_.disk->Contains(Keys(1, 3)[2]));

  v1::KvPrefetchRequest prefetch;
  *prefetch.mutable_blocks() = SelectSession(5);
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Prefetch, prefetch, &progress).ok());
  EXPECT_EQ(progress.done(), 3u) << progress.note();
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(Holds(a_, 1, i)) << i;
  EXPECT_EQ(a_.pool->Info(Keys(1, 3)[2])->session, 5u);
}

TEST_F(KvServiceTest, CompressShortensWhatIsOnTheDiskAndSaysWhatThatGave) {
  for (size_t i = 0; i < 20; ++i) {
    a_.disk->Write(Info(1, i, "one", 7), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  }
  a_.disk->Write(Info(2, 0, "two"), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  v1::KvCompressRequest request;
  request.mutable_blocks()->set_tenant("one");
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Compress, request, &progress).ok());
  EXPECT_EQ(progress.total(), 20u);
  EXPECT_EQ(progress.done(), 20u) << progress.note();
  EXPECT_EQ(progress.bytes(), 20 * (kLayout.block_bytes() / 4));
  EXPECT_TRUE(progress.finished());
  // Once more: nothing to gain, and nothing lost.
  *request.mutable_blocks() = SelectSession(7);
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Compress, request, &progress).ok());
  EXPECT_EQ(progress.done(), 20u);
  EXPECT_EQ(progress.bytes(), 0u);
  // By keys, of which one is not there.
  *request.mutable_blocks() = Select({Keys(2, 1)[0], Keys(3, 1)[0]});
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Compress, request, &progress).ok());
  EXPECT_EQ(progress.done(), 1u);
  EXPECT_EQ(progress.skipped(), 1u);
  EXPECT_THAT(progress.note(), HasSubstr("not on the disk"));
  request.mutable_blocks()->set_all(true);
  request.mutable_blocks()->set_fingerprint("another model");
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Compress, request, &progress).ok());
  EXPECT_EQ(progress.total(), 0u);
}

TEST_F(KvServiceTest, CompressIsPacedAndCancellable) {
  for (size_t i = 0; i < 40; ++i)
    a_.disk->Write(Info(1, i), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  v1::KvCompressRequest request;
  request.mutable_blocks()->set_all(true);
  request.set_bytes_per_second(kLayout.block_bytes());  // 40 s of it
  grpc::ClientContext context;
  Arm(context);
  const auto stream = a_.stub->Compress(&context, request);
  context.TryCancel();
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  request.set_bytes_per_second(0);
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Compress, request, &progress).ok());
  EXPECT_EQ(progress.done(), 40u);
}

TEST_F(KvServiceTest, WhatIsCompressedSlowlyHoldsUpNothingElse) {
  for (size_t i = 0; i < 40; ++i)
    a_.disk->Write(Info(1, i), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  v1::KvCompressRequest slow;
  slow.mutable_blocks()->set_all(true);
  slow.set_bytes_per_second(kLayout.block_bytes());  // 40 s of it
  grpc::ClientContext contexts[KvService::kLongThreads + 1];
  std::vector<std::unique_ptr<grpc::ClientReader<v1::KvProgress>>> streams;
  v1::KvProgress progress;
  for (grpc::ClientContext& context : contexts) {
    Arm(context);
    streams.push_back(a_.stub->Compress(&context, slow));
    if (streams.size() == 1) {
      ASSERT_TRUE(streams[0]->Read(&progress)) << "it has begun";
    }
  }
  v1::KvClearRequest clear;
  clear.mutable_blocks()->set_all(true);
  EXPECT_TRUE(Watch(a_, &v1::Kv::Stub::Clear, clear, &progress).ok());
  for (grpc::ClientContext& context : contexts) context.TryCancel();
  for (const auto& stream : streams) (void)stream->Finish();
}

// A disk whose next so many reads come too late.
class LateTier final : public BlockTier {
 public:
  LateTier(BlockTier& disk, int late) : disk_(disk), late_(late) {}
  Caps caps() const override { return disk_.caps(); }
  ReadId Read(const BlockKey& key, std::span<const int32_t> tokens, std::span<std::byte> dst,
              absl::Duration timeout, ReadDone done) override {
    if (--late_ < 0) return disk_.Read(key, tokens, dst, timeout, std::move(done));
    done(absl::DeadlineExceededError("late"));
    return 0;
  }
  bool CancelRead(ReadId id) override { return disk_.CancelRead(id); }
  void Write(const BlockInfo& info, std::span<const std::byte> payload, Done done) override {
    disk_.Write(info, payload, std::move(done));
  }
  void Erase(const BlockKey& key, Done done) override { disk_.Erase(key, std::move(done)); }
  void EraseIf(Predicate matches, CountDone done) override {
    disk_.EraseIf(std::move(matches), std::move(done));
  }
  bool Contains(const BlockKey& key) const override { return disk_.Contains(key); }
  std::optional<TierEntry> Find(const BlockKey& key) const override { return disk_.Find(key); }
  Page List(uint64_t cursor, size_t max) const override { return disk_.List(cursor, max); }
  TierStats stats() const override { return disk_.stats(); }
  TierHealth health() const override { return disk_.health(); }
  void SetObserver(TierObserver* observer) override { disk_.SetObserver(observer); }

 private:
  BlockTier& disk_;
  std::atomic<int> late_;
};

TEST_F(KvServiceTest, PrefetchAsksAgainForWhatADiskThatIsHeldToARateBringsTooLate) {
  for (size_t i = 0; i < 3; ++i)
    a_.disk->Write(Info(1, i), std::vector<std::byte>(kLayout.block_bytes(), Fill(1, i)),
                   [](absl::Status) {});
  v1::KvPrefetchRequest prefetch;
  *prefetch.mutable_blocks() = Select(Keys(1, 3));
  v1::KvProgress progress;
  LateTier never(*a_.disk, 1000);
  a_.context.disk = &never;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Prefetch, prefetch, &progress).ok());
  EXPECT_EQ(progress.skipped(), 3u);
  LateTier late(*a_.disk, 5);
  a_.context.disk = &late;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Prefetch, prefetch, &progress).ok());
  EXPECT_EQ(progress.done(), 3u) << progress.note();
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(Holds(a_, 1, i)) << i;
  a_.context.disk = a_.disk.get();
}

TEST_F(KvServiceTest, DamagedBlockOnTheDiskIsSkipped) {
  a_.disk->Write(Info(1, 0), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  a_.disk->Corrupt(Keys(1, 1)[0]);
  v1::KvPrefetchRequest prefetch;
  *prefetch.mutable_blocks() = Select(Keys(1, 1));
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Prefetch, prefetch, &progress).ok());
  EXPECT_EQ(progress.done(), 0u);
  EXPECT_EQ(progress.skipped(), 1u);
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(1, 1)), 0u);
  EXPECT_EQ(a_.pool->stats().leased, 0u);
}

TEST_F(KvServiceTest, ClearForgetsByTenantSessionAndAll) {
  Publish(a_, 1, 2, "one", 1);
  Publish(a_, 2, 2, "two", 2);
  Publish(a_, 3, 2, "two", 3);
  a_.disk->Write(Info(4, 0, "two", 4), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  v1::KvClearRequest clear;
  v1::KvProgress progress;
  *clear.mutable_blocks() = SelectSession(2);
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Clear, clear, &progress).ok());
  EXPECT_EQ(progress.done(), 2u);
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(2, 2)), 0u);
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(3, 2)), 2u);

  clear.mutable_blocks()->set_tenant("two");
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Clear, clear, &progress).ok());
  EXPECT_EQ(progress.done(), 3u);  // two in memory, one on the disk
  EXPECT_FALSE(a_.disk->Contains(Keys(4, 1)[0]));
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(1, 2)), 2u);

  clear.mutable_blocks()->set_all(true);
  clear.mutable_blocks()->set_fingerprint("another model");
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Clear, clear, &progress).ok());
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(1, 2)), 2u);
  clear.mutable_blocks()->set_fingerprint("model");
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Clear, clear, &progress).ok());
  EXPECT_EQ(a_.pool->stats().published, 0u);
}

// Read back from a disk that takes its time to erase, by somebody who began before the clear.
TEST_F(KvServiceTest, AClearThatIsCancelledAtTheDiskLeavesNothingInTheHostTier) {
  Publish(a_, 1, 2);
  a_.disk->HoldErases();
  v1::KvClearRequest clear;
  clear.mutable_blocks()->set_all(true);
  grpc::ClientContext context;
  Arm(context);
  const auto stream = a_.stub->Clear(&context, clear);
  v1::KvProgress progress;
  while (stream->Read(&progress) && progress.done() < 2) {
  }
  ASSERT_EQ(progress.done(), 2u);
  Publish(a_, 1, 2);
  context.TryCancel();
  while (stream->Read(&progress)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  const absl::Time limit = Clock::Real().Now() + absl::Seconds(10);
  while (a_.pool->stats().published > 0 && Clock::Real().Now() < limit) std::this_thread::yield();
  EXPECT_EQ(a_.pool->stats().published, 0u);
}

TEST_F(KvServiceTest, EvictSparesTheDiskUnlessItIsNamed) {
  Publish(a_, 1, 1);
  a_.disk->Write(Info(1, 0), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  v1::KvEvictRequest evict;
  *evict.mutable_blocks() = Select(Keys(1, 1));
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Evict, evict, &progress).ok());
  EXPECT_EQ(a_.pool->MatchPrefix(Keys(1, 1)), 0u);
  EXPECT_TRUE(a_.disk->Contains(Keys(1, 1)[0]));
  evict.add_tiers(v1::KV_TIER_DISK);
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Evict, evict, &progress).ok());
  EXPECT_FALSE(a_.disk->Contains(Keys(1, 1)[0]));
  evict.add_tiers(v1::KV_TIER_DEVICE);
  EXPECT_EQ(Watch(a_, &v1::Kv::Stub::Evict, evict, &progress).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

// Router: what an outside consumer does with the stream, as EVENTS.md tells it to.
class Router {
 public:
  // Reads until `enough` says so of what is known. False: the stream ended first.
  template <typename Enough>
  bool Read(Node& node, const v1::KvSubscribeRequest& request, Enough enough) {
    grpc::ClientContext context;
    AddClusterToken(context, kToken);
    SetTimeout(context, absl::Seconds(20));
    const auto stream = node.stub->Subscribe(&context, request);
    v1::KvEventBatch batch;
    bool snapshot_began = false;
    while (stream->Read(&batch)) {
      if (batch.snapshot() && !std::exchange(snapshot_began, true)) {
        held_.clear();
        ++snapshots_;
      }
      for (const v1::KvEvent& e : batch.events()) {
        if (!batch.snapshot()) {
          EXPECT_EQ(e.seq(), next_) << "a gap";
          next_ = e.seq() + 1;
        }
        Apply(e);
      }
      if (batch.snapshot_end()) {
        snapshot_began = false;
        next_ = batch.snapshot_seq() + 1;
      }
      if (batch.next_seq() > 0) {
        EXPECT_EQ(batch.next_seq(), next_);
      }
      if (!batch.snapshot() || batch.snapshot_end()) {
        if (enough()) {
          context.TryCancel();
          stream->Finish();
          return true;
        }
      }
    }
    stream->Finish();
    return false;
  }
  void Apply(const v1::KvEvent& e) {
    switch (e.kind()) {
      case v1::KvEvent::KIND_STORED:
        held_[e.tier()].insert(e.key());
        break;
      case v1::KvEvent::KIND_REMOVED:
        held_[e.tier()].erase(e.key());
        break;
      case v1::KvEvent::KIND_CLEARED:
        held_[e.tier()].clear();
        break;
      case v1::KvEvent::KIND_MOVED:
        held_[e.from_tier()].erase(e.key());
        held_[e.tier()].insert(e.key());
        break;
      default:
        FAIL() << "unknown kind " << e.kind();
    }
  }
  size_t held(v1::KvTier tier) { return held_[tier].size(); }
  uint64_t next() const { return next_; }
  int snapshots() const { return snapshots_; }

 private:
  std::map<int, std::set<std::string>> held_;
  uint64_t next_ = 0;
  int snapshots_ = 0;
};

TEST_F(KvServiceTest, SubscriberKnowsWhatIsThereAndWhatHappens) {
  Publish(a_, 1, 3);
  a_.disk->Write(Info(2, 0), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  Router router;
  ASSERT_TRUE(router.Read(a_, v1::KvSubscribeRequest(), [&] {
    return router.held(v1::KV_TIER_HOST) == 3 && router.held(v1::KV_TIER_DISK) == 1;
  }));
  EXPECT_EQ(router.snapshots(), 1);

  // Goes on where it was, without a snapshot: nothing is missed that happened meanwhile.
  Publish(a_, 3, 2);
  v1::KvMoveRequest move;
  *move.mutable_blocks() = Select(Keys(1, 3));
  v1::KvProgress progress;
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Move, move, &progress).ok());
  v1::KvSubscribeRequest again;
  again.set_from_seq(router.next());
  again.set_boot_id("boot-a");
  ASSERT_TRUE(router.Read(
      a_, again, [&] { return router.held(v1::KV_TIER_HOST) == 2 && router.held(v1::KV_TIER_DISK) == 4; }));
  EXPECT_EQ(router.snapshots(), 1);

  v1::KvClearRequest clear;
  clear.mutable_blocks()->set_all(true);
  ASSERT_TRUE(Watch(a_, &v1::Kv::Stub::Clear, clear, &progress).ok());
  again.set_from_seq(router.next());
  ASSERT_TRUE(router.Read(
      a_, again, [&] { return router.held(v1::KV_TIER_HOST) == 0 && router.held(v1::KV_TIER_DISK) == 0; }));
}

TEST_F(KvServiceTest, SubscriberOfAnotherBootOrTooFarBehindGetsASnapshot) {
  Node small("small", network_, channels_, kSlots, /*max_events=*/8);
  Publish(small, 1, 20);
  for (const uint64_t from : {uint64_t{1}, uint64_t{1} << 40}) {
    Router router;
    v1::KvSubscribeRequest request;
    request.set_from_seq(from);
    ASSERT_TRUE(router.Read(small, request, [&] { return router.held(v1::KV_TIER_HOST) == 20; })) << from;
    EXPECT_EQ(router.snapshots(), 1);
  }
  Router router;
  v1::KvSubscribeRequest request;
  request.set_from_seq(small.pool->events().next());
  request.set_boot_id("an earlier one");
  ASSERT_TRUE(router.Read(small, request, [&] { return router.held(v1::KV_TIER_HOST) == 20; }));
}

TEST_F(KvServiceTest, EventsCarryParentsAndTokensWhereAskedFor) {
  grpc::ClientContext context;
  Arm(context);
  v1::KvSubscribeRequest request;
  request.set_from_seq(1);
  request.set_with_tokens(true);
  const auto stream = a_.stub->Subscribe(&context, request);
  Publish(a_, 1, 2, "team", 9);
  std::vector<v1::KvEvent> events;
  v1::KvEventBatch batch;
  while (events.size() < 2 && stream->Read(&batch))
    events.insert(events.end(), batch.events().begin(), batch.events().end());
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[1].parent(), KeyBytes(Keys(1, 1)[0]));
  EXPECT_EQ(events[1].tenant(), "team");
  EXPECT_EQ(events[1].session(), 9u);
  ASSERT_EQ(events[1].tokens_size(), 4);
  EXPECT_EQ(events[1].tokens(0), Tokens(1, 2)[4]);
  context.TryCancel();
  stream->Finish();
}

TEST_F(KvServiceTest, SubscribersAreLimitedAndGoWhenTheServiceStops) {
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::KvEventBatch>>> streams;
  v1::KvEventBatch batch;
  for (size_t i = 0; i <= KvService::kSubscribersMax; ++i) {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    Arm(*contexts.back());
    streams.push_back(a_.stub->Subscribe(contexts.back().get(), v1::KvSubscribeRequest()));
    const bool answered = streams.back()->Read(&batch);
    EXPECT_EQ(answered, i < KvService::kSubscribersMax) << i;
  }
  EXPECT_EQ(streams.back()->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  streams.pop_back();
  a_.kv->Stop();
  for (auto& stream : streams) {
    while (stream->Read(&batch)) {
    }
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  }
}

TEST_F(KvServiceTest, DiskThatSwitchesOffIsClearedAndToldAgainWhenItIsBack) {
  a_.disk->Write(Info(1, 0), std::vector<std::byte>(kLayout.block_bytes()), [](absl::Status) {});
  Router router;
  ASSERT_TRUE(router.Read(a_, v1::KvSubscribeRequest(), [&] { return router.held(v1::KV_TIER_DISK) == 1; }));
  v1::KvSubscribeRequest again;
  again.set_from_seq(router.next());
  a_.disk->SetHealth({TierState::kOff, "pulled out"});
  ASSERT_TRUE(router.Read(a_, again, [&] { return router.held(v1::KV_TIER_DISK) == 0; }));
  again.set_from_seq(router.next());
  a_.disk->SetHealth({TierState::kOn, ""});
  ASSERT_TRUE(router.Read(a_, again, [&] { return router.held(v1::KV_TIER_DISK) == 1; }));
}

}  // namespace
}  // namespace tidepool
