#include "transport/inproc_transport.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/rng.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr std::string_view kScheme = "inproc:";

// One end of a link, as its node sees it.
struct End {
  uint64_t node = 0;
  EndpointId peer = 0;  // the other end
  bool closing = false;
  bool down = false;  // told to the handler, or the node closed it
};

// A bulk transfer. Its pieces read the sender's memory as they land, as a zero-copy transport does: a
// payload reused before `send_done` corrupts what arrives.
struct Bulk {
  EndpointId from = 0;
  EndpointId to = 0;
  std::string header;
  std::span<const std::byte> payload;
  std::string copy;                             // a duplicate outlives the sender's buffer
  std::function<void(absl::Status)> send_done;  // empty once run, and for duplicates
  BulkSink sink;
  bool receiving = false;  // `sink.done` is still to run
  bool corrupt = false;
  int pieces = 1;
  int next_piece = 0;
};

enum class What { kMessage, kAnnounce, kPiece, kSendDone, kDown, kClosed };

struct Event {
  What what;
  uint64_t node = 0;  // whose Progress handles it
  EndpointId endpoint = 0;
  std::string message;
  uint64_t bulk = 0;
  absl::Status status;
  std::function<void()> quiesced;
};

}  // namespace

struct InprocNetwork::State {
  State(const Clock* c, const SimFaults& f) : clock(c), faults(f), rng(f.seed) {}

  mutable std::mutex mu;
  std::condition_variable wake;
  const Clock* clock;
  SimFaults faults;
  Rng rng;
  uint64_t next_node = 1;
  EndpointId next_endpoint = 1;
  uint64_t next_bulk = 1;
  uint64_t next_seq = 1;
  std::set<uint64_t> alive;
  std::set<std::pair<uint64_t, uint64_t>> cuts;
  std::map<EndpointId, End> ends;
  std::map<uint64_t, Bulk> bulks;
  // Due time and order of scheduling; one queue, each node takes its own.
  std::map<std::pair<absl::Time, uint64_t>, Event> queue;

  absl::Duration Delay() {
    const absl::Duration width = faults.delay_max - faults.delay_min;
    if (width <= absl::ZeroDuration()) return faults.delay_min;
    return faults.delay_min + width * rng.Uniform();
  }
  void Schedule(absl::Duration after, Event event) {
    queue.emplace(std::make_pair(clock->Now() + after, next_seq++), std::move(event));
    wake.notify_all();
  }
  bool IsCut(uint64_t a, uint64_t b) const { return cuts.contains({std::min(a, b), std::max(a, b)}); }
  // Blocked by a cut link: stays in the queue.
  bool Held(const Event& event) const {
    if (event.what == What::kSendDone || event.what == What::kClosed) return false;
    auto end = ends.find(event.endpoint);
    if (end == ends.end()) return false;
    auto peer = ends.find(end->second.peer);
    return peer != ends.end() && IsCut(end->second.node, peer->second.node);
  }
  void FlipBit(char* data, size_t size) {
    if (size > 0) data[rng.Below(size)] ^= static_cast<char>(1 << rng.Below(8));
  }
  void SendFinished(Bulk& bulk, absl::Status status) {
    if (!bulk.send_done) return;
    auto end = ends.find(bulk.from);
    if (end == ends.end() || !alive.contains(end->second.node)) {
      bulk.send_done = nullptr;
      return;
    }
    Event event{.what = What::kSendDone, .node = end->second.node, .endpoint = bulk.from, .status = status};
    event.quiesced = [done = std::move(bulk.send_done), status] { done(status); };
    bulk.send_done = nullptr;
    Schedule(absl::ZeroDuration(), std::move(event));
  }
  // Tells the other end, unless it knows.
  void PeerDown(EndpointId endpoint, const char* why) {
    auto it = ends.find(endpoint);
    if (it == ends.end()) return;
    Schedule(Delay(), Event{.what = What::kDown,
                            .node = it->second.node,
                            .endpoint = endpoint,
                            .status = absl::UnavailableError(why)});
  }
};

namespace {

using State = InprocNetwork::State;

class InprocTransport final : public Transport {
 public:
  InprocTransport(std::shared_ptr<State> net, uint64_t node) : net_(std::move(net)), node_(node) {}
  ~InprocTransport() override;

  void SetHandler(TransportHandler* handler) override { handler_ = handler; }
  std::string Address() const override { return std::string(kScheme) + std::to_string(node_); }
  std::string_view Name() const override { return "inproc"; }
  absl::StatusOr<EndpointId> Connect(std::string_view address) override;
  absl::Status Send(EndpointId to, std::string_view message) override;
  absl::Status SendBulk(EndpointId to, std::string_view header, std::span<const std::byte> payload,
                        std::function<void(absl::Status)> done) override;
  void Close(EndpointId endpoint, std::function<void()> quiesced) override;
  int Progress() override;
  void Wait(int timeout_ms) override;
  void Wake() override;

 private:
  // The next due event of this node, or false. Called with the lock held.
  bool Take(Event& out);
  void Handle(Event event);
  void Announce(uint64_t id);
  void Land(uint64_t id);
  void FinishClose(Event event);
  absl::StatusOr<End*> Usable(EndpointId endpoint);

  std::shared_ptr<State> net_;
  const uint64_t node_;
  TransportHandler* handler_ = nullptr;
  bool woken_ = false;  // guarded by net_->mu
};

InprocTransport::~InprocTransport() {
  std::lock_guard lock(net_->mu);
  net_->alive.erase(node_);
  std::erase_if(net_->queue, [&](const auto& item) { return item.second.node == node_; });
  for (auto& [id, end] : net_->ends) {
    if (end.node == node_ && !end.down) {
      end.down = true;
      net_->PeerDown(end.peer, "peer closed its transport");
    }
  }
  // No callback of ours runs any more, and nothing writes to our memory or reads from it.
  for (auto it = net_->bulks.begin(); it != net_->bulks.end();) {
    Bulk& bulk = it->second;
    const bool ours_in = net_->ends[bulk.to].node == node_;
    const bool ours_out = net_->ends[bulk.from].node == node_;
    if (ours_out) {
      bulk.send_done = nullptr;
      if (bulk.copy.empty()) bulk.payload = {};
    }
    if (ours_in) {
      bulk.receiving = false;
      net_->SendFinished(bulk, absl::UnavailableError("peer is gone"));
    }
    // A receiver in mid-transfer keeps its entry (it has to hear of it when it closes), without the data.
    const bool wanted = !ours_in && (bulk.receiving || !bulk.copy.empty());
    it = wanted || (!ours_in && !ours_out) ? std::next(it) : net_->bulks.erase(it);
  }
}

absl::StatusOr<EndpointId> InprocTransport::Connect(std::string_view address) {
  uint64_t node = 0;
  if (!address.starts_with(kScheme) || address.size() == kScheme.size() || address.size() > 24) {
    return absl::InvalidArgumentError("transport address is not of the form inproc:N");
  }
  for (char c : address.substr(kScheme.size())) {
    if (c < '0' || c > '9')
      return absl::InvalidArgumentError("transport address is not of the form inproc:N");
    node = node * 10 + static_cast<uint64_t>(c - '0');
  }
  std::lock_guard lock(net_->mu);
  const EndpointId mine = net_->next_endpoint++;
  const EndpointId theirs = net_->next_endpoint++;
  net_->ends[mine] = End{.node = node_, .peer = theirs};
  net_->ends[theirs] = End{.node = node, .peer = mine};
  if (!net_->alive.contains(node)) net_->PeerDown(mine, "connection refused: no such node");
  return mine;
}

absl::StatusOr<End*> InprocTransport::Usable(EndpointId endpoint) {
  auto it = net_->ends.find(endpoint);
  if (it == net_->ends.end() || it->second.node != node_ || it->second.closing || it->second.down) {
    return absl::UnavailableError("the endpoint is down");
  }
  return &it->second;
}

absl::Status InprocTransport::Send(EndpointId to, std::string_view message) {
  if (message.size() > kMaxMessageBytes) {
    return absl::InvalidArgumentError("message of " + std::to_string(message.size()) +
                                      " bytes exceeds the limit of " + std::to_string(kMaxMessageBytes));
  }
  std::lock_guard lock(net_->mu);
  TP_ASSIGN_OR_RETURN(End * end, Usable(to));
  State& net = *net_;
  if (net.rng.Chance(net.faults.loss)) return absl::OkStatus();
  const int copies = net.rng.Chance(net.faults.duplicate) ? 2 : 1;
  for (int i = 0; i < copies; ++i) {
    Event event{.what = What::kMessage, .node = net.ends[end->peer].node, .endpoint = end->peer};
    event.message = std::string(message);
    if (net.rng.Chance(net.faults.corrupt)) net.FlipBit(event.message.data(), event.message.size());
    net.Schedule(net.Delay() * (i + 1), std::move(event));
  }
  return absl::OkStatus();
}

absl::Status InprocTransport::SendBulk(EndpointId to, std::string_view header,
                                       std::span<const std::byte> payload,
                                       std::function<void(absl::Status)> done) {
  if (header.size() > 512) return absl::InvalidArgumentError("bulk header exceeds 512 bytes");
  std::lock_guard lock(net_->mu);
  TP_ASSIGN_OR_RETURN(End * end, Usable(to));
  State& net = *net_;
  const bool lost = net.rng.Chance(net.faults.loss);
  const bool twice = !lost && net.rng.Chance(net.faults.duplicate);
  for (int i = 0; i < (twice ? 2 : 1); ++i) {
    const uint64_t id = net.next_bulk++;
    Bulk& bulk = net.bulks[id];
    bulk.from = to;
    bulk.to = end->peer;
    bulk.header = std::string(header);
    bulk.pieces = std::max(1, net.faults.bulk_pieces);
    bulk.corrupt = net.rng.Chance(net.faults.corrupt);
    if (i == 0) {
      bulk.payload = payload;
      bulk.send_done = std::move(done);
    } else {
      bulk.copy.assign(reinterpret_cast<const char*>(payload.data()), payload.size());
      bulk.payload = std::as_bytes(std::span(bulk.copy));
    }
    if (lost) {
      net.SendFinished(bulk, absl::OkStatus());
      net.bulks.erase(id);
      break;
    }
    net.Schedule(
        net.Delay() * (i + 1),
        Event{.what = What::kAnnounce, .node = net.ends[end->peer].node, .endpoint = end->peer, .bulk = id});
  }
  return absl::OkStatus();
}

void InprocTransport::Close(EndpointId endpoint, std::function<void()> quiesced) {
  std::lock_guard lock(net_->mu);
  Event event{.what = What::kClosed, .node = node_, .endpoint = endpoint};
  event.quiesced = std::move(quiesced);
  auto it = net_->ends.find(endpoint);
  const bool known = it != net_->ends.end() && it->second.node == node_ && !it->second.closing;
  if (!known) {
    event.endpoint = 0;
    net_->Schedule(absl::ZeroDuration(), std::move(event));
    return;
  }
  it->second.closing = true;
  net_->Schedule(net_->faults.close_max * net_->rng.Uniform(), std::move(event));
}

bool InprocTransport::Take(Event& out) {
  const absl::Time now = net_->clock->Now();
  for (auto it = net_->queue.begin(); it != net_->queue.end() && it->first.first <= now; ++it) {
    if (it->second.node != node_ || net_->Held(it->second)) continue;
    out = std::move(it->second);
    net_->queue.erase(it);
    return true;
  }
  return false;
}

int InprocTransport::Progress() {
  int handled = 0;
  for (; handled < 64; ++handled) {
    Event event;
    {
      std::lock_guard lock(net_->mu);
      if (!net_->alive.contains(node_) || !Take(event)) break;
    }
    Handle(std::move(event));
  }
  return handled;
}

// Runs without the lock: handlers call back into the transport.
void InprocTransport::Handle(Event event) {
  switch (event.what) {
    case What::kMessage: {
      {
        std::lock_guard lock(net_->mu);
        if (!Usable(event.endpoint).ok()) return;
      }
      handler_->OnMessage(event.endpoint, event.message);
      return;
    }
    case What::kAnnounce:
      return Announce(event.bulk);
    case What::kPiece:
      return Land(event.bulk);
    case What::kSendDone:
      return event.quiesced();
    case What::kDown: {
      {
        std::lock_guard lock(net_->mu);
        auto usable = Usable(event.endpoint);
        if (!usable.ok()) return;
        (*usable)->down = true;
      }
      handler_->OnEndpointDown(event.endpoint, event.status);
      return;
    }
    case What::kClosed:
      return FinishClose(std::move(event));
  }
}

void InprocTransport::Announce(uint64_t id) {
  EndpointId to;
  std::string header;
  size_t length;
  {
    std::lock_guard lock(net_->mu);
    auto it = net_->bulks.find(id);
    if (it == net_->bulks.end()) return;
    if (!Usable(it->second.to).ok()) {
      net_->SendFinished(it->second, absl::UnavailableError("peer closed the endpoint"));
      net_->bulks.erase(it);
      return;
    }
    to = it->second.to;
    header = it->second.header;
    length = it->second.payload.size();
  }
  BulkSink sink = handler_->OnBulk(to, header, length);
  TP_CHECK(sink.dst.empty() || sink.dst.size() == length);
  std::lock_guard lock(net_->mu);
  auto it = net_->bulks.find(id);
  if (it == net_->bulks.end() || (sink.dst.empty() && length > 0)) {
    // Dropped by the receiver (or the sender died meanwhile): complete at both ends.
    const bool gone = it == net_->bulks.end();
    if (!gone) {
      net_->SendFinished(it->second, absl::OkStatus());
      net_->bulks.erase(it);
    }
    if (sink.done) {
      absl::Status status = gone ? absl::UnavailableError("sender is gone") : absl::CancelledError("dropped");
      Event event{.what = What::kSendDone, .node = node_, .endpoint = to};
      event.quiesced = [done = std::move(sink.done), status] { done(status); };
      net_->Schedule(absl::ZeroDuration(), std::move(event));
    }
    return;
  }
  it->second.sink = std::move(sink);
  it->second.receiving = true;
  net_->Schedule(net_->Delay(), Event{.what = What::kPiece, .node = node_, .endpoint = to, .bulk = id});
}

void InprocTransport::Land(uint64_t id) {
  std::function<void(absl::Status)> done;
  {
    std::lock_guard lock(net_->mu);
    auto it = net_->bulks.find(id);
    if (it == net_->bulks.end()) return;
    Bulk& bulk = it->second;
    // An end whose peer is gone hears no more pieces; Close tells it that this one is cancelled.
    auto end = net_->ends.find(bulk.to);
    if (end == net_->ends.end() || bulk.payload.size() != bulk.sink.dst.size()) return;
    const size_t size = bulk.payload.size();
    const size_t begin = size * bulk.next_piece / bulk.pieces;
    const size_t stop = size * (bulk.next_piece + 1) / bulk.pieces;
    if (stop > begin) {
      std::memcpy(bulk.sink.dst.data() + begin, bulk.payload.data() + begin, stop - begin);
    }
    if (bulk.corrupt && bulk.next_piece == bulk.pieces - 1) {
      net_->FlipBit(reinterpret_cast<char*>(bulk.sink.dst.data()), size);
    }
    if (++bulk.next_piece < bulk.pieces) {
      net_->Schedule(net_->Delay(),
                     Event{.what = What::kPiece, .node = node_, .endpoint = bulk.to, .bulk = id});
      return;
    }
    done = std::move(bulk.sink.done);
    net_->SendFinished(bulk, absl::OkStatus());
    net_->bulks.erase(it);
  }
  if (done) done(absl::OkStatus());  // one of no bytes that is dropped has none
}

void InprocTransport::FinishClose(Event event) {
  std::vector<std::function<void()>> callbacks;
  if (event.endpoint != 0) {
    std::lock_guard lock(net_->mu);
    const EndpointId endpoint = event.endpoint;
    const absl::Status cancelled = absl::CancelledError("the endpoint was closed");
    for (auto it = net_->bulks.begin(); it != net_->bulks.end();) {
      Bulk& bulk = it->second;
      if (bulk.from == endpoint && bulk.send_done) {
        callbacks.push_back([done = std::move(bulk.send_done), cancelled] { done(cancelled); });
        bulk.send_done = nullptr;
        bulk.payload = {};
        // The receiver's half, if any, stays until it closes its own end.
        it = bulk.receiving ? std::next(it) : net_->bulks.erase(it);
      } else if (bulk.to == endpoint) {
        if (bulk.receiving && bulk.sink.done) {
          callbacks.push_back([done = std::move(bulk.sink.done), cancelled] { done(cancelled); });
        }
        // As measured with UCX: a sender may see success for what its receiver cancelled.
        net_->SendFinished(bulk, absl::OkStatus());
        it = net_->bulks.erase(it);
      } else {
        ++it;
      }
    }
    // Completions already scheduled for this endpoint come before `quiesced`.
    for (auto it = net_->queue.begin(); it != net_->queue.end();) {
      if (it->second.what == What::kSendDone && it->second.node == node_ && it->second.endpoint == endpoint) {
        callbacks.push_back(std::move(it->second.quiesced));
        it = net_->queue.erase(it);
      } else {
        ++it;
      }
    }
    End& end = net_->ends[endpoint];
    end.down = true;
    net_->PeerDown(end.peer, "peer closed the endpoint");
  }
  for (auto& callback : callbacks) callback();
  event.quiesced();
}

void InprocTransport::Wait(int timeout_ms) {
  std::unique_lock lock(net_->mu);
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  auto due = [&](absl::Time& next) {
    const absl::Time now = net_->clock->Now();
    for (const auto& [when, event] : net_->queue) {
      if (event.node != node_ || net_->Held(event)) continue;
      next = when.first;
      return when.first <= now;
    }
    next = absl::InfiniteFuture();
    return false;
  };
  absl::Time next;
  while (!woken_ && !due(next)) {
    auto limit = until;
    if (next != absl::InfiniteFuture()) {
      limit = std::min(
          limit, std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(next - net_->clock->Now()));
    }
    if (net_->wake.wait_until(lock, limit) == std::cv_status::timeout &&
        std::chrono::steady_clock::now() >= until) {
      break;
    }
  }
  woken_ = false;
}

void InprocTransport::Wake() {
  {
    std::lock_guard lock(net_->mu);
    woken_ = true;
  }
  net_->wake.notify_all();
}

}  // namespace

InprocNetwork::InprocNetwork(const Clock* clock, const SimFaults& faults)
    : state_(std::make_shared<State>(clock, faults)) {}
InprocNetwork::~InprocNetwork() = default;

std::unique_ptr<Transport> InprocNetwork::NewTransport() {
  std::lock_guard lock(state_->mu);
  const uint64_t node = state_->next_node++;
  state_->alive.insert(node);
  return std::make_unique<InprocTransport>(state_, node);
}

void InprocNetwork::SetFaults(const SimFaults& faults) {
  std::lock_guard lock(state_->mu);
  state_->faults = faults;
}

void InprocNetwork::Cut(const std::string& address_a, const std::string& address_b, bool cut) {
  const uint64_t a = std::stoull(address_a.substr(kScheme.size()));
  const uint64_t b = std::stoull(address_b.substr(kScheme.size()));
  const std::pair<uint64_t, uint64_t> link{std::min(a, b), std::max(a, b)};
  {
    std::lock_guard lock(state_->mu);
    if (cut) {
      state_->cuts.insert(link);
    } else {
      state_->cuts.erase(link);
    }
  }
  state_->wake.notify_all();
}

void InprocNetwork::Crash(const std::string& address) {
  const uint64_t node = std::stoull(address.substr(kScheme.size()));
  std::lock_guard lock(state_->mu);
  state_->alive.erase(node);
  for (auto& [id, end] : state_->ends) {
    if (end.node != node || end.down) continue;
    end.down = true;
    state_->PeerDown(end.peer, "connection reset by peer");
  }
  for (auto it = state_->bulks.begin(); it != state_->bulks.end();) {
    Bulk& bulk = it->second;
    // Its memory is gone: nothing writes to it any more, and nothing reads from it. The other end still
    // has its half of the transfer, and learns of its end by closing.
    if (state_->ends[bulk.to].node == node) bulk.receiving = false;
    if (state_->ends[bulk.from].node == node) {
      bulk.send_done = nullptr;
      if (bulk.copy.empty()) bulk.payload = {};
    }
    const bool wanted = bulk.receiving || bulk.send_done || !bulk.copy.empty();
    it = wanted ? std::next(it) : state_->bulks.erase(it);
  }
}

absl::Time InprocNetwork::NextEvent() const {
  std::lock_guard lock(state_->mu);
  for (const auto& [when, event] : state_->queue) {
    if (!state_->Held(event) && state_->alive.contains(event.node)) return when.first;
  }
  return absl::InfiniteFuture();
}

bool InprocNetwork::MayWrite(const std::byte* begin, size_t size) const {
  std::lock_guard lock(state_->mu);
  for (const auto& [id, bulk] : state_->bulks) {
    if (!bulk.receiving || bulk.sink.dst.empty()) continue;
    if (!state_->alive.contains(state_->ends[bulk.to].node)) continue;
    if (bulk.sink.dst.data() < begin + size && begin < bulk.sink.dst.data() + bulk.sink.dst.size())
      return true;
  }
  return false;
}

}  // namespace tidepool
