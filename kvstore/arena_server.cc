#include "kvstore/arena_server.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <deque>
#include <fstream>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/shared_memory.h"
#include "base/status.h"
#include "kvstore/arena_codec.h"
#include "kvstore/arena_directory.h"

namespace tidepool {
namespace {

// Packets handled of one connection before the others get their turn.
constexpr int kPacketsPerTurn = 64;
// Leases of one connection's grants, as a multiple of the pool's slots: a peer that takes the same blocks
// over and over costs memory here.
constexpr size_t kGrantedPerSlot = 4;
constexpr absl::Duration kAcceptPause = absl::Milliseconds(100);

std::string Errno() { return std::generic_category().message(errno); }

std::string RandomHex(size_t bytes) {
  std::vector<uint8_t> random(bytes);
  size_t got = 0;
  while (got < bytes) {
    const ssize_t n = getrandom(random.data() + got, bytes - got, 0);
    TP_CHECK(n > 0 || errno == EINTR);
    if (n > 0) got += static_cast<size_t>(n);
  }
  return HexEncode(random);
}

// Probe: the owner's metrics. Claims are taken without the owner's knowing; the reader counts those.
struct ArenaServerProbe {
  explicit ArenaServerProbe(MetricRegistry& m)
      : grants(m.AddCounter("tidepool_kv_arena_grants_total",
                            "Blocks granted on request to processes of this host, to be read in place")),
        connections(m.AddGauge("tidepool_kv_arena_readers", "Processes of this host that map this arena")),
        held(m.AddGauge("tidepool_kv_arena_held_blocks",
                        "Blocks that are no longer on offer, but read in place by another process")) {
    constexpr std::array<const char*, kArenaRefusals> kNames = {"",     "token",     "boot", "mismatch",
                                                                "busy", "malformed", "user"};
    for (size_t i = 1; i < kArenaRefusals; ++i) {
      refused[i] =
          &m.AddCounter("tidepool_kv_arena_refused_total",
                        "Processes that were not let in, or thrown out, by cause", {{"reason", kNames[i]}});
    }
  }
  void Refused(ArenaRefusal reason) { refused[static_cast<size_t>(reason)]->Add(); }

  Counter& grants;
  Gauge& connections;
  Gauge& held;
  std::array<Counter*, kArenaRefusals> refused{};
};

// A TAKE that cannot be answered yet.
struct Wait {
  ArenaTake take;
  absl::Time until;
};

struct Connection {
  enum State { kNew, kReady, kCondemned } state = kNew;
  FileDescriptor fd;
  absl::Time hello_until;
  std::string worker;
  SharedMemory claims_memory;
  // [entries] claims, then how many retired entries are held for this peer (written by the owner only).
  std::atomic<uint64_t>* claims = nullptr;
  absl::flat_hash_map<uint64_t, std::vector<BlockLease>> grants;
  size_t granted = 0;
  std::vector<uint32_t> held;  // retired entries; guarded by Impl::mu
  std::deque<Wait> waits;
  std::string unsent;  // one packet that did not fit; nothing is read until it does
};

// A retired entry that some peer still claims.
struct Held {
  uint64_t version;
  std::vector<BlockLease> leases;
  std::vector<Connection*> readers;
  bool counted = false;  // its leases are of kind `peer`
};

}  // namespace

std::string ArenaAddress::ToString() const { return absl::StrCat("1.", machine, ".", socket, ".", token); }

bool ArenaAddress::Parse(std::string_view text, ArenaAddress& out) {
  const std::vector<std::string> parts = absl::StrSplit(absl::string_view(text.data(), text.size()), '.');
  if (parts.size() != 4 || parts[0] != "1") return false;
  if (parts[1].empty() || parts[2].empty() || parts[2].size() > 100 || parts[3].size() != 32) return false;
  out = {parts[1], parts[2], parts[3]};
  return true;
}

std::string ArenaAddress::ThisMachine() {
  std::ifstream in("/proc/sys/kernel/random/boot_id");
  std::string boot;
  if (!std::getline(in, boot)) return "";
  return HexEncode(Sha256().UpdateField("tidepool arena").UpdateField(boot).Finish()).substr(0, 16);
}

void MakeRoomForArenaPackets(int socket) {
  constexpr int kWanted = 2 * kMaxArenaPacket;  // the kernel's own records count as well
  int bytes = 0;
  socklen_t size = sizeof bytes;
  if (getsockopt(socket, SOL_SOCKET, SO_SNDBUF, &bytes, &size) == 0 && bytes >= kWanted) return;
  setsockopt(socket, SOL_SOCKET, SO_SNDBUF, &kWanted, sizeof kWanted);
}

struct ArenaServer::Impl final : OfferObserver {
  explicit Impl(Options o) : options(std::move(o)), probe(*options.metrics) {}

  absl::Status Open();
  void Loop();
  void Wake() {
    const uint64_t one = 1;
    // A counter that is full wakes as well.
    [[maybe_unused]] const ssize_t n = write(wake.get(), &one, sizeof one);
  }

  // --- offers, on any thread, under the table's lock ---
  void OnOffered(const std::string& request, const BlockKey& key, const BlockLease& lease) override;
  void OnDropped(const std::string& request, std::vector<BlockLease>& leases) override;
  void OnRevoked(const std::string&) override { WakeForWaits(); }
  void WakeForWaits() {
    if (waiting.load(std::memory_order_seq_cst) > 0) Wake();
  }

  // --- the server's thread ---
  void Accept();
  void WatchListener(bool on);
  // False: the connection is gone.
  bool Readable(Connection& c);
  void Handle(Connection& c, std::span<const std::byte> bytes);
  void On(Connection& c, ArenaHello& p);
  void On(Connection& c, ArenaTake& p);
  void On(Connection& c, ArenaRelease& p);
  void On(Connection& c, ArenaDone& p);
  void On(Connection& c, ArenaCancel& p);
  template <typename Other>
  void On(Connection& c, Other&) {
    Condemn(c, "a packet that only an owner sends");
  }
  bool TryGrant(Connection& c, const ArenaTake& take, bool last);
  void RetryWaits(Connection& c, absl::Time now);
  void ReleaseClaims(Connection& c);
  absl::Status Welcome(Connection& c);
  void Send(Connection& c, std::string packet);
  void Flush(Connection& c);
  void Refuse(Connection& c, ArenaRefusal reason, const std::string& text);
  void Condemn(Connection& c, std::string_view why);
  void Watch(Connection& c);
  void Close(int fd);
  void Unhold(uint32_t entry, Connection* c, std::vector<BlockLease>& dropped);  // holds mu
  void CountHeld();
  void SetRoom();
  void Publish();

  const Options options;
  ArenaServerProbe probe;
  ArenaAddress address;
  std::string address_text;
  FileDescriptor listener, epoll, wake, directory_fd;
  SharedMemory directory_memory;
  std::thread thread;
  std::atomic<bool> stop{false};
  std::atomic<size_t> waiting{0}, connected{0}, held_blocks{0};

  std::map<int, std::unique_ptr<Connection>> connections;  // by descriptor; changed by the thread, under mu
  std::vector<std::byte> buffer;
  std::atomic<size_t> granted_blocks{0};             // of all connections
  absl::Time accept_after = absl::InfiniteFuture();  // the listener is not watched until then

  // Taken under the table's lock, never the other way round.
  mutable std::mutex mu;
  std::optional<ArenaDirectory> directory;
  absl::flat_hash_map<OfferName, uint32_t> entry_of;  // live ones
  std::map<uint32_t, Held> held;                      // added to by any thread, the rest is the server's
  std::vector<uint32_t> fresh_held;
  uint32_t offered = 0;  // since room was last looked at
};

absl::Status ArenaServer::Impl::Open() {
  if (options.pool->arena().fd() < 0)
    return absl::UnavailableError("the host tier's memory cannot be shared");
  address.machine = ArenaAddress::ThisMachine();
  if (address.machine.empty()) return absl::UnavailableError("the kernel's boot id cannot be read");
  const auto blocks = static_cast<uint32_t>(options.pool->stats().slots);
  // Room for each block to be offered by two requests, and each request to leave its last chunk half empty.
  const uint32_t chunks =
      std::min(1u << 22, options.directory_entries + 2 * (blocks / DirectoryChunk::kItems + 1));
  TP_ASSIGN_OR_RETURN(
      auto shared,
      SharedMemory::Create("tidepool-offers", DirectoryShape::Bytes(options.directory_entries, chunks),
                           /*peer_writes=*/false));
  directory_memory = std::move(shared.first);
  directory_fd = std::move(shared.second);
  directory.emplace(directory_memory.data(), options.directory_entries, chunks);
  buffer.resize(kMaxArenaPacket);

  const auto failed = [](const char* what) {
    return absl::UnavailableError(absl::StrCat(what, ": ", Errno()));
  };
  listener = FileDescriptor(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (listener.get() < 0) return failed("socket");
  address.socket = absl::StrCat("tidepool-", getpid(), "-", RandomHex(8));
  address.token = RandomHex(16);
  address_text = address.ToString();
  sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = {}};
  std::copy(address.socket.begin(), address.socket.end(), name.sun_path + 1);  // a leading zero: abstract
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + address.socket.size());
  if (bind(listener.get(), reinterpret_cast<sockaddr*>(&name), length) != 0) return failed("bind");
  if (listen(listener.get(), 64) != 0) return failed("listen");
  epoll = FileDescriptor(epoll_create1(EPOLL_CLOEXEC));
  wake = FileDescriptor(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (epoll.get() < 0 || wake.get() < 0) return failed("epoll");
  for (int fd : {listener.get(), wake.get()}) {
    epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    if (epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd, &event) != 0) return failed("epoll_ctl");
  }
  return absl::OkStatus();
}

void ArenaServer::Impl::SetRoom() {
  const BlockPool::Stats s = options.pool->stats();
  directory->SetShortOfRoom(s.free + s.evictable < options.short_of_room * s.slots);
}

void ArenaServer::Impl::OnOffered(const std::string& request, const BlockKey& key, const BlockLease& lease) {
  if (lease.owner() != options.pool) return;  // none: nothing that can be passed on
  {
    std::lock_guard lock(mu);
    if (offered++ % 64 == 0) SetRoom();
    const OfferName name = OfferName::Of(request);
    auto it = entry_of.find(name);
    if (it == entry_of.end()) {
      if (const auto entry = directory->Open(name)) it = entry_of.emplace(name, *entry).first;
    }
    // One that finds no room can still be asked for.
    if (it != entry_of.end()) directory->Append(it->second, key, lease.ref().slot);
  }
  WakeForWaits();
}

void ArenaServer::Impl::OnDropped(const std::string& request, std::vector<BlockLease>& leases) {
  bool wake_up = false;
  {
    std::lock_guard lock(mu);
    const auto it = entry_of.find(OfferName::Of(request));
    if (it != entry_of.end()) {
      const uint32_t entry = it->second;
      entry_of.erase(it);
      SetRoom();
      const uint64_t version = directory->Retire(entry);
      Held h{.version = version};
      for (auto& [fd, c] : connections) {
        if (c->claims == nullptr || c->claims[entry].load(std::memory_order_seq_cst) != version) continue;
        // The peer looks at this number after it has let go: either it sees this, or the claim is gone below.
        c->claims[directory->entries()].fetch_add(1, std::memory_order_seq_cst);
        if (c->claims[entry].load(std::memory_order_seq_cst) != version) {
          c->claims[directory->entries()].fetch_sub(1, std::memory_order_seq_cst);
          continue;
        }
        h.readers.push_back(c.get());
        c->held.push_back(entry);
      }
      if (h.readers.empty()) {
        directory->Free(entry);
      } else {
        held_blocks.fetch_add(leases.size(), std::memory_order_relaxed);
        h.leases = std::exchange(leases, {});
        held.emplace(entry, std::move(h));
        fresh_held.push_back(entry);
        wake_up = true;
      }
    }
  }
  wake_up ? Wake() : WakeForWaits();
}

void ArenaServer::Impl::Unhold(uint32_t entry, Connection* c, std::vector<BlockLease>& dropped) {
  const auto it = held.find(entry);
  TP_CHECK(it != held.end());
  std::erase(it->second.readers, c);
  std::erase(c->held, entry);
  c->claims[directory->entries()].fetch_sub(1, std::memory_order_seq_cst);
  if (!it->second.readers.empty()) return;
  held_blocks.fetch_sub(it->second.leases.size(), std::memory_order_relaxed);
  std::move(it->second.leases.begin(), it->second.leases.end(), std::back_inserter(dropped));
  held.erase(it);
  directory->Free(entry);
}

// What an offer was leased as becomes a lease of a peer: here, since it takes a while.
void ArenaServer::Impl::CountHeld() {
  std::vector<std::vector<BlockLease>*> fresh;
  {
    std::lock_guard lock(mu);
    for (uint32_t entry : std::exchange(fresh_held, {})) {
      const auto it = held.find(entry);
      if (it == held.end() || std::exchange(it->second.counted, true)) continue;
      fresh.push_back(&it->second.leases);
    }
  }
  for (std::vector<BlockLease>* leases : fresh)
    BlockLease::DropAll(std::exchange(*leases, BlockLease::CloneAll(*leases, LeaseKind::kPeer)));
}

void ArenaServer::Impl::ReleaseClaims(Connection& c) {
  std::vector<BlockLease> dropped;
  const absl::Cleanup drop = [&] { BlockLease::DropAll(std::move(dropped)); };  // after the lock is
  std::lock_guard lock(mu);
  for (uint32_t entry : std::vector(c.held)) {
    if (c.claims[entry].load(std::memory_order_seq_cst) != held.at(entry).version) Unhold(entry, &c, dropped);
  }
}

void ArenaServer::Impl::WatchListener(bool on) {
  epoll_event event = {.events = on ? uint32_t{EPOLLIN} : 0u, .data = {.fd = listener.get()}};
  epoll_ctl(epoll.get(), EPOLL_CTL_MOD, listener.get(), &event);
}

void ArenaServer::Impl::Accept() {
  for (;;) {
    FileDescriptor fd(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (fd.get() < 0) {
      if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return;
      // No descriptor or memory left: the kernel keeps the connection, and the listener readable.
      spdlog::warn("kv arena: accept: {}", Errno());
      WatchListener(false);
      accept_after = options.clock->Now() + kAcceptPause;
      return;
    }
    MakeRoomForArenaPackets(fd.get());
    auto c = std::make_unique<Connection>();
    const int number = fd.get();
    c->fd = std::move(fd);
    c->hello_until = options.clock->Now() + options.hello_timeout;
    ucred who = {};
    socklen_t size = sizeof who;
    if (getsockopt(number, SOL_SOCKET, SO_PEERCRED, &who, &size) != 0 || who.uid != geteuid()) {
      Refuse(*c, ArenaRefusal::kUser, "it runs as another user");
      continue;
    }
    if (connections.size() >= options.max_connections) {
      Refuse(*c, ArenaRefusal::kBusy, absl::StrCat("it has ", connections.size(), " readers, the limit"));
      continue;
    }
    epoll_event event = {.events = EPOLLIN, .data = {.fd = number}};
    if (epoll_ctl(epoll.get(), EPOLL_CTL_ADD, number, &event) != 0) {
      spdlog::warn("kv arena: epoll_ctl: {}", Errno());
      continue;
    }
    std::lock_guard lock(mu);
    connections[number] = std::move(c);
  }
}

// What is watched follows from the connection's state; that it is closed is always told.
void ArenaServer::Impl::Watch(Connection& c) {
  epoll_event event = {.events = 0, .data = {.fd = c.fd.get()}};
  if (!c.unsent.empty()) {
    event.events = EPOLLOUT;
  } else if (c.state != Connection::kCondemned) {
    event.events = EPOLLIN;
  }
  epoll_ctl(epoll.get(), EPOLL_CTL_MOD, c.fd.get(), &event);
}

void ArenaServer::Impl::Send(Connection& c, std::string packet) {
  if (c.state == Connection::kCondemned) return;
  if (!c.unsent.empty()) return Condemn(c, "it does not read its answers");
  if (send(c.fd.get(), packet.data(), packet.size(), MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return;
  if (errno != EAGAIN && errno != EWOULDBLOCK) return;  // closed at the other end: seen soon
  c.unsent = std::move(packet);
  Watch(c);
}

void ArenaServer::Impl::Flush(Connection& c) {
  if (c.unsent.empty()) return;
  if (send(c.fd.get(), c.unsent.data(), c.unsent.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
      (errno == EAGAIN || errno == EWOULDBLOCK)) {
    return;
  }
  c.unsent.clear();
  Watch(c);
}

// The peer has got nothing yet, so nothing of it need be kept.
void ArenaServer::Impl::Refuse(Connection& c, ArenaRefusal reason, const std::string& text) {
  probe.Refused(reason);
  spdlog::warn("kv arena: a process of this host is refused: {}", text);
  const std::string packet = EncodeArenaPacket(ArenaRefuse{reason, text});
  send(c.fd.get(), packet.data(), packet.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  c.state = Connection::kCondemned;
}

// It may still read what it has mapped: everything that it holds stays until it closes its end.
void ArenaServer::Impl::Condemn(Connection& c, std::string_view why) {
  if (c.state == Connection::kCondemned) return;
  probe.Refused(ArenaRefusal::kMalformed);
  spdlog::warn("kv arena: worker {} gets nothing more: {}", c.worker, why);
  const std::string packet = EncodeArenaPacket(ArenaRefuse{ArenaRefusal::kMalformed, std::string(why)});
  // Our direction is not shut down: with a peer that shuts down its own it would look like the end of both.
  c.unsent.clear();
  if (send(c.fd.get(), packet.data(), packet.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
      (errno == EAGAIN || errno == EWOULDBLOCK)) {
    c.unsent = packet;
  }
  waiting.fetch_sub(c.waits.size(), std::memory_order_seq_cst);
  c.waits.clear();
  c.state = Connection::kCondemned;
  Watch(c);
}

bool ArenaServer::Impl::Readable(Connection& c) {
  for (int i = 0; i < kPacketsPerTurn && c.state != Connection::kCondemned && c.unsent.empty(); ++i) {
    const ssize_t n = recv(c.fd.get(), buffer.data(), buffer.size(), MSG_DONTWAIT | MSG_TRUNC);
    if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
    if (n == 0) {
      // Its end is closed, or it sent nothing (or will send no more) and still reads.
      pollfd p = {.fd = c.fd.get(), .events = 0, .revents = 0};
      if (poll(&p, 1, 0) == 1 && (p.revents & (POLLHUP | POLLERR)) != 0) return false;
      Condemn(c, "an empty packet");
    } else if (static_cast<size_t>(n) > buffer.size()) {
      Condemn(c, absl::StrCat("a packet of ", n, " bytes"));
    } else {
      Handle(c, std::span(buffer).first(static_cast<size_t>(n)));
    }
  }
  // Refused before it was given anything.
  return c.state != Connection::kCondemned || c.claims != nullptr;
}

void ArenaServer::Impl::Handle(Connection& c, std::span<const std::byte> bytes) {
  absl::StatusOr<ArenaPacket> packet = DecodeArenaPacket(bytes);
  if (!packet.ok()) return Condemn(c, std::string(packet.status().message()));
  if (c.state == Connection::kNew && !std::holds_alternative<ArenaHello>(*packet))
    return Condemn(c, "it did not say HELLO");
  std::visit([&](auto& p) { On(c, p); }, *packet);
}

void ArenaServer::Impl::On(Connection& c, ArenaHello& p) {
  if (c.state != Connection::kNew) return Condemn(c, "a second HELLO");
  if (!SecretEquals(p.token, address.token)) return Refuse(c, ArenaRefusal::kToken, "its token is wrong");
  c.worker = p.worker;
  if (p.boot != options.boot_id)
    return Refuse(c, ArenaRefusal::kBoot, "it means another process than this one");
  const std::string layout = options.pool->layout().ToString();
  if (p.version != kArenaProtocolVersion || p.fingerprint != options.fingerprint || p.layout != layout) {
    return Refuse(
        c, ArenaRefusal::kMismatch,
        absl::StrCat("protocol ", p.version, ", model ", p.fingerprint, ", KV layout ", p.layout,
                     "; here they are ", kArenaProtocolVersion, ", ", options.fingerprint, ", ", layout));
  }
  if (absl::Status s = Welcome(c); !s.ok()) Refuse(c, ArenaRefusal::kBusy, std::string(s.message()));
}

absl::Status ArenaServer::Impl::Welcome(Connection& c) {
  const SlotArena& arena = options.pool->arena();
  const size_t claims_bytes = (size_t{options.directory_entries} + 1) * sizeof(uint64_t);
  TP_ASSIGN_OR_RETURN(auto shared,
                      SharedMemory::Create("tidepool-claims", claims_bytes, /*peer_writes=*/true));
  const std::string packet = EncodeArenaPacket(ArenaWelcome{.arena_bytes = arena.bytes(),
                                                            .stride = arena.stride(),
                                                            .slot_bytes = arena.slot_bytes(),
                                                            .slots = options.pool->stats().slots,
                                                            .directory_bytes = directory_memory.size(),
                                                            .claims_bytes = claims_bytes});
  const std::array<int, 3> fds = {arena.fd(), directory_fd.get(), shared.second.get()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof fds)> control{};
  iovec part = {.iov_base = const_cast<char*>(packet.data()), .iov_len = packet.size()};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fds);
  std::copy(fds.begin(), fds.end(), reinterpret_cast<int*>(CMSG_DATA(header)));
  {
    // Before the peer can claim anything: what is dropped from now on is looked for in its claims.
    std::lock_guard lock(mu);
    c.claims_memory = std::move(shared.first);
    c.claims = reinterpret_cast<std::atomic<uint64_t>*>(c.claims_memory.data());
  }
  if (sendmsg(c.fd.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
    const absl::Status why = absl::UnavailableError(absl::StrCat("sendmsg: ", Errno()));
    std::lock_guard lock(mu);
    c.claims = nullptr;  // it never got them
    return why;
  }
  c.state = Connection::kReady;
  spdlog::info("kv arena: worker {} maps this worker's host tier", c.worker);
  return absl::OkStatus();
}

// False: something of it is still growing. `last`: answered all the same.
bool ArenaServer::Impl::TryGrant(Connection& c, const ArenaTake& take, bool last) {
  const absl::Time now = options.clock->Now();
  ArenaGrant grant{.id = take.id};
  std::vector<BlockLease> leases;
  const bool room = c.granted + take.keys.size() <= kGrantedPerSlot * options.pool->stats().slots &&
                    !c.grants.contains(take.id);
  for (const BlockKey& key : take.keys) {
    grant.slots.push_back({kAbsentSlot, 0});
    if (!room) continue;
    std::optional<BlockLease> lease;
    if (auto offer = options.offers->Find(take.request, key, now)) {
      if (offer->layers_ready < options.pool->layout().layers) {
        if (!last) return false;
        continue;
      }
      if (offer->lease.owner() == options.pool) lease = offer->lease.Clone(LeaseKind::kPeer);
    } else {
      lease = options.pool->Lease(key, LeaseKind::kPeer);
    }
    if (!lease) continue;
    grant.slots.back() = lease->ref();
    leases.push_back(std::move(*lease));
  }
  const BlockPool::Stats s = options.pool->stats();
  grant.short_of_room = s.free + s.evictable < options.short_of_room * s.slots;
  probe.grants.Add(leases.size());
  if (!leases.empty()) {
    c.granted += leases.size();
    granted_blocks += leases.size();
    c.grants.emplace(take.id, std::move(leases));
  }
  Send(c, EncodeArenaPacket(grant));
  return true;
}

void ArenaServer::Impl::On(Connection& c, ArenaTake& p) {
  if (c.waits.size() >= options.max_waits) {
    TryGrant(c, p, /*last=*/true);
    return;
  }
  // Counted first: an offer that becomes complete from here on wakes this thread.
  waiting.fetch_add(1, std::memory_order_seq_cst);
  if (TryGrant(c, p, /*last=*/false)) {
    waiting.fetch_sub(1, std::memory_order_seq_cst);
    return;
  }
  const absl::Time until = options.clock->Now() + absl::Milliseconds(p.time_left_ms);
  c.waits.push_back({std::move(p), until});
}

void ArenaServer::Impl::RetryWaits(Connection& c, absl::Time now) {
  for (size_t n = c.waits.size(); n > 0 && !c.waits.empty() && c.unsent.empty(); --n) {
    Wait w = std::move(c.waits.front());
    c.waits.pop_front();
    if (TryGrant(c, w.take, now >= w.until)) {
      waiting.fetch_sub(1, std::memory_order_seq_cst);
    } else {
      c.waits.push_back(std::move(w));
    }
  }
}

void ArenaServer::Impl::On(Connection& c, ArenaRelease& p) {
  for (uint64_t id : p.ids) {
    const auto it = c.grants.find(id);
    if (it == c.grants.end()) continue;  // released already
    c.granted -= it->second.size();
    granted_blocks -= it->second.size();
    BlockLease::DropAll(std::move(it->second));
    c.grants.erase(it);
  }
  ReleaseClaims(c);
}

void ArenaServer::Impl::On(Connection&, ArenaDone& p) { options.offers->Close(p.request); }

void ArenaServer::Impl::On(Connection& c, ArenaCancel& p) {
  const size_t before = c.waits.size();
  std::erase_if(c.waits, [&](const Wait& w) { return w.take.id == p.id; });
  waiting.fetch_sub(before - c.waits.size(), std::memory_order_seq_cst);
}

// Its end is closed: nobody reads there any more.
void ArenaServer::Impl::Close(int fd) {
  std::unique_ptr<Connection> c;
  std::vector<BlockLease> dropped;
  const absl::Cleanup drop = [&] {  // after the lock is
    BlockLease::DropAll(std::move(dropped));
    for (auto& [id, leases] : c->grants) BlockLease::DropAll(std::move(leases));
  };
  std::lock_guard lock(mu);
  const auto it = connections.find(fd);
  c = std::move(it->second);
  connections.erase(it);
  for (uint32_t entry : std::vector(c->held)) Unhold(entry, c.get(), dropped);
  waiting.fetch_sub(c->waits.size(), std::memory_order_seq_cst);
  granted_blocks -= c->granted;
  if (c->state == Connection::kReady) spdlog::info("kv arena: worker {} is gone", c->worker);
}

void ArenaServer::Impl::Publish() {
  connected.store(connections.size(), std::memory_order_relaxed);
  probe.connections.Set(static_cast<double>(connections.size()));
  probe.held.Set(static_cast<double>(held_blocks.load() + granted_blocks.load()));
}

void ArenaServer::Impl::Loop() {
  std::array<epoll_event, 64> events;
  while (!stop.load()) {
    absl::Time next = accept_after;
    for (const auto& [fd, c] : connections) {
      if (c->state == Connection::kNew) next = std::min(next, c->hello_until);
      for (const Wait& w : c->waits) next = std::min(next, w.until);
    }
    absl::Time now = options.clock->Now();
    const int timeout =
        next == absl::InfiniteFuture()
            ? -1
            : static_cast<int>(std::clamp<int64_t>(
                  absl::ToInt64Milliseconds(next - now + absl::Nanoseconds(999999)), 0, 60000));
    const int n = epoll_wait(epoll.get(), events.data(), events.size(), timeout);
    std::vector<int> gone;
    for (int i = 0; i < n; ++i) {
      const int fd = events[i].data.fd;
      if (fd == listener.get()) {
        Accept();
      } else if (fd == wake.get()) {
        uint64_t count;
        [[maybe_unused]] const ssize_t got = read(wake.get(), &count, sizeof count);
      } else if (const auto it = connections.find(fd); it != connections.end()) {
        Connection& c = *it->second;
        if ((events[i].events & EPOLLOUT) != 0) Flush(c);
        // What was sent before the end is still heard.
        const bool readable = (events[i].events & EPOLLIN) != 0;
        const bool closed = (events[i].events & (EPOLLHUP | EPOLLERR)) != 0;
        if (readable ? !Readable(c) : closed) gone.push_back(fd);
      }
    }
    now = options.clock->Now();
    if (now >= accept_after) {
      accept_after = absl::InfiniteFuture();
      WatchListener(true);
    }
    for (const auto& [fd, c] : connections) {
      if (c->state == Connection::kNew && now >= c->hello_until) {
        Refuse(*c, ArenaRefusal::kMalformed, "it did not say HELLO in time");
        gone.push_back(fd);
      }
      RetryWaits(*c, now);
    }
    for (int fd : gone) {
      if (connections.contains(fd)) Close(fd);
    }
    CountHeld();
    {
      std::lock_guard lock(mu);
      SetRoom();
    }
    Publish();
  }
}

absl::StatusOr<std::unique_ptr<ArenaServer>> ArenaServer::Start(Options options) {
  TP_CHECK(options.pool != nullptr && options.offers != nullptr && options.metrics != nullptr);
  auto impl = std::make_unique<Impl>(std::move(options));
  TP_RETURN_IF_ERROR(impl->Open());
  impl->options.offers->SetObserver(impl.get());
  impl->thread = std::thread([raw = impl.get()] { raw->Loop(); });
  return std::unique_ptr<ArenaServer>(new ArenaServer(std::move(impl)));
}

ArenaServer::ArenaServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

ArenaServer::~ArenaServer() {
  impl_->stop.store(true);
  impl_->Wake();
  impl_->thread.join();
  impl_->options.offers->SetObserver(nullptr);
  // Nobody is left to hear that they let go: what they read must not change.
  std::vector<BlockLease> read;
  const auto take = [&](std::vector<BlockLease>& leases) {
    std::move(leases.begin(), leases.end(), std::back_inserter(read));
  };
  const auto reads = [](const Connection& c) {
    pollfd p = {.fd = c.fd.get(), .events = 0, .revents = 0};
    return poll(&p, 1, 0) != 1 || (p.revents & POLLHUP) == 0;
  };
  for (auto& [entry, h] : impl_->held) {
    const bool in_use = std::any_of(h.readers.begin(), h.readers.end(), [&, e = entry](const Connection* c) {
      return c->claims[e].load(std::memory_order_seq_cst) == h.version && reads(*c);
    });
    if (in_use) take(h.leases);
  }
  for (auto& [fd, c] : impl_->connections) {
    for (auto& [id, leases] : c->grants) {
      if (reads(*c)) take(leases);
    }
  }
  if (!read.empty()) spdlog::warn("kv arena: {} blocks are still read by other processes", read.size());
  for (BlockLease& lease : read) impl_->options.pool->Quarantine(std::move(lease));
}

const std::string& ArenaServer::address() const { return impl_->address_text; }
size_t ArenaServer::connections() const { return impl_->connected.load(std::memory_order_relaxed); }
size_t ArenaServer::held_blocks() const { return impl_->held_blocks.load() + impl_->granted_blocks.load(); }

}  // namespace tidepool
