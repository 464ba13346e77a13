#include "kvstore/fetch_node.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "kvstore/arena_link.h"
#include "kvstore/fetch_codec.h"
#include "kvstore/fetch_driver.h"

namespace tidepool {
namespace {

// While a fetch is under way the node polls for so long after the last event before it sleeps: a wake-up
// through the kernel costs about as much as a small block takes on the wire.
constexpr absl::Duration kSpin = absl::Microseconds(50);
constexpr absl::Duration kMaxSleep = absl::Seconds(60);
// The shutdown's limit in the process's own time, above the cores' close_grace.
constexpr absl::Duration kShutdownLimit = absl::Seconds(6);

absl::Status CheckSpec(const FetchSpec& spec) {
  if (spec.request_id.empty() || spec.request_id.size() > kMaxIdBytes) {
    return absl::InvalidArgumentError("fetch: request_id must have 1 to 128 bytes");
  }
  if (spec.peer.boot_id.empty() || spec.peer.boot_id.size() > kMaxBootIdBytes) {
    return absl::InvalidArgumentError("fetch: peer.boot_id must have 1 to 64 bytes");
  }
  if (spec.keys.size() != spec.slots.size()) {
    return absl::InvalidArgumentError("fetch: " + std::to_string(spec.keys.size()) + " keys but " +
                                      std::to_string(spec.slots.size()) + " slots");
  }
  if (spec.keys.size() > kMaxFetchKeys) {
    return absl::InvalidArgumentError("fetch: " + std::to_string(spec.keys.size()) +
                                      " keys exceed the limit of 4096; split the fetch into parts");
  }
  return absl::OkStatus();
}

void Refuse(FetchSpec& spec, const std::function<void(FetchResult)>& done, absl::Status status) {
  FetchResult result;
  result.status = std::move(status);
  result.filled.assign(spec.slots.size(), false);
  result.slots = std::move(spec.slots);
  done(std::move(result));
}

}  // namespace

absl::Status CheckFetchSlots(std::span<const BlockLease> slots, const BlockPool& pool) {
  for (const BlockLease& slot : slots) {
    if (slot.owner() != &pool) return absl::InvalidArgumentError("fetch: a slot is empty or of another pool");
  }
  return absl::OkStatus();
}

struct FetchNode::Impl : FetchDriver {
  using FetchDriver::FetchDriver;

  void Loop();
  void Sleep();
  void Shutdown();
  void FetchByTransport(FetchSpec spec, std::function<void(FetchResult)> done);

  std::atomic<bool> stop{false};
  std::thread thread;
  std::unique_ptr<ArenaLink> link;  // null: nothing is shared with processes of this host
  const std::string no_arena;
};

void FetchNode::Impl::Sleep() {
  const absl::Duration left = std::clamp(next_timer() - Now(), absl::ZeroDuration(), kMaxSleep);
  // Up to the next millisecond: waking early would spin until the timer is due.
  transport().Wait(static_cast<int>(absl::ToInt64Milliseconds(left + absl::Nanoseconds(999999))));
}

void FetchNode::Impl::Loop() {
  absl::Time last_event = Now();
  absl::Time last_publish = last_event;
  while (!stop.load(std::memory_order_relaxed)) {
    const int events = Poll();
    const absl::Time now = Now();
    if (events > 0) {
      last_event = now;
      if (now - last_publish > absl::Milliseconds(1)) {
        Publish();
        last_publish = now;
      }
      continue;
    }
    if (client.active() + server.active() > 0 && now - last_event < kSpin) continue;
    Publish();
    last_publish = now;
    Sleep();
  }
  Shutdown();
}

void FetchNode::Impl::Shutdown() {
  BeginShutdown();
  const absl::Time limit = Clock::Real().Now() + kShutdownLimit;
  while (!Quiet() && Clock::Real().Now() < limit) {
    if (Poll() == 0) transport().Wait(10);
  }
  ForceShutdown();
}

absl::StatusOr<std::unique_ptr<FetchNode>> FetchNode::Start(Options options) {
  if (options.pool == nullptr || options.transport == nullptr || options.metrics == nullptr) {
    return absl::InvalidArgumentError("fetch node: pool, transport and metrics are required");
  }
  if (options.worker_id.empty() || options.worker_id.size() > kMaxIdBytes || options.boot_id.empty() ||
      options.boot_id.size() > kMaxBootIdBytes || options.fingerprint.size() > kMaxIdBytes) {
    return absl::InvalidArgumentError(
        "fetch node: worker_id must have 1 to 128 bytes, boot_id 1 to 64, fingerprint at most 128");
  }
  const FetchFlow& flow = options.flow;
  if (options.lanes == 0 || options.lanes > 64 || flow.window_bytes == 0 || flow.unit_bytes == 0 ||
      flow.quantum == 0 || flow.max_sends == 0 || flow.max_loads == 0 || flow.batch_bytes > kMaxBatchBytes) {
    return absl::InvalidArgumentError(
        "fetch node: lanes must be 1 to 64, flow.batch_bytes at most 1 MiB, and of the rest of flow nothing "
        "0");
  }
  const SlotArena& arena = options.pool->arena();
  if (options.share_arena && arena.fd() >= 0 && arena.bytes() > 0) {
    options.transport->ShareMemory(arena.fd(), {arena.slot(0).data(), arena.bytes()});
  }
  auto impl = std::make_unique<Impl>(std::move(options));
  if (impl->options.share_arena) {
    const Options& o = impl->options;
    impl->link = std::make_unique<ArenaLink>(ArenaLink::Options{
        .worker_id = o.worker_id,
        .boot_id = o.boot_id,
        .fingerprint = o.fingerprint,
        .pool = o.pool,
        .offers = impl->offer_table,
        .clock = o.clock,
        .metrics = o.metrics,
        .otherwise = [raw = impl.get()](
                         FetchSpec spec,
                         ArenaLink::Done done) { raw->FetchByTransport(std::move(spec), std::move(done)); },
        .abort_otherwise =
            [raw = impl.get()](const std::string& request, uint32_t attempt) {
              raw->Submit(ClientCancel{request, attempt});
            }});
  }
  impl->thread = std::thread([raw = impl.get()] { raw->Loop(); });
  return std::unique_ptr<FetchNode>(new FetchNode(std::move(impl)));
}

FetchNode::FetchNode(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

FetchNode::~FetchNode() {
  impl_->link.reset();
  impl_->stop.store(true);
  impl_->transport().Wake();
  impl_->thread.join();
  impl_->CloseMailbox();
  // Before the cores: whatever it still holds of theirs ends here.
  impl_->options.transport.reset();
}

const std::string& FetchNode::address() const { return impl_->address; }
const std::string& FetchNode::arena_address() const {
  return impl_->link != nullptr ? impl_->link->address() : impl_->no_arena;
}
std::string_view FetchNode::transport_name() const { return impl_->options.transport->Name(); }

void FetchNode::Fetch(FetchSpec spec, std::function<void(FetchResult)> done) {
  if (absl::Status s = CheckSpec(spec); !s.ok()) return Refuse(spec, done, std::move(s));
  if (impl_->link != nullptr && impl_->link->Fetch(spec, done)) return;
  impl_->FetchByTransport(std::move(spec), std::move(done));
}

void FetchNode::Impl::FetchByTransport(FetchSpec spec, std::function<void(FetchResult)> done) {
  if (absl::Status s = CheckFetchSlots(spec.slots, *options.pool); !s.ok())
    return Refuse(spec, done, std::move(s));
  if (fetches_out.fetch_add(1) >= options.max_fetches) {
    fetches_out.fetch_sub(1);
    probe.Count(FetchReason::kBusy);
    return Refuse(spec, done,
                  absl::ResourceExhaustedError("fetch: " + std::to_string(options.max_fetches) +
                                               " fetches are under way, the limit (max_fetches)"));
  }
  Submission submission = FetchSubmission{std::move(spec), std::move(done)};
  if (queue.TryPush(submission)) return transport().Wake();
  fetches_out.fetch_sub(1);
  probe.Count(FetchReason::kBusy);
  auto& back = std::get<FetchSubmission>(submission);
  Refuse(back.spec, back.done, absl::ResourceExhaustedError("fetch: the node's queue is full"));
}

void FetchNode::Abort(const std::string& request_id, uint32_t attempt) {
  if (impl_->link != nullptr) impl_->link->Abort(request_id, attempt);
  // Should the queue be full, the fetch's deadline ends it.
  impl_->Submit(ClientCancel{request_id, attempt});
}

void FetchNode::Offer(const std::string& request_id, const BlockKey& key, BlockLease lease) {
  impl_->Offer(request_id, key, std::move(lease), impl_->options.pool->layout().layers);
}

void FetchNode::Offer(const std::string& request_id, const BlockKey& key, BlockLease lease,
                      uint32_t layers_ready) {
  impl_->Offer(request_id, key, std::move(lease), layers_ready);
}

void FetchNode::AdvanceOffer(const std::string& request_id, uint32_t layers_ready) {
  impl_->AdvanceOffer(request_id, {}, layers_ready);
}

void FetchNode::AdvanceOffer(const std::string& request_id, std::span<const BlockKey> keys,
                             uint32_t layers_ready) {
  if (!keys.empty()) impl_->AdvanceOffer(request_id, keys, layers_ready);
}

void FetchNode::RevokeOffers(const std::string& request_id) { impl_->RevokeOffers(request_id); }

void FetchNode::ReleaseOffers(const std::string& request_id) { impl_->ReleaseOffers(request_id); }

void FetchNode::SendRelease(const PeerAddress& peer, const std::string& request_id) {
  if (request_id.size() > kMaxIdBytes || peer.boot_id.size() > kMaxBootIdBytes) return;  // offered to nobody
  if (impl_->link != nullptr && impl_->link->SendRelease(peer, request_id)) return;
  impl_->Submit(ClientRelease{peer, request_id});
}

size_t FetchNode::offers() const { return impl_->offer_table->size(); }
size_t FetchNode::active_fetches() const {
  return impl_->fetches_out.load() + impl_->fetches_in.load() +
         (impl_->link != nullptr ? impl_->link->active() : 0);
}

}  // namespace tidepool
