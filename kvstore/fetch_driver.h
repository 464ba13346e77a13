#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <variant>

#include "absl/container/flat_hash_map.h"
#include "base/bounded_queue.h"
#include "kvstore/fetch_client.h"
#include "kvstore/fetch_coder.h"
#include "kvstore/fetch_node.h"
#include "kvstore/fetch_server.h"
#include "kvstore/offer_table.h"

namespace tidepool {

inline constexpr size_t kMaxFetchSubmissions = 65536;

struct FetchSubmission {
  FetchSpec spec;
  std::function<void(FetchResult)> done;
};
using Submission = std::variant<FetchSubmission, ClientCancel, ClientRelease>;

// LoadMailbox: where the lower tier's threads leave what they read. It outlives the node where a tier answers
// late.
struct LoadMailbox {
  void Put(ServerLoaded loaded) {
    std::lock_guard lock(mu);
    if (transport == nullptr) return;  // the slot goes back to the pool
    answers.push_back(std::move(loaded));
    transport->Wake();
  }
  std::mutex mu;
  std::vector<ServerLoaded> answers;
  Transport* transport;  // null: nobody takes them any more
};

// Probe: the node's metrics; every series exists from the start, at zero.
struct FetchProbe {
  FetchProbe(MetricRegistry& m, std::string_view transport)
      : duration(m.AddHistogram("tidepool_kv_transfer_duration_seconds",
                                "Time from a fetch's submission to its verified end", LatencyBuckets(),
                                {{"transport", std::string(transport)}})),
        bytes_in(m.AddCounter("tidepool_kv_transfer_bytes_total", "KV bytes moved between processes",
                              {{"direction", "in"}})),
        bytes_out(m.AddCounter("tidepool_kv_transfer_bytes_total", "KV bytes moved between processes",
                               {{"direction", "out"}})),
        leases_expired(m.AddCounter("tidepool_kv_leases_expired_total",
                                    "Blocks whose lease for a peer ran out before the peer released them")),
        held_blocks(m.AddGauge("tidepool_kv_held_blocks", "Blocks held for peers: offered or being sent")) {
    for (size_t i = 0; i < kFetchReasons; ++i) {
      const Labels labels = {{"reason", std::string(kFetchReasonNames[i])}};
      reasons[i] = i <= static_cast<size_t>(FetchReason::kQuarantined)
                       ? &m.AddCounter("tidepool_kv_transfer_failures_total",
                                       "KV transfers that failed, by cause", labels)
                       : &m.AddCounter("tidepool_kv_stale_frames_total",
                                       "Handoff frames that were dropped, by cause", labels);
    }
  }
  void Count(FetchReason reason) { reasons[static_cast<size_t>(reason)]->Add(); }

  Histogram& duration;
  Counter& bytes_in;
  Counter& bytes_out;
  Counter& leases_expired;
  Gauge& held_blocks;
  std::array<Counter*, kFetchReasons> reasons;
};

// FetchDriver: feeds the two cores with what the transport and the submissions bring, and carries out
// what they want. Everything of FetchNode but its thread, so that a simulation runs the shipped code:
// one thread calls Poll and Shutdown, any thread calls Submit. Nobody else touches the rest.
struct FetchDriver : TransportHandler {
  explicit FetchDriver(FetchNode::Options o)
      : options(std::move(o)),
        address(options.transport->Address()),
        probe(*options.metrics, options.transport->Name()),
        offer_table(std::make_shared<OfferTable>(options.pool->layout().layers, options.offer_lease)),
        client({.worker_id = options.worker_id,
                .boot_id = options.boot_id,
                .fingerprint = options.fingerprint,
                .layout = options.pool->layout(),
                .codec = WireCodec(options),
                .timings = options.timings,
                .lanes = options.lanes,
                .window = {.max = options.flow.window_bytes, .target = options.flow.window_target}}),
        server({.worker_id = options.worker_id,
                .boot_id = options.boot_id,
                .fingerprint = options.fingerprint,
                .pool = options.pool,
                .offers = offer_table,
                .disk = options.disk,
                .codec = WireCodec(options),
                .timings = options.timings,
                .flow = options.flow}) {
    mailbox->transport = &transport();
    transport().SetHandler(this);
    if (const BlockCodec* codec = WireCodec(options)) {
      coder = std::make_unique<FetchCoder>(options.pool->layout(), *codec, *options.metrics, *options.clock,
                                           [this] { transport().Wake(); });
    }
  }
  ~FetchDriver() override { CloseMailbox(); }

  // --- called by any thread ---
  bool Submit(Submission submission) {
    if (!queue.TryPush(submission)) return false;
    transport().Wake();
    return true;
  }

  void Offer(const std::string& request, const BlockKey& key, BlockLease lease, uint32_t layers_ready) {
    offer_table->Offer(request, key, std::move(lease), layers_ready, Now());
    OffersMoved();
  }
  void AdvanceOffer(const std::string& request, std::span<const BlockKey> keys, uint32_t layers_ready) {
    offer_table->Advance(request, keys, layers_ready, Now());
    OffersMoved();
  }
  void RevokeOffers(const std::string& request) {
    offer_table->Revoke(request);
    OffersMoved();
  }
  void ReleaseOffers(const std::string& request) {
    offer_table->Release(request);
    OffersMoved();
  }
  // The node's thread is to look at the table (for growing blocks, and when the next offer runs out).
  size_t offers() const { return offer_table->size(); }
  void OffersMoved() {
    if (!offers_moved.exchange(true)) transport().Wake();
  }

  // --- the node's thread from here on ---
  // One round: transport, submissions, timers. Returns the number of events handled.
  int Poll();
  absl::Time next_timer() const { return std::min(client.next_timer(), server.next_timer()); }
  int DrainSubmissions();
  void Take(FetchSubmission& s);
  void Take(ClientCancel& s) { Run(client.Step(std::move(s), Now())); }
  void Take(ClientRelease& s) { Run(client.Step(std::move(s), Now())); }
  int DrainLoads();
  int DrainCoder();
  // No answer of the lower tier or the coder touches the node any more. Before the transport goes.
  void CloseMailbox();
  void Tick(absl::Time now);
  void Publish();  // to the atomics below and the metrics
  int DrainLater();
  // Ends every fetch and closes every endpoint: first Begin, then Poll until Quiet, then Force for what is
  // left (its slots go to quarantine).
  void BeginShutdown();
  void ForceShutdown();
  bool Quiet() const {
    return client.active() + client.lanes() + server.active() + server.lanes() + server.loads() == 0 &&
           later.empty();
  }

  void OnMessage(EndpointId from, std::string_view message) override;
  BulkSink OnBulk(EndpointId from, std::string_view header, size_t length) override;
  void OnEndpointDown(EndpointId endpoint, absl::Status why) override;
  // A frame that does not decode, or that nobody but a broken or hostile peer sends so.
  void OnMalformed(EndpointId from, const absl::Status& why);

  void Run(ClientActions actions) {
    for (ClientAction& action : actions) std::visit([&](auto& a) { Do(a); }, action);
  }
  void Run(ServerActions actions) {
    for (ServerAction& action : actions) std::visit([&](auto& a) { Do(a); }, action);
  }
  void Do(ClientConnect& a);
  void Do(ClientSend& a);
  void Do(ClientClose& a);
  void Do(ClientFinish& a);
  void Do(ClientQuarantine& a) { options.pool->Quarantine(std::move(a.lease)); }
  void Do(ClientCount& a) { probe.Count(a.reason); }
  void Do(ClientDecode& a) { coder->Take(std::move(a)); }
  void Do(ServerSend& a);
  void Do(ServerSendBulk& a);
  void Do(ServerClose& a);
  void Do(ServerLoad& a);
  void Do(ServerCancelLoad& a);
  void Do(ServerEncode& a) { coder->Take(std::move(a)); }
  void Do(ServerQuarantine& a) { options.pool->Quarantine(std::move(a.lease)); }
  void Do(ServerCount& a) { probe.Count(a.reason); }
  void Do(ServerLeaseExpired& a);
  void Do(ServerSent& a) { probe.bytes_out.Add(a.bytes); }

  // Null where blocks travel as they are.
  static const BlockCodec* WireCodec(const FetchNode::Options& options) {
    return options.codec == nullptr || options.codec->id() == CodecId::kNone ? nullptr : options.codec;
  }

  absl::Time Now() const { return options.clock->Now(); }
  Transport& transport() { return *options.transport; }

  FetchNode::Options options;
  const std::string address;
  FetchProbe probe;
  const std::shared_ptr<OfferTable> offer_table;
  BoundedQueue<Submission> queue{kMaxFetchSubmissions};
  std::atomic<size_t> fetches_out{0};  // submitted and not ended
  std::atomic<size_t> fetches_in{0};
  std::atomic<bool> offers_moved{false};
  const std::shared_ptr<LoadMailbox> mailbox = std::make_shared<LoadMailbox>();

  FetchClient client;
  FetchServer server;
  std::unique_ptr<FetchCoder> coder;                       // null: no codec
  absl::flat_hash_map<uint64_t, BlockTier::ReadId> reads;  // by load, unanswered
  uint64_t next_handle = 1;
  absl::flat_hash_map<uint64_t, std::function<void(FetchResult)>> callbacks;
  // The client core's lanes. The server core's lanes are the endpoints of peers that connected to us.
  absl::flat_hash_map<LaneId, EndpointId> endpoint_of;
  absl::flat_hash_map<EndpointId, LaneId> lane_of;
  absl::flat_hash_map<EndpointId, int> malformed;  // frames, of open endpoints
  absl::Time next_malformed_warning = absl::InfinitePast();
  std::deque<std::function<void()>> later;  // events that an action caused, taken up after its batch
};

}  // namespace tidepool
