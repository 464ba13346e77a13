#include "kvstore/arena_client.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/shared_memory.h"
#include "base/status.h"
#include "kvstore/arena_codec.h"
#include "kvstore/arena_directory.h"
#include "kvstore/arena_server.h"

namespace tidepool {
namespace {

constexpr absl::Duration kResend = absl::Milliseconds(1);  // where a peer's socket buffer is full
constexpr size_t kPacketsPerTurn = 64;
// Messages that found the socket full. Beyond it, the peer's offer lease does what a DONE would have done,
// and a RELEASE is never lost (it is kept as an id).
constexpr size_t kUnsentMax = 1024;

std::string Errno() { return std::generic_category().message(errno); }

struct ArenaClientProbe {
  explicit ArenaClientProbe(MetricRegistry& m)
      : claimed(Takes(m, "claim")),
        granted(Takes(m, "grant")),
        failed(Takes(m, "failed")),
        mapped(m.AddGauge("tidepool_kv_arena_peers",
                          "Other processes of this host whose arena is mapped here")) {}
  static Counter& Takes(MetricRegistry& m, const char* how) {
    return m.AddCounter(
        "tidepool_kv_arena_takes_total",
        "Times that blocks were taken from a process of this host: by a claim on its offers, by a "
        "grant that it was asked for, or not at all",
        {{"how", how}});
  }
  Counter& claimed;
  Counter& granted;
  Counter& failed;
  Gauge& mapped;
};

class Run;

// What is mapped of one peer, and the connection whose end tells it that nobody reads any more: both live
// until the last lease has gone.
struct Mapping {
  enum class Sent {
    kYes,
    kFull,    // or no memory for it: later
    kGone,    // the peer's end is closed
    kFailed,  // it will not do, now or later
  };
  Sent Send(const std::string& packet) {
    if (send(fd.get(), packet.data(), packet.size(), MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return Sent::kYes;
    switch (errno) {
      case EAGAIN:
      case EINTR:
      case ENOBUFS:
      case ENOMEM:
        return Sent::kFull;
      case EPIPE:
      case ECONNRESET:
        return Sent::kGone;
      default:
        return Sent::kFailed;
    }
  }
  // Tells of all that was let go, or has the client's thread do it. Holds mu.
  void SendReleases() {
    if (!TrySendReleases()) {
      const uint64_t one = 1;
      [[maybe_unused]] const ssize_t n = write(wake->get(), &one, sizeof one);
    }
  }
  // False: something is still to be told. Holds mu.
  bool TrySendReleases() {
    while (!released.empty() || look) {
      ArenaRelease packet;
      packet.ids.assign(released.begin(), released.begin() + std::min(released.size(), kMaxArenaReleases));
      const Sent sent = Send(EncodeArenaPacket(packet));
      // One that is gone needs no telling.
      if (sent != Sent::kYes && sent != Sent::kGone) return false;
      released.erase(released.begin(), released.begin() + packet.ids.size());
      look = false;
    }
    return true;
  }
  void Let(Run* run);

  std::shared_ptr<const FileDescriptor> wake;  // the client's; an eventfd
  // In the order of destruction, backwards: unmapped first, then the connection is closed.
  FileDescriptor fd;
  SharedMemory arena, directory_memory, claims_memory;
  size_t stride = 0, slot_bytes = 0;
  uint32_t slots = 0;
  std::atomic<uint64_t>* held = nullptr;  // how many claims the owner waits for

  std::mutex mu;  // guards what follows
  std::optional<DirectoryReader> directory;
  absl::flat_hash_map<uint32_t, Run*> runs;  // by directory entry: claims that are held
  std::vector<uint64_t> released;            // grants, not told yet
  bool look = false;                         // claims that the owner waits for, not told yet
  std::vector<std::string> unsent;
};

// Run: what was taken by one claim or grant; let go of when the last lease on it is dropped, each of which
// stands for some of its blocks or all (BlockRun).
class Run final : public RunOwner {
 public:
  Run(std::shared_ptr<Mapping> m, DirectoryReader::Claim claim) : mapping_(std::move(m)), claim_(claim) {}
  Run(std::shared_ptr<Mapping> m, uint64_t grant) : mapping_(std::move(m)), grant_(grant) {}

  std::span<const std::byte> SlotBytes(uint32_t slot) const override {
    return {mapping_->arena.data() + slot * mapping_->stride, mapping_->slot_bytes};
  }
  void Drop() override {
    size_t n = leases.load(std::memory_order_relaxed);
    while (n > 1) {
      if (leases.compare_exchange_weak(n, n - 1, std::memory_order_release, std::memory_order_relaxed))
        return;
    }
    // The last one, perhaps: only under the lock does the number become zero, so that a claim that is still
    // held can be given further leases.
    const std::shared_ptr<Mapping> mapping = mapping_;
    mapping->Let(this);
  }
  std::atomic<size_t> leases{0};
  uint32_t hint = 0;  // guarded by the mapping's mu
  const std::optional<DirectoryReader::Claim>& claim() const { return claim_; }
  uint64_t grant() const { return grant_; }

 private:
  const std::shared_ptr<Mapping> mapping_;
  const std::optional<DirectoryReader::Claim> claim_;
  const uint64_t grant_ = 0;
};

void Mapping::Let(Run* run) {
  {
    std::lock_guard lock(mu);
    if (run->leases.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    if (run->claim()) {
      runs.erase(run->claim()->entry);
      directory->Drop(*run->claim());
      // After the claim: the owner that retires the entry looks at the claim after it has raised this.
      look = look || held->load(std::memory_order_seq_cst) > 0;
    } else {
      released.push_back(run->grant());
    }
    SendReleases();
  }
  delete run;
}

struct PeerState {
  enum State { kConnecting, kReady, kFailed } state = kConnecting;
  ArenaClient::Peer peer;
  FileDescriptor fd;  // while connecting
  absl::Time until;   // connecting: given up; failed: tried again
  std::shared_ptr<Mapping> mapping;
};

struct Pending {
  std::shared_ptr<PeerState> peer;
  std::string request;
  uint32_t attempt;
  std::vector<BlockKey> keys;
  absl::Time deadline;
  std::function<void(ArenaClient::Taken)> done;
  bool asked = false;
};

}  // namespace

struct ArenaClient::Impl {
  explicit Impl(Options o) : options(std::move(o)), probe(*options.metrics) {}

  // Holds mu. Null: too many peers.
  std::shared_ptr<PeerState> PeerFor(const Peer& peer);
  std::shared_ptr<Mapping> Mapped(const Peer& peer) const;
  std::optional<Taken> TryTake(const std::shared_ptr<Mapping>& m, const std::string& request,
                               std::span<const BlockKey> keys);
  void Wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(wake->get(), &one, sizeof one);
  }

  // --- the client's thread ---
  void Loop();
  void Connect(PeerState& p);
  void Fail(PeerState& p, const absl::Status& why);
  void Readable(const std::shared_ptr<PeerState>& p);
  absl::Status Receive(const std::shared_ptr<PeerState>& p, bool& more);
  absl::StatusOr<std::shared_ptr<Mapping>> Map(PeerState& p, const ArenaWelcome& w,
                                               std::array<FileDescriptor, 3>& fds);
  void OnGrant(const std::shared_ptr<Mapping>& m, ArenaGrant& g);
  void Ask();
  void Finish(std::map<uint64_t, Pending>::iterator it, Taken taken);  // holds mu
  void RunFinished();
  absl::Time Tick();

  const Options options;
  ArenaClientProbe probe;
  const std::string machine = ArenaAddress::ThisMachine();
  FileDescriptor epoll{epoll_create1(EPOLL_CLOEXEC)};
  const std::shared_ptr<const FileDescriptor> wake =
      std::make_shared<const FileDescriptor>(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  std::thread thread;
  std::atomic<bool> stop{false};
  std::vector<std::byte> buffer;

  mutable std::mutex mu;  // guards what follows; taken before a mapping's
  absl::flat_hash_map<std::string, std::shared_ptr<PeerState>> peers;  // by arena address
  std::map<uint64_t, Pending> pending;                                 // by id, hence by age
  std::vector<std::pair<std::function<void(Taken)>, Taken>> finished;
  uint64_t next_id = 1;
};

ArenaClient::ArenaClient(Options options) : impl_(std::make_unique<Impl>(std::move(options))) {
  TP_CHECK(impl_->epoll.get() >= 0 && impl_->wake->get() >= 0);
  impl_->buffer.resize(kMaxArenaPacket);
  epoll_event event = {.events = EPOLLIN, .data = {.fd = impl_->wake->get()}};
  TP_CHECK(epoll_ctl(impl_->epoll.get(), EPOLL_CTL_ADD, impl_->wake->get(), &event) == 0);
  impl_->thread = std::thread([raw = impl_.get()] { raw->Loop(); });
}

ArenaClient::~ArenaClient() {
  impl_->stop.store(true);
  impl_->Wake();
  impl_->thread.join();
}

std::shared_ptr<PeerState> ArenaClient::Impl::PeerFor(const Peer& peer) {
  const auto it = peers.find(peer.arena);
  if (it != peers.end()) return it->second;
  if (peers.size() >= options.max_peers) {
    // Those that failed are kept only to be left alone for a while.
    absl::erase_if(peers, [](const auto& item) { return item.second->state == PeerState::kFailed; });
    if (peers.size() >= options.max_peers) return nullptr;
  }
  auto p = std::make_shared<PeerState>();
  p->peer = peer;
  p->until = options.clock->Now() + options.hello_timeout;
  return peers[peer.arena] = std::move(p);
}

bool ArenaClient::Reaches(const Peer& peer) const {
  ArenaAddress address;
  if (impl_->machine.empty() || !ArenaAddress::Parse(peer.arena, address) ||
      address.machine != impl_->machine)
    return false;
  std::lock_guard lock(impl_->mu);
  const auto it = impl_->peers.find(peer.arena);
  if (it == impl_->peers.end()) return true;
  const PeerState& p = *it->second;
  if (p.peer.boot != peer.boot) return false;
  return p.state != PeerState::kFailed || impl_->options.clock->Now() >= p.until;
}

std::shared_ptr<Mapping> ArenaClient::Impl::Mapped(const Peer& peer) const {
  std::lock_guard lock(mu);
  const auto it = peers.find(peer.arena);
  if (it == peers.end() || it->second->state != PeerState::kReady || it->second->peer.boot != peer.boot)
    return nullptr;
  return it->second->mapping;
}

std::optional<ArenaClient::Taken> ArenaClient::TryTake(const Peer& peer, const std::string& request,
                                                       std::span<const BlockKey> keys) {
  const std::shared_ptr<Mapping> m = impl_->Mapped(peer);
  if (m == nullptr) return std::nullopt;
  return impl_->TryTake(m, request, keys);
}

std::optional<ArenaClient::Taken> ArenaClient::Impl::TryTake(const std::shared_ptr<Mapping>& m,
                                                             const std::string& request,
                                                             std::span<const BlockKey> keys) {
  if (keys.empty()) return std::nullopt;
  Taken out;
  std::vector<uint32_t> slots;
  Run* run = nullptr;
  bool all = false;
  {
    std::lock_guard lock(m->mu);
    const auto claim = m->directory->Find(OfferName::Of(request));
    if (!claim) return std::nullopt;
    const auto it = m->runs.find(claim->entry);
    m->directory->Prefetch(*claim, it == m->runs.end() ? 0 : it->second->hint, keys.size());
    if (it == m->runs.end()) {
      if (!m->directory->Hold(*claim)) {
        // The owner that retired it may have seen the claim, and waits to hear that it is gone.
        m->look = m->look || m->held->load(std::memory_order_seq_cst) > 0;
        m->SendReleases();
        return std::nullopt;
      }
      run = m->runs.emplace(claim->entry, new Run(m, *claim)).first->second;
    } else if (it->second->claim()->version != claim->version) {
      // What was in that entry before is still held, and there is one claim an entry: this has to be asked
      // for.
      return std::nullopt;
    } else {
      run = it->second;
    }
    run->leases.fetch_add(1, std::memory_order_relaxed);
    all = m->directory->Collect(*claim, keys, m->slots, run->hint, slots);
    out.short_of_room = m->directory->short_of_room();
  }
  if (!all) {
    run->Drop();
    return std::nullopt;
  }
  out.blocks = BlockRun(run, std::move(slots));
  probe.claimed.Add();
  return out;
}

void ArenaClient::Take(const Peer& peer, const std::string& request, uint32_t attempt,
                       std::vector<BlockKey> keys, absl::Time deadline, std::function<void(Taken)> done) {
  TP_CHECK(keys.size() <= kMaxArenaKeys && request.size() <= kMaxArenaText);
  {
    std::lock_guard lock(impl_->mu);
    std::shared_ptr<PeerState> p =
        impl_->pending.size() < impl_->options.max_takes ? impl_->PeerFor(peer) : nullptr;
    if (p == nullptr || p->peer.boot != peer.boot) {
      Taken none;
      none.status = p == nullptr
                        ? absl::ResourceExhaustedError("too many processes of this host, or takes under way")
                        : absl::UnavailableError("the arena is another process's");
      impl_->finished.emplace_back(std::move(done), std::move(none));
    } else {
      impl_->pending.emplace(impl_->next_id++, Pending{std::move(p), request, attempt, std::move(keys),
                                                       deadline, std::move(done)});
    }
  }
  impl_->Wake();
}

void ArenaClient::Cancel(const std::string& request, uint32_t attempt) {
  {
    std::lock_guard lock(impl_->mu);
    for (auto it = impl_->pending.begin(); it != impl_->pending.end();) {
      const auto next = std::next(it);
      if (it->second.request == request && it->second.attempt == attempt)
        impl_->Finish(it, {absl::CancelledError("the request was aborted"), {}, false});
      it = next;
    }
    if (impl_->finished.empty()) return;
  }
  impl_->Wake();
}

bool ArenaClient::Done(const Peer& peer, const std::string& request) {
  const std::shared_ptr<Mapping> m = impl_->Mapped(peer);
  if (m == nullptr) return false;
  std::string packet = EncodeArenaPacket(ArenaDone{request});
  std::lock_guard lock(m->mu);
  if (m->unsent.empty()) {
    const Mapping::Sent sent = m->Send(packet);
    if (sent != Mapping::Sent::kFull) return sent == Mapping::Sent::kYes;
  }
  if (m->unsent.size() >= kUnsentMax) return false;
  m->unsent.push_back(std::move(packet));
  impl_->Wake();
  return true;
}

size_t ArenaClient::peers() const {
  std::lock_guard lock(impl_->mu);
  return static_cast<size_t>(std::count_if(impl_->peers.begin(), impl_->peers.end(), [](const auto& item) {
    return item.second->state == PeerState::kReady;
  }));
}

size_t ArenaClient::active() const {
  std::lock_guard lock(impl_->mu);
  return impl_->pending.size() + impl_->finished.size();
}

void ArenaClient::Impl::Finish(std::map<uint64_t, Pending>::iterator it, Taken taken) {
  Pending& p = it->second;
  if (!taken.status.ok()) {
    probe.failed.Add();
    // A grant that comes all the same finds nobody, and is released.
    if (p.asked && p.peer->mapping != nullptr)
      p.peer->mapping->Send(EncodeArenaPacket(ArenaCancel{it->first}));
  }
  finished.emplace_back(std::move(p.done), std::move(taken));
  pending.erase(it);
}

void ArenaClient::Impl::RunFinished() {
  for (;;) {
    std::vector<std::pair<std::function<void(Taken)>, Taken>> now;
    {
      std::lock_guard lock(mu);
      now.swap(finished);
    }
    if (now.empty()) return;
    for (auto& [done, taken] : now) done(std::move(taken));
  }
}

void ArenaClient::Impl::Connect(PeerState& p) {
  ArenaAddress address;
  if (!ArenaAddress::Parse(p.peer.arena, address)) return Fail(p, absl::UnavailableError("no arena address"));
  FileDescriptor fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = {}};
  std::copy(address.socket.begin(), address.socket.end(), name.sun_path + 1);
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + address.socket.size());
  if (fd.get() < 0 || connect(fd.get(), reinterpret_cast<sockaddr*>(&name), length) != 0)
    return Fail(p, absl::UnavailableError(absl::StrCat("connect: ", Errno())));
  ucred who = {};
  socklen_t size = sizeof who;
  if (getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &who, &size) != 0 || who.uid != geteuid())
    return Fail(p, absl::UnavailableError("it runs as another user"));
  MakeRoomForArenaPackets(fd.get());
  const std::string hello = EncodeArenaPacket(ArenaHello{.token = address.token,
                                                         .boot = p.peer.boot,
                                                         .worker = options.worker_id,
                                                         .fingerprint = options.fingerprint,
                                                         .layout = options.layout.ToString()});
  if (send(fd.get(), hello.data(), hello.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
    return Fail(p, absl::UnavailableError(absl::StrCat("send: ", Errno())));
  epoll_event event = {.events = EPOLLIN, .data = {.fd = fd.get()}};
  if (epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd.get(), &event) != 0)
    return Fail(p, absl::UnavailableError(absl::StrCat("epoll_ctl: ", Errno())));
  p.fd = std::move(fd);
}

// Holds mu.
void ArenaClient::Impl::Fail(PeerState& p, const absl::Status& why) {
  spdlog::warn("kv arena of another process: {}", std::string(why.message()));
  const int fd = p.mapping != nullptr ? p.mapping->fd.get() : p.fd.get();
  if (fd >= 0) epoll_ctl(epoll.get(), EPOLL_CTL_DEL, fd, nullptr);
  if (p.state == PeerState::kReady) probe.mapped.Add(-1);
  p.fd = FileDescriptor();
  p.mapping.reset();  // runs keep what they read, and the connection open
  p.state = PeerState::kFailed;
  p.until = options.clock->Now() + options.retry_after;
  for (auto it = pending.begin(); it != pending.end();) {
    const auto next = std::next(it);
    if (it->second.peer.get() == &p) Finish(it, {why, {}, false});
    it = next;
  }
}

absl::StatusOr<std::shared_ptr<Mapping>> ArenaClient::Impl::Map(PeerState& p, const ArenaWelcome& w,
                                                                std::array<FileDescriptor, 3>& fds) {
  if (w.version != kArenaProtocolVersion)
    return absl::FailedPreconditionError("its protocol is another version");
  uint64_t least = 0;
  if (w.slot_bytes != options.layout.block_bytes() || w.stride < w.slot_bytes || w.stride % 64 != 0 ||
      w.slots == 0 || __builtin_mul_overflow(w.stride, uint64_t{w.slots}, &least) || least > w.arena_bytes) {
    return absl::DataLossError(absl::StrCat("its arena of ", w.arena_bytes, " bytes cannot hold ", w.slots,
                                            " slots of ", w.slot_bytes, " every ", w.stride));
  }
  auto m = std::make_shared<Mapping>();
  TP_ASSIGN_OR_RETURN(m->arena, SharedMemory::Open(fds[0].get(), w.arena_bytes, /*writable=*/false));
  TP_ASSIGN_OR_RETURN(m->directory_memory,
                      SharedMemory::Open(fds[1].get(), w.directory_bytes, /*writable=*/false));
  TP_ASSIGN_OR_RETURN(m->claims_memory, SharedMemory::Open(fds[2].get(), w.claims_bytes, /*writable=*/true));
  auto* claims = reinterpret_cast<std::atomic<uint64_t>*>(m->claims_memory.data());
  m->directory =
      DirectoryReader::Open({m->directory_memory.data(), m->directory_memory.size()}, claims, w.claims_bytes);
  if (!m->directory) return absl::DataLossError("its directory of offers is none");
  m->held = claims + m->directory->entries();
  m->stride = w.stride;
  m->slot_bytes = w.slot_bytes;
  m->slots = w.slots;
  m->fd = std::move(p.fd);
  m->wake = wake;
  return m;
}

absl::Status ArenaClient::Impl::Receive(const std::shared_ptr<PeerState>& p, bool& more) {
  const int fd = p->mapping != nullptr ? p->mapping->fd.get() : p->fd.get();
  iovec part = {.iov_base = buffer.data(), .iov_len = buffer.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(3 * sizeof(int))> control{};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t n = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0) {
    more = false;
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("recvmsg: ", Errno()));
  }
  std::array<FileDescriptor, 3> fds;
  size_t received = 0;
  for (cmsghdr* h = CMSG_FIRSTHDR(&message); h != nullptr; h = CMSG_NXTHDR(&message, h)) {
    if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int got;
      std::memcpy(&got, CMSG_DATA(h) + i * sizeof got, sizeof got);
      FileDescriptor taken(got);  // closed unless it is one of those that are wanted
      if (received < fds.size()) fds[received++] = std::move(taken);
    }
  }
  if (n == 0) return absl::UnavailableError("it closed the connection");
  if ((message.msg_flags & MSG_TRUNC) != 0) return absl::DataLossError("its packet is too long");
  TP_ASSIGN_OR_RETURN(ArenaPacket packet, DecodeArenaPacket(std::span(buffer).first(static_cast<size_t>(n))));
  if (auto* refuse = std::get_if<ArenaRefuse>(&packet))
    return absl::UnavailableError(absl::StrCat("refused: ", refuse->text));
  if (auto* welcome = std::get_if<ArenaWelcome>(&packet);
      welcome != nullptr && p->state == PeerState::kConnecting) {
    if (received != fds.size()) return absl::DataLossError("WELCOME without its descriptors");
    TP_ASSIGN_OR_RETURN(p->mapping, Map(*p, *welcome, fds));
    p->state = PeerState::kReady;
    probe.mapped.Add(1);
    return absl::OkStatus();
  }
  if (auto* grant = std::get_if<ArenaGrant>(&packet); grant != nullptr && p->state == PeerState::kReady) {
    OnGrant(p->mapping, *grant);
    return absl::OkStatus();
  }
  return absl::DataLossError("a packet out of place");
}

// Holds mu.
void ArenaClient::Impl::OnGrant(const std::shared_ptr<Mapping>& m, ArenaGrant& g) {
  const auto it = pending.find(g.id);
  const auto present = static_cast<size_t>(
      std::count_if(g.slots.begin(), g.slots.end(), [](const SlotRef& s) { return s.slot != kAbsentSlot; }));
  const bool all = present == g.slots.size();
  const bool sane = std::all_of(g.slots.begin(), g.slots.end(),
                                [&](const SlotRef& s) { return s.slot == kAbsentSlot || s.slot < m->slots; });
  const bool wanted = it != pending.end() && it->second.peer->mapping == m &&
                      it->second.keys.size() == g.slots.size() && sane;
  if (!wanted || (present > 0 && !all)) {
    std::lock_guard lock(m->mu);
    m->released.push_back(g.id);
    m->SendReleases();
  }
  if (!wanted) return;
  Taken out;
  out.short_of_room = g.short_of_room;
  if (present > 0 && all) {
    Run* run = new Run(m, g.id);
    run->leases.store(1, std::memory_order_relaxed);
    std::vector<uint32_t> slots;
    slots.reserve(g.slots.size());
    for (const SlotRef& s : g.slots) slots.push_back(s.slot);
    out.blocks = BlockRun(run, std::move(slots));
    probe.granted.Add();
  }
  Finish(it, std::move(out));
}

void ArenaClient::Impl::Readable(const std::shared_ptr<PeerState>& p) {
  bool more = true;
  for (size_t i = 0; i < kPacketsPerTurn && more; ++i) {
    if (absl::Status s = Receive(p, more); !s.ok()) return Fail(*p, s);
  }
}

// What waits for its peer to be mapped, and now can be asked for. Holds mu.
void ArenaClient::Impl::Ask() {
  for (auto it = pending.begin(); it != pending.end();) {
    const auto next = std::next(it);
    Pending& p = it->second;
    if (!p.asked && p.peer->state == PeerState::kReady) {
      const std::shared_ptr<Mapping> m = p.peer->mapping;
      if (auto taken = TryTake(m, p.request, p.keys)) {
        Finish(it, std::move(*taken));
      } else {
        const int64_t left = absl::ToInt64Milliseconds(p.deadline - options.clock->Now());
        const Mapping::Sent sent = m->Send(EncodeArenaPacket(ArenaTake{
            it->first, static_cast<uint32_t>(std::clamp<int64_t>(left, 0, 1 << 30)), p.request, p.keys}));
        p.asked = sent == Mapping::Sent::kYes;
        if (sent == Mapping::Sent::kGone || sent == Mapping::Sent::kFailed)
          Finish(it, {absl::UnavailableError(absl::StrCat("send: ", Errno())), {}, false});
      }
    }
    it = next;
  }
}

// Timers. Returns when the next one is due. Holds mu.
absl::Time ArenaClient::Impl::Tick() {
  const absl::Time now = options.clock->Now();
  absl::Time next = absl::InfiniteFuture();
  for (auto& [address, p] : peers) {
    if (p->state == PeerState::kFailed) {
      // Somebody asks for it again: whoever is pending came after it failed.
      const bool wanted =
          std::any_of(pending.begin(), pending.end(), [&](auto& i) { return i.second.peer == p; });
      if (!wanted) continue;
      p->state = PeerState::kConnecting;
      p->until = now + options.hello_timeout;
    }
    if (p->state == PeerState::kConnecting) {
      if (p->fd.get() < 0) Connect(*p);
      if (p->state == PeerState::kConnecting && now >= p->until)
        Fail(*p, absl::UnavailableError("it did not answer in time"));
      if (p->state == PeerState::kConnecting) next = std::min(next, p->until);
    }
    if (p->state != PeerState::kReady) continue;
    std::lock_guard lock(p->mapping->mu);
    Mapping& m = *p->mapping;
    size_t sent = 0;
    while (sent < m.unsent.size() && m.Send(m.unsent[sent]) != Mapping::Sent::kFull) ++sent;
    m.unsent.erase(m.unsent.begin(), m.unsent.begin() + static_cast<std::ptrdiff_t>(sent));
    if (!m.TrySendReleases() || !m.unsent.empty()) next = std::min(next, now + kResend);
  }
  Ask();
  for (auto it = pending.begin(); it != pending.end();) {
    const auto after = std::next(it);
    Pending& p = it->second;
    if (now >= p.deadline) {
      Finish(it, {absl::DeadlineExceededError("the peer on this host did not have it in time"), {}, false});
    } else {
      next = std::min(next, p.asked ? p.deadline : std::min(p.deadline, now + kResend));
    }
    it = after;
  }
  return finished.empty() ? next : now;
}

void ArenaClient::Impl::Loop() {
  std::array<epoll_event, 64> events;
  while (!stop.load()) {
    absl::Time next;
    {
      std::lock_guard lock(mu);
      next = Tick();
    }
    RunFinished();
    const absl::Duration left = next - options.clock->Now();
    const int timeout = next == absl::InfiniteFuture()
                            ? -1
                            : static_cast<int>(std::clamp<int64_t>(
                                  absl::ToInt64Milliseconds(left + absl::Nanoseconds(999999)), 0, 60000));
    const int n = epoll_wait(epoll.get(), events.data(), events.size(), timeout);
    {
      std::lock_guard lock(mu);
      for (int i = 0; i < n; ++i) {
        const int fd = events[i].data.fd;
        if (fd == wake->get()) {
          uint64_t count;
          [[maybe_unused]] const ssize_t got = read(wake->get(), &count, sizeof count);
          continue;
        }
        for (auto& [address, p] : peers) {
          const int its = p->mapping != nullptr ? p->mapping->fd.get() : p->fd.get();
          if (its != fd) continue;
          Readable(p);
          break;
        }
      }
    }
    RunFinished();
  }
  {
    std::lock_guard lock(mu);
    while (!pending.empty())
      Finish(pending.begin(), {absl::CancelledError("the node is stopping"), {}, false});
    for (auto& [address, p] : peers) {
      if (p->state == PeerState::kReady) probe.mapped.Add(-1);
    }
    peers.clear();
  }
  RunFinished();
}

}  // namespace tidepool
