#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <string>
#include <utility>
#include <variant>

#include "absl/container/flat_hash_map.h"
#include "base/bounded_queue.h"
#include "kvstore/fetch_client.h"
#include "kvstore/fetch_node.h"
#include "kvstore/fetch_server.h"

namespace tidepool {

inline constexpr size_t kMaxFetchSubmissions = 65536;

struct FetchSubmission {
  FetchSpec spec;
  std::function<void(FetchResult)> done;
};
using Submission =
    std::variant<FetchSubmission, ClientCancel, ClientRelease, ServerOffer, ServerReleaseOffers>;

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
        held_blocks(m.AddGauge("tidepool_kv_held_blocks", "Blocks held for peers: offered or being sent")),
        offers_dropped(m.AddCounter("tidepool_kv_offers_dropped_total",
                                    "Offers dropped because the node's queue was full")) {
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
  Counter& offers_dropped;
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
        client({options.worker_id, options.boot_id, options.fingerprint, options.pool->layout(),
                options.timings}),
        server({.worker_id = options.worker_id,
                .boot_id = options.boot_id,
                .fingerprint = options.fingerprint,
                .pool = options.pool,
                .timings = options.timings,
                .offer_lease = options.offer_lease}) {
    transport().SetHandler(this);
  }

  // --- called by any thread ---
  bool Submit(Submission submission) {
    if (!queue.TryPush(submission)) return false;
    transport().Wake();
    return true;
  }

  // --- the node's thread from here on ---
  // One round: transport, submissions, timers. Returns the number of events handled.
  int Poll();
  absl::Time next_timer() const { return std::min(client.next_timer(), server.next_timer()); }
  int DrainSubmissions();
  void Take(FetchSubmission& s);
  void Take(ClientCancel& s) { Run(client.Step(std::move(s), Now())); }
  void Take(ClientRelease& s) { Run(client.Step(std::move(s), Now())); }
  void Take(ServerOffer& s) { Run(server.Step(std::move(s), Now())); }
  void Take(ServerReleaseOffers& s) { Run(server.Step(std::move(s), Now())); }
  void Tick(absl::Time now);
  void Publish();  // to the atomics below and the metrics
  int DrainLater();
  // Ends every fetch and closes every endpoint: first Begin, then Poll until Quiet, then Force for what is
  // left (its slots go to quarantine).
  void BeginShutdown();
  void ForceShutdown();
  bool Quiet() const {
    return client.active() + client.lanes() + server.active() + server.lanes() == 0 && later.empty();
  }

  void OnMessage(EndpointId from, std::string_view message) override;
  BulkSink OnBulk(EndpointId from, std::string_view header, size_t length) override;
  void OnEndpointDown(EndpointId endpoint, absl::Status why) override;

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
  void Do(ServerSend& a);
  void Do(ServerSendBulk& a);
  void Do(ServerClose& a);
  void Do(ServerQuarantine& a) { options.pool->Quarantine(std::move(a.lease)); }
  void Do(ServerCount& a) { probe.Count(a.reason); }
  void Do(ServerLeaseExpired& a);
  void Do(ServerSent& a) { probe.bytes_out.Add(a.bytes); }

  absl::Time Now() const { return options.clock->Now(); }
  Transport& transport() { return *options.transport; }

  FetchNode::Options options;
  const std::string address;
  FetchProbe probe;
  BoundedQueue<Submission> queue{kMaxFetchSubmissions};
  std::atomic<size_t> fetches_out{0};  // submitted and not ended
  std::atomic<size_t> fetches_in{0};
  std::atomic<size_t> offers{0};

  FetchClient client;
  FetchServer server;
  uint64_t next_handle = 1;
  absl::flat_hash_map<uint64_t, std::function<void(FetchResult)>> callbacks;
  // The client core's lanes. The server core's lanes are the endpoints of peers that connected to us.
  absl::flat_hash_map<LaneId, EndpointId> endpoint_of;
  absl::flat_hash_map<EndpointId, LaneId> lane_of;
  std::deque<std::function<void()>> later;  // events that an action caused, taken up after its batch
};

}  // namespace tidepool
