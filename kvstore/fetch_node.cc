#include "kvstore/fetch_node.h"

#include <algorithm>
#include <thread>
#include <utility>

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

absl::Status CheckSpec(const FetchSpec& spec, const BlockLayout& layout) {
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
  for (const BlockLease& slot : spec.slots) {
    if (slot.empty() || slot.data().size() != layout.block_bytes()) {
      return absl::InvalidArgumentError("fetch: a slot is empty or of another pool's size");
    }
  }
  return absl::OkStatus();
}

}  // namespace

struct FetchNode::Impl : FetchDriver {
  using FetchDriver::FetchDriver;

  void Loop();
  void Sleep();
  void Shutdown();

  std::atomic<bool> stop{false};
  std::thread thread;
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
  auto impl = std::make_unique<Impl>(std::move(options));
  impl->thread = std::thread([raw = impl.get()] { raw->Loop(); });
  return std::unique_ptr<FetchNode>(new FetchNode(std::move(impl)));
}

FetchNode::FetchNode(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

FetchNode::~FetchNode() {
  impl_->stop.store(true);
  impl_->transport().Wake();
  impl_->thread.join();
  // Before the cores: whatever it still holds of theirs ends here.
  impl_->options.transport.reset();
}

const std::string& FetchNode::address() const { return impl_->address; }
std::string_view FetchNode::transport_name() const { return impl_->options.transport->Name(); }

void FetchNode::Fetch(FetchSpec spec, std::function<void(FetchResult)> done) {
  auto refuse = [&](absl::Status status) {
    FetchResult result;
    result.status = std::move(status);
    result.filled.assign(spec.slots.size(), false);
    result.slots = std::move(spec.slots);
    done(std::move(result));
  };
  if (absl::Status s = CheckSpec(spec, impl_->options.pool->layout()); !s.ok()) return refuse(std::move(s));
  if (impl_->fetches_out.fetch_add(1) >= impl_->options.max_fetches) {
    impl_->fetches_out.fetch_sub(1);
    impl_->probe.Count(FetchReason::kBusy);
    return refuse(absl::ResourceExhaustedError("fetch: " + std::to_string(impl_->options.max_fetches) +
                                               " fetches are under way, the limit (max_fetches)"));
  }
  Submission submission = FetchSubmission{std::move(spec), std::move(done)};
  if (impl_->queue.TryPush(submission)) return impl_->transport().Wake();
  impl_->fetches_out.fetch_sub(1);
  impl_->probe.Count(FetchReason::kBusy);
  auto& back = std::get<FetchSubmission>(submission);
  spec = std::move(back.spec);
  done = std::move(back.done);
  refuse(absl::ResourceExhaustedError("fetch: the node's queue is full"));
}

void FetchNode::Abort(const std::string& request_id, uint32_t attempt) {
  // Should the queue be full, the fetch's deadline ends it.
  impl_->Submit(ClientCancel{request_id, attempt});
}

void FetchNode::Offer(const std::string& request_id, const BlockKey& key, BlockLease lease) {
  if (!impl_->Submit(ServerOffer{request_id, key, std::move(lease)})) impl_->probe.offers_dropped.Add();
}

void FetchNode::ReleaseOffers(const std::string& request_id) {
  // Should the queue be full, the offers' lease ends them.
  impl_->Submit(ServerReleaseOffers{request_id});
}

void FetchNode::SendRelease(const PeerAddress& peer, const std::string& request_id) {
  if (request_id.size() > kMaxIdBytes || peer.boot_id.size() > kMaxBootIdBytes) return;  // offered to nobody
  impl_->Submit(ClientRelease{peer, request_id});
}

size_t FetchNode::offers() const { return impl_->offers.load(); }
size_t FetchNode::active_fetches() const { return impl_->fetches_out.load() + impl_->fetches_in.load(); }

}  // namespace tidepool
