#include "kvstore/fetch_node.h"

#include "tests/kvstore/fetch_node_contract.h"
#include "transport/inproc_transport.h"

namespace tidepool {
namespace {

InprocNetwork& Network() {
  static InprocNetwork network;
  return network;
}
InprocNetwork& SlowNetwork() {
  static InprocNetwork network(&Clock::Real(), {.seed = 5,
                                                .delay_min = absl::Microseconds(10),
                                                .delay_max = absl::Microseconds(200),
                                                .bulk_pieces = 4,
                                                .close_max = absl::Milliseconds(3)});
  return network;
}

INSTANTIATE_TEST_SUITE_P(Inproc, FetchNodeContract,
                         testing::Values(NodeTransportFactory([] { return Network().NewTransport(); })));
INSTANTIATE_TEST_SUITE_P(InprocSlow, FetchNodeContract,
                         testing::Values(NodeTransportFactory([] { return SlowNetwork().NewTransport(); })));

TEST(FetchNodeTest, EveryMetricExistsFromTheStart) {
  TestNode node([] { return Network().NewTransport(); }, {});
  const std::string text = node.metrics.Render();
  for (const char* series :
       {"tidepool_kv_transfer_duration_seconds_count{transport=\"inproc\"} 0",
        "tidepool_kv_transfer_bytes_total{direction=\"in\"} 0",
        "tidepool_kv_transfer_bytes_total{direction=\"out\"} 0",
        "tidepool_kv_transfer_failures_total{reason=\"deadline\"} 0",
        "tidepool_kv_transfer_failures_total{reason=\"quarantined\"} 0", "tidepool_kv_leases_expired_total 0",
        "tidepool_kv_stale_frames_total{reason=\"stale_generation\"} 0", "tidepool_kv_held_blocks 0"}) {
    EXPECT_NE(text.find(series), std::string::npos) << series;
  }
}

TEST(FetchNodeTest, APeerThatSendsGarbageIsClosed) {
  InprocNetwork network;
  TestNode node([&] { return network.NewTransport(); }, {});
  struct Peer final : TransportHandler {
    void OnMessage(EndpointId, std::string_view) override {}
    BulkSink OnBulk(EndpointId, std::string_view, size_t) override { return {}; }
    void OnEndpointDown(EndpointId, absl::Status) override { down = true; }
    bool down = false;
  } peer;
  const auto transport = network.NewTransport();
  transport->SetHandler(&peer);
  const EndpointId to = *transport->Connect(node.node->address());
  const char* const kSeries = "tidepool_kv_stale_frames_total{reason=\"malformed\"}";
  for (uint64_t n = 1; n <= 16; ++n) {
    EXPECT_FALSE(peer.down) << n;
    ASSERT_TRUE(transport->Send(to, "garbage").ok());
    ASSERT_TRUE(Eventually([&] { return transport->Progress(), node.Metric(kSeries) == n; }));
  }
  EXPECT_TRUE(Eventually([&] { return transport->Progress(), peer.down; }));
}

// Counts how often it is given memory that peers may map.
class SharingTransport final : public Transport {
 public:
  SharingTransport(std::unique_ptr<Transport> inner, int& shared)
      : inner_(std::move(inner)), shared_(shared) {}
  void SetHandler(TransportHandler* handler) override { inner_->SetHandler(handler); }
  std::string Address() const override { return inner_->Address(); }
  std::string_view Name() const override { return inner_->Name(); }
  absl::StatusOr<EndpointId> Connect(std::string_view address) override { return inner_->Connect(address); }
  absl::Status Send(EndpointId to, std::string_view message) override { return inner_->Send(to, message); }
  absl::Status SendBulk(EndpointId to, std::string_view header, std::span<const std::byte> payload,
                        std::function<void(absl::Status)> done) override {
    return inner_->SendBulk(to, header, payload, std::move(done));
  }
  void Close(EndpointId endpoint, std::function<void()> quiesced) override {
    inner_->Close(endpoint, std::move(quiesced));
  }
  void ShareMemory(int, std::span<const std::byte>) override { ++shared_; }
  int Progress() override { return inner_->Progress(); }
  void Wait(int timeout_ms) override { inner_->Wait(timeout_ms); }
  void Wake() override { inner_->Wake(); }

 private:
  const std::unique_ptr<Transport> inner_;
  int& shared_;
};

TEST(FetchNodeTest, TheArenaIsGivenToNobodyWhereItIsNotToBeShared) {
  MetricRegistry metrics;
  const auto pool =
      std::move(*BlockPool::Create({.layout = NodeSpec().layout, .slots = 4, .metrics = &metrics}));
  ASSERT_GE(pool->arena().fd(), 0);
  InprocNetwork network;
  for (const bool share : {false, true}) {
    MetricRegistry node_metrics;
    int shared = 0;
    auto node =
        FetchNode::Start({.worker_id = "a",
                          .boot_id = "ba",
                          .pool = pool.get(),
                          .transport = std::make_unique<SharingTransport>(network.NewTransport(), shared),
                          .metrics = &node_metrics,
                          .share_arena = share});
    ASSERT_TRUE(node.ok()) << node.status();
    EXPECT_EQ(shared, share ? 1 : 0);
    EXPECT_EQ((*node)->arena_address().empty(), !share);
  }
}

// A peer that is stopped, not dead: nothing tells of it but the clock.
TEST(FetchNodeTest, ASilentPeerCostsTheDeadlineAndThenTheSlotsAreFree) {
  InprocNetwork network;
  auto factory = [&] { return network.NewTransport(); };
  TestNode a(factory, {.worker = "a", .boot = "ba"});
  TestNode b(factory, {.worker = "b", .boot = "bb"});
  const auto keys = b.Publish(1, 4);
  Waiter warm;
  FetchSpec spec;
  spec.request_id = "warm";
  spec.peer = b.peer();
  spec.keys = keys;
  spec.slots = a.Slots(4);
  spec.deadline = Clock::Real().Now() + absl::Seconds(10);
  a.node->Fetch(std::move(spec), warm.Callback());
  ASSERT_TRUE(warm.Get().status.ok());

  network.Cut(a.node->address(), b.node->address(), true);
  Waiter w;
  spec = {};
  spec.request_id = "cut";
  spec.peer = b.peer();
  spec.keys = keys;
  spec.slots = a.Slots(4);
  spec.deadline = Clock::Real().Now() + absl::Milliseconds(200);
  a.node->Fetch(std::move(spec), w.Callback());
  EXPECT_TRUE(absl::IsDeadlineExceeded(w.Get().status)) << w.Get().status;
  for (const BlockLease& slot : w.Get().slots) EXPECT_FALSE(slot.empty());
  EXPECT_EQ(a.Metric("tidepool_kv_transfer_failures_total{reason=\"deadline\"}"), 1u);
  network.Cut(a.node->address(), b.node->address(), false);
}

}  // namespace
}  // namespace tidepool
