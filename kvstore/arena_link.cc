#include "kvstore/arena_link.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "base/log.h"
#include "base/status.h"
#include "kvstore/arena_client.h"
#include "kvstore/arena_server.h"

namespace tidepool {
namespace {

struct ArenaLinkProbe {
  explicit ArenaLinkProbe(MetricRegistry& m)
      : in_place(Bytes(m, "in_place")),
        copied(Bytes(m, "copied")),
        duration(m.AddHistogram("tidepool_kv_transfer_duration_seconds",
                                "Time from a fetch's submission to its verified end", LatencyBuckets(),
                                {{"transport", "arena"}})) {}
  static Counter& Bytes(MetricRegistry& m, const char* how) {
    return m.AddCounter("tidepool_kv_arena_bytes_total",
                        "KV bytes had from other processes of this host: left where they lie, or copied",
                        {{"how", how}});
  }
  Counter& in_place;
  Counter& copied;
  Histogram& duration;
};

// The first `tokens` tokens of an unsealed block; returns the bytes.
size_t CopyTokens(const BlockLayout& l, uint32_t tokens, std::span<const std::byte> from,
                  std::span<std::byte> to) {
  const size_t bytes = size_t{tokens} * l.head_dim * DTypeBytes(l.dtype);
  for (uint32_t layer = 0; layer < l.layers; ++layer) {
    for (bool v : {false, true}) {
      for (uint32_t head = 0; head < l.kv_heads; ++head) {
        const size_t at = l.Offset(layer, v, head, 0);
        std::memcpy(to.data() + at, from.data() + at, bytes);
      }
    }
  }
  return bytes * l.layers * 2 * l.kv_heads;
}

}  // namespace

struct ArenaLink::Impl {
  explicit Impl(Options o)
      : options(std::move(o)),
        probe(*options.metrics),
        client({.worker_id = options.worker_id,
                .fingerprint = options.fingerprint,
                .layout = options.pool->layout(),
                .clock = options.clock,
                .metrics = options.metrics}) {}

  void Deliver(FetchSpec spec, ArenaClient::Taken taken, absl::Time started, const Done& done);

  // A fetch that waits for the peer, until `done` ran or `otherwise` has it.
  struct Flight {
    std::string request;
    uint32_t attempt;
    bool aborted = false;  // guarded by mu
  };
  // Whether it was aborted.
  bool Aborted(const Flight& flight) {
    std::lock_guard lock(mu);
    return flight.aborted;
  }
  bool Land(const std::shared_ptr<Flight>& flight) {
    std::lock_guard lock(mu);
    flights.erase(flight);
    return flight->aborted;
  }

  const Options options;
  ArenaLinkProbe probe;
  std::mutex mu;
  absl::flat_hash_set<std::shared_ptr<Flight>> flights;  // guarded by mu
  std::unique_ptr<ArenaServer> server;
  ArenaClient client;
};

// Puts what was taken where the spec wants it.
void ArenaLink::Impl::Deliver(FetchSpec spec, ArenaClient::Taken taken, absl::Time started,
                              const Done& done) {
  const BlockLayout& layout = options.pool->layout();
  const size_t n = spec.slots.size();
  const size_t sealed = spec.tail_tokens > 0 ? n - 1 : n;
  const bool stay = spec.in_place && !taken.short_of_room && sealed > 0;
  FetchResult result;
  result.transport = "arena";
  result.slots = std::move(spec.slots);
  result.status = CheckFetchSlots(std::span(result.slots).subspan(stay ? sealed : 0), *options.pool);
  result.filled.assign(n, result.status.ok());
  if (!result.status.ok()) {
    taken.blocks = BlockRun();
    return done(std::move(result));
  }
  uint64_t copied = 0;
  if (sealed < n) {
    copied += CopyTokens(layout, std::min(spec.tail_tokens, layout.block_tokens), taken.blocks.data(sealed),
                         result.slots[sealed].data());
  }
  if (stay) {
    taken.blocks.Shorten(sealed);
    result.in_place = std::move(taken.blocks);
  } else {
    for (size_t i = 0; i < sealed; ++i)
      std::memcpy(result.slots[i].data().data(), taken.blocks.data(i).data(), layout.block_bytes());
    copied += sealed * layout.block_bytes();
    // The peer waits for it.
    taken.blocks = BlockRun();
  }
  result.bytes = n * layout.block_bytes();
  result.elapsed = options.clock->Now() - started;
  const double seconds = absl::ToDoubleSeconds(result.elapsed);
  done(std::move(result));
  probe.in_place.Add(stay ? sealed * layout.block_bytes() : 0);
  probe.copied.Add(copied);
  probe.duration.Observe(seconds);
}

ArenaLink::ArenaLink(Options options) : impl_(std::make_unique<Impl>(std::move(options))) {
  const Options& o = impl_->options;
  auto server = ArenaServer::Start({.pool = o.pool,
                                    .offers = o.offers,
                                    .boot_id = o.boot_id,
                                    .fingerprint = o.fingerprint,
                                    .clock = o.clock,
                                    .metrics = o.metrics});
  if (!server.ok()) {
    spdlog::warn("kv arena: not shared with processes of this host: {}",
                 std::string(server.status().message()));
    return;
  }
  impl_->server = *std::move(server);
  address_ = impl_->server->address();
}

ArenaLink::~ArenaLink() = default;

bool ArenaLink::Fetch(FetchSpec& spec, Done& done) {
  const ArenaClient::Peer peer{spec.peer.arena, spec.peer.boot_id};
  if (peer.arena.empty() || spec.keys.empty()) return false;
  const absl::Time started = impl_->options.clock->Now();
  // First: for a peer that is mapped, whether it can be reached need not be asked.
  if (auto taken = impl_->client.TryTake(peer, spec.request_id, spec.keys)) {
    impl_->Deliver(std::move(spec), *std::move(taken), started, done);
    return true;
  }
  if (!impl_->client.Reaches(peer)) return false;
  const std::string request = spec.request_id;
  const absl::Time deadline = spec.deadline;
  std::vector<BlockKey> keys = spec.keys;
  // A std::function is copyable, leases are not.
  auto shared = std::make_shared<FetchSpec>(std::move(spec));
  auto flight = std::make_shared<Impl::Flight>(Impl::Flight{request, shared->attempt});
  {
    std::lock_guard lock(impl_->mu);
    impl_->flights.insert(flight);
  }
  impl_->client.Take(
      peer, request, shared->attempt, std::move(keys), deadline,
      [impl = impl_.get(), shared, flight, started, done = std::move(done)](ArenaClient::Taken taken) {
        if (taken.status.ok() && !taken.blocks.empty()) {
          impl->Land(flight);
          return impl->Deliver(std::move(*shared), std::move(taken), started, done);
        }
        if (impl->Aborted(*flight)) taken.status = absl::CancelledError("the request was aborted");
        if (absl::IsCancelled(taken.status) || absl::IsDeadlineExceeded(taken.status)) {
          impl->Land(flight);
          FetchResult result;
          result.status = taken.status;
          result.slots = std::move(shared->slots);
          result.filled.assign(result.slots.size(), false);
          result.elapsed = impl->options.clock->Now() - started;
          return done(std::move(result));
        }
        // The peer's disk may have what its memory has not, and a broken link is not a broken
        // peer.
        impl->options.otherwise(std::move(*shared), done);
        // An Abort from here on comes after the fetch, one before it must be said again.
        if (impl->Land(flight)) impl->options.abort_otherwise(flight->request, flight->attempt);
      });
  return true;
}

void ArenaLink::Abort(const std::string& request_id, uint32_t attempt) {
  {
    std::lock_guard lock(impl_->mu);
    for (const auto& flight : impl_->flights) {
      if (flight->request == request_id && flight->attempt == attempt) flight->aborted = true;
    }
  }
  impl_->client.Cancel(request_id, attempt);
}

bool ArenaLink::SendRelease(const PeerAddress& peer, const std::string& request_id) {
  return !peer.arena.empty() && impl_->client.Done({peer.arena, peer.boot_id}, request_id);
}

size_t ArenaLink::active() const { return impl_->client.active(); }

}  // namespace tidepool
