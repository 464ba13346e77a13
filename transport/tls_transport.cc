#include "transport/tls_transport.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "base/log.h"
#include "base/status.h"
#include "transport/probe.h"
#include "transport/socket_address.h"
#include "transport/tls_context.h"
#include "transport/tls_frame.h"

namespace tidepool {
namespace {

constexpr std::string_view kScheme = "tls:";
constexpr size_t kMaxNameBytes = 128;
// Control messages handed over and not yet taken by the socket: sixteen of the largest.
constexpr size_t kMaxControlBytes = 4 << 20;
constexpr size_t kMaxQueuedBulks = 4096;
// Of one connection in one round, so that none starves the others or the driver's timers.
constexpr size_t kRoundBytes = 1 << 20;
constexpr int kAcceptsPerRound = 16;
constexpr size_t kStagedBytes = 64 * 1024;
// Sent and not yet on the wire: what a control message waits for behind bulk data, besides one chunk.
constexpr int kNotSentLowBytes = 256 * 1024;
constexpr absl::Duration kTimerStep = absl::Milliseconds(50);
constexpr absl::Duration kAcceptPause = absl::Milliseconds(100);
constexpr absl::Duration kReloadStep = absl::Seconds(2);
// Tags of the epoll set's own descriptors; endpoints count from 1.
constexpr uint64_t kListenTag = UINT64_MAX;
constexpr uint64_t kWakeTag = UINT64_MAX - 1;

// Handle of a file descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

struct TlsAddress {
  SocketAddress socket;
  std::string name;
};

// "tls:HOST:PORT" or "tls:HOST:PORT#NAME".
absl::StatusOr<TlsAddress> ParseTlsAddress(std::string_view address) {
  TlsAddress out;
  const size_t hash = address.find('#');
  if (hash != std::string_view::npos) {
    out.name = std::string(address.substr(hash + 1));
    if (out.name.empty() || out.name.size() > kMaxNameBytes || out.name.find('\0') != std::string::npos) {
      return absl::InvalidArgumentError("transport address has a name of no or more than 128 characters");
    }
  }
  TP_ASSIGN_OR_RETURN(out.socket, ParseTransportAddress(kScheme, address.substr(0, hash)));
  return out;
}

// What the three files were when they were read: a change of one is seen by this.
using FileStamp = std::array<std::pair<int64_t, int64_t>, 3>;

class TlsTransport final : public Transport {
 public:
  explicit TlsTransport(const TlsTransportOptions& options)
      : options_(options), probe_(options.metrics, "tls"), scratch_(16 * 1024) {}
  ~TlsTransport() override { probe_.connections.Add(-static_cast<double>(connections_.size())); }
  absl::Status Init();

  void SetHandler(TransportHandler* handler) override { handler_ = handler; }
  std::string Address() const override { return address_; }
  std::string_view Name() const override { return "tls"; }
  absl::StatusOr<EndpointId> Connect(std::string_view address) override;
  absl::Status Send(EndpointId to, std::string_view message) override;
  absl::Status SendBulk(EndpointId to, std::string_view header, std::span<const std::byte> payload,
                        std::function<void(absl::Status)> done) override;
  void Close(EndpointId endpoint, std::function<void()> quiesced) override;
  int Progress() override;
  void Wait(int timeout_ms) override;
  void Wake() override;

 private:
  struct OutBulk {
    std::string header;
    std::span<const std::byte> payload;
    std::function<void(absl::Status)> done;
    size_t offset = 0;
    bool announced = false;
  };
  // One connection. The SSL goes before the socket that it writes to.
  struct Connection {
    explicit Connection(std::span<std::byte> scratch) : reader(scratch) {}
    EndpointId id = 0;
    Fd fd;
    SslHandle ssl;
    bool accepted = false;     // the peer connected to us
    bool established = false;  // the handshake is through: the peer is who the CA says
    bool readable = true;      // until the socket says otherwise (edge-triggered)
    bool writable = true;
    bool blocked_on_write = false;  // TLS itself wants to write before it goes on
    // Set by Close: what lies in `events_` for this endpoint is told to nobody then.
    std::shared_ptr<bool> closed = std::make_shared<bool>(false);
    absl::Time born, last_heard, last_sent;
    TlsFrameReader reader;
    BulkSink sink;  // of the bulk that is open inbound
    std::deque<std::string> control;
    size_t control_bytes = 0;
    std::deque<OutBulk> bulks;
    std::string staged;  // frames and heads being written
    size_t staged_at = 0;
    size_t chunk_left = 0;  // of the first bulk's payload, before the next head
    bool wants_write() const { return staged_at < staged.size() || !control.empty() || !bulks.empty(); }
  };

  absl::StatusOr<SSL_CTX*> Context();
  FileStamp Stamp() const;
  absl::StatusOr<Connection*> Add(Fd fd, bool accepted);
  void Accept();
  void Advance(Connection& c);
  // Each: false where the connection failed, with why in `failure_`.
  bool Handshake(Connection& c);
  bool Read(Connection& c);
  bool Write(Connection& c);
  bool Receive(Connection& c, TlsFrameReader::Event event);
  void Stage(Connection& c);
  // What OpenSSL's return value `r` means: true for "later".
  bool Later(Connection& c, int r);
  bool Fail(RefusedReason reason, std::string why);
  // Ends the connection: from here nothing writes to anybody's memory for it. `why` goes to every transfer.
  void Drop(EndpointId id, const absl::Status& why);
  void Lose(EndpointId id);
  void CheckTimers(absl::Time now);
  Connection* Find(EndpointId id);

  const TlsTransportOptions options_;
  TransportProbe probe_;
  std::vector<std::byte> scratch_;
  SslContextHandle context_;
  FileStamp stamp_{};
  absl::Time next_reload_;
  Fd epoll_, listener_, wake_;
  bool acceptable_ = true;
  absl::Time accept_after_;
  std::string address_;
  TransportHandler* handler_ = nullptr;
  EndpointId next_id_ = 1;
  std::map<EndpointId, std::unique_ptr<Connection>> connections_;
  std::map<EndpointId, std::shared_ptr<bool>> lost_;  // ended, and the handler is still to hear of it
  size_t handshakes_ = 0;                             // accepted and not established
  std::vector<EndpointId> ready_;
  absl::Time next_timers_;
  std::pair<RefusedReason, std::string> failure_;
  absl::Time next_warning_;
  uint64_t unwarned_ = 0;
  // What the handler is to hear, after the connections have been served: it may then call back.
  std::deque<std::function<void()>> events_;
};

absl::Status TlsTransport::Init() {
  if (options_.name.size() > kMaxNameBytes || options_.name.find('#') != std::string::npos) {
    return absl::InvalidArgumentError("tls transport: name must have at most 128 characters and no '#'");
  }
  if (options_.check_name && options_.name.empty()) {
    return absl::InvalidArgumentError(
        "transport.tls_check_name needs a name for this process; set worker.id");
  }
  TP_RETURN_IF_ERROR(Context().status());
  std::string host = options_.listen_host;
  if (host.empty()) {
    TP_ASSIGN_OR_RETURN(host, FirstAddressOf(options_.net_devices));
  }
  TP_ASSIGN_OR_RETURN(SocketAddress bound, MakeSocketAddress(host, options_.listen_port));
  listener_ = Fd(socket(bound.get()->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const int on = 1;
  if (listener_.get() < 0 || setsockopt(listener_.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 ||
      bind(listener_.get(), bound.get(), bound.size) != 0 || listen(listener_.get(), 128) != 0) {
    return absl::UnavailableError("tls transport cannot listen on " + host + ":" +
                                  std::to_string(options_.listen_port) + ": " + std::strerror(errno));
  }
  bound.size = sizeof bound.storage;
  getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&bound.storage), &bound.size);
  address_ = std::string(kScheme) + host + ":" + std::to_string(PortOf(bound.get()));
  if (!options_.name.empty()) address_ += "#" + options_.name;
  epoll_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  wake_ = Fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (epoll_.get() < 0 || wake_.get() < 0) {
    return absl::ResourceExhaustedError("no file descriptor left for the tls transport");
  }
  for (auto [fd, tag] : {std::pair{listener_.get(), kListenTag}, {wake_.get(), kWakeTag}}) {
    epoll_event event{.events = EPOLLIN | EPOLLET, .data = {.u64 = tag}};
    if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
      return absl::ResourceExhaustedError(std::string("epoll: ") + std::strerror(errno));
    }
  }
  return absl::OkStatus();
}

FileStamp TlsTransport::Stamp() const {
  FileStamp out{};
  int i = 0;
  for (const std::string* file : {&options_.cert_file, &options_.key_file, &options_.ca_file}) {
    struct stat s {};
    if (stat(file->c_str(), &s) == 0) {
      out[i] = {s.st_mtim.tv_sec * 1'000'000'000 + s.st_mtim.tv_nsec, static_cast<int64_t>(s.st_ino)};
    }
    ++i;
  }
  return out;
}

// Certificates are short-lived where they are looked after well: new connections take the files as they are
// now. A half-written pair leaves what holds.
absl::StatusOr<SSL_CTX*> TlsTransport::Context() {
  const absl::Time now = options_.clock->Now();
  if (context_ && now < next_reload_) return context_.get();
  next_reload_ = now + kReloadStep;
  const FileStamp stamp = Stamp();
  if (context_ && stamp == stamp_) return context_.get();
  auto loaded = LoadPeerTls(options_.cert_file, options_.key_file, options_.ca_file);
  if (!loaded.ok()) {
    if (!context_) return loaded.status();
    spdlog::warn("tls transport keeps its certificate: {}", std::string(loaded.status().message()));
  } else {
    if (context_) spdlog::info("tls transport took a new certificate from {}", options_.cert_file);
    context_ = std::move(*loaded);
  }
  stamp_ = stamp;
  return context_.get();
}

TlsTransport::Connection* TlsTransport::Find(EndpointId id) {
  auto it = connections_.find(id);
  return it == connections_.end() ? nullptr : it->second.get();
}

absl::StatusOr<TlsTransport::Connection*> TlsTransport::Add(Fd fd, bool accepted) {
  TP_ASSIGN_OR_RETURN(SSL_CTX * context, Context());
  TP_ASSIGN_OR_RETURN(SslHandle ssl, NewPeerSsl(context, fd.get()));
  const int on = 1;
  setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  setsockopt(fd.get(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &kNotSentLowBytes, sizeof kNotSentLowBytes);
  if (accepted) {
    SSL_set_accept_state(ssl.get());
  } else {
    SSL_set_connect_state(ssl.get());
  }
  auto c = std::make_unique<Connection>(std::span(scratch_));
  c->id = next_id_++;
  c->accepted = accepted;
  c->born = c->last_heard = c->last_sent = options_.clock->Now();
  epoll_event event{.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data = {.u64 = c->id}};
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd.get(), &event) != 0) {
    return absl::ResourceExhaustedError(std::string("epoll: ") + std::strerror(errno));
  }
  c->fd = std::move(fd);
  c->ssl = std::move(ssl);
  handshakes_ += accepted;
  probe_.connections.Add(1);
  ready_.push_back(c->id);
  Connection* out = c.get();
  connections_[c->id] = std::move(c);
  return out;
}

absl::StatusOr<EndpointId> TlsTransport::Connect(std::string_view address) {
  TP_ASSIGN_OR_RETURN(const TlsAddress peer, ParseTlsAddress(address));
  if (options_.check_name && peer.name.empty()) {
    return absl::InvalidArgumentError("transport address has no name to check (transport.tls_check_name)");
  }
  if (connections_.size() >= options_.max_connections) {
    return absl::ResourceExhaustedError("there are " + std::to_string(connections_.size()) +
                                        " connections, the limit");
  }
  Fd fd(socket(peer.socket.get()->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) return absl::ResourceExhaustedError(std::string("socket: ") + std::strerror(errno));
  if (connect(fd.get(), peer.socket.get(), peer.socket.size) != 0 && errno != EINPROGRESS) {
    return absl::UnavailableError(std::string("connecting: ") + std::strerror(errno));
  }
  TP_ASSIGN_OR_RETURN(Connection * c, Add(std::move(fd), false));
  // The first edge tells that the TCP connection stands.
  c->readable = c->writable = false;
  if (options_.check_name) {
    SSL_set_hostflags(c->ssl.get(), X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | X509_CHECK_FLAG_NO_WILDCARDS);
    if (SSL_set1_host(c->ssl.get(), peer.name.c_str()) != 1) {
      Drop(c->id, absl::CancelledError("no connection"));
      return absl::InvalidArgumentError("transport address has a name that no certificate can carry");
    }
  }
  return c->id;
}

void TlsTransport::Accept() {
  for (int i = 0; i < kAcceptsPerRound; ++i) {
    Fd fd(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (fd.get() < 0) {
      acceptable_ = false;
      // No descriptor or memory left: the kernel keeps the connection, and no edge will tell of it again.
      if (errno != EAGAIN) accept_after_ = options_.clock->Now() + kAcceptPause;
      return;
    }
    if (connections_.size() >= options_.max_connections || handshakes_ >= options_.max_handshakes) {
      probe_.Refused(RefusedReason::kLimit).Add();
      continue;
    }
    if (auto c = Add(std::move(fd), true); !c.ok()) {
      spdlog::warn("tls connection not accepted: {}", std::string(c.status().message()));
    }
  }
}

bool TlsTransport::Fail(RefusedReason reason, std::string why) {
  failure_ = {reason, std::move(why)};
  return false;
}

bool TlsTransport::Later(Connection& c, int r) {
  const int saved = errno;
  switch (SSL_get_error(c.ssl.get(), r)) {
    case SSL_ERROR_WANT_READ:
      c.readable = false;
      return true;
    case SSL_ERROR_WANT_WRITE:
      c.writable = false;
      c.blocked_on_write = true;
      return true;
    case SSL_ERROR_ZERO_RETURN:
      return Fail(RefusedReason::kHandshake, "the peer closed the connection");
    case SSL_ERROR_SYSCALL:
      ERR_clear_error();
      return Fail(RefusedReason::kHandshake, saved != 0
                                                 ? std::string("connection lost: ") + std::strerror(saved)
                                                 : "the peer closed the connection");
    default: {
      if (ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING) {
        ERR_clear_error();
        return Fail(RefusedReason::kHandshake, "the peer closed the connection");
      }
      const long verified = SSL_get_verify_result(c.ssl.get());
      std::string why = OpenSslReason();
      if (verified != X509_V_OK) {
        why = std::string("certificate verify failed: ") + X509_verify_cert_error_string(verified);
      }
      return Fail(RefusedReason::kHandshake, "TLS: " + why);
    }
  }
}

bool TlsTransport::Handshake(Connection& c) {
  ERR_clear_error();
  errno = 0;
  const int r = SSL_do_handshake(c.ssl.get());
  if (r != 1) return Later(c, r);
  c.established = true;
  c.readable = true;  // what came with the handshake's end lies in TLS's own buffer
  handshakes_ -= c.accepted;
  c.last_heard = options_.clock->Now();
  return true;
}

bool TlsTransport::Read(Connection& c) {
  size_t budget = kRoundBytes;
  while (c.readable && budget > 0) {
    const std::span<std::byte> dst = c.reader.Next();
    ERR_clear_error();
    errno = 0;
    size_t n = 0;
    const int r = SSL_read_ex(c.ssl.get(), dst.data(), std::min(dst.size(), budget), &n);
    if (r != 1) {
      if (!Later(c, r)) return false;
      if (c.blocked_on_write) break;  // TLS answers first (a new key)
      continue;
    }
    c.last_heard = options_.clock->Now();
    budget -= n;
    auto event = c.reader.Advance(n);
    if (!event.ok()) return Fail(RefusedReason::kProtocol, std::string(event.status().message()));
    if (!Receive(c, *event)) return false;
  }
  return true;
}

bool TlsTransport::Receive(Connection& c, TlsFrameReader::Event event) {
  switch (event) {
    case TlsFrameReader::Event::kNone:
      return true;
    case TlsFrameReader::Event::kMessage:
      probe_.received_control.Add(c.reader.message().size());
      events_.push_back([this, id = c.id, closed = c.closed, message = std::string(c.reader.message())] {
        if (!*closed && handler_ != nullptr) handler_->OnMessage(id, message);
      });
      return true;
    case TlsFrameReader::Event::kBulk: {
      const uint64_t length = c.reader.bulk_length();
      BulkSink sink;
      if (handler_ != nullptr) sink = handler_->OnBulk(c.id, c.reader.bulk_header(), length);
      TP_CHECK(sink.dst.empty() || sink.dst.size() == length);
      const bool dropped = sink.dst.empty() && length > 0;
      if (dropped || length == 0) {
        if (sink.done) {
          events_.push_back([done = std::move(sink.done), dropped] {
            done(dropped ? absl::CancelledError("dropped") : absl::OkStatus());
          });
        }
        return true;
      }
      c.reader.SetSink(sink.dst);
      c.sink = std::move(sink);
      return true;
    }
    case TlsFrameReader::Event::kBulkDone:
      probe_.received_bulk.Add(c.reader.bulk_length());
      if (c.sink.done) {
        events_.push_back([done = std::exchange(c.sink.done, nullptr)] { done(absl::OkStatus()); });
      }
      c.sink = {};
      return true;
  }
  return true;
}

// Control first, then the head of the next chunk: a control message waits for one chunk at most.
void TlsTransport::Stage(Connection& c) {
  c.staged.clear();
  c.staged_at = 0;
  while (!c.control.empty() && c.staged.size() < kStagedBytes) {
    c.staged += c.control.front();
    c.control_bytes -= c.control.front().size();
    c.control.pop_front();
  }
  if (c.bulks.empty()) return;
  OutBulk& bulk = c.bulks.front();
  if (!std::exchange(bulk.announced, true)) {
    AppendTlsHead(c.staged, TlsFrameType::kBulk, bulk.header.size(), bulk.payload.size());
    c.staged += bulk.header;
  }
  if (bulk.payload.empty()) {
    events_.push_back([done = std::move(bulk.done)] { done(absl::OkStatus()); });
    c.bulks.pop_front();
    return;
  }
  c.chunk_left = std::min(kTlsChunkBytes, bulk.payload.size() - bulk.offset);
  AppendTlsHead(c.staged, TlsFrameType::kChunk, 0, c.chunk_left);
}

bool TlsTransport::Write(Connection& c) {
  size_t budget = kRoundBytes;
  while (c.writable && budget > 0) {
    if (c.staged_at == c.staged.size() && c.chunk_left == 0) {
      Stage(c);
      if (c.staged.empty()) break;
    }
    const bool staged = c.staged_at < c.staged.size();
    OutBulk* bulk = staged ? nullptr : &c.bulks.front();
    const void* from = staged ? static_cast<const void*>(c.staged.data() + c.staged_at)
                              : bulk->payload.data() + bulk->offset;
    const size_t size = staged ? c.staged.size() - c.staged_at : c.chunk_left;
    ERR_clear_error();
    errno = 0;
    size_t n = 0;
    const int r = SSL_write_ex(c.ssl.get(), from, size, &n);
    if (r != 1) {
      if (!Later(c, r)) return false;
      if (!c.readable && c.writable) break;  // TLS waits for the peer
      continue;
    }
    c.blocked_on_write = false;
    c.last_sent = options_.clock->Now();
    budget -= std::min(budget, n);
    if (staged) {
      c.staged_at += n;
      continue;
    }
    bulk->offset += n;
    c.chunk_left -= n;
    if (bulk->offset == bulk->payload.size()) {
      probe_.sent_bulk.Add(bulk->payload.size());
      events_.push_back([done = std::move(bulk->done)] { done(absl::OkStatus()); });
      c.bulks.pop_front();
    }
  }
  return true;
}

void TlsTransport::Advance(Connection& c) {
  const EndpointId id = c.id;
  bool ok = true;
  if (!c.established && (c.readable || c.writable)) {
    ok = Handshake(c);
  }
  if (ok && c.established) {
    if (c.blocked_on_write && c.writable) c.blocked_on_write = false;
    ok = Read(c);
    if (ok && c.wants_write()) ok = Write(c);
  }
  if (!ok) {
    Lose(id);
    return;
  }
  // Stopped by the budget, not by the socket: it goes on in the next round.
  if (c.established && (c.readable || (c.writable && c.wants_write()))) ready_.push_back(id);
}

// The connection failed by itself. Whoever has never proved who it is is no endpoint yet, and the handler
// does not hear of it.
void TlsTransport::Lose(EndpointId id) {
  Connection* c = Find(id);
  const bool stranger = c->accepted && !c->established;
  const bool refused =
      stranger || failure_.first != RefusedReason::kHandshake || failure_.second.starts_with("TLS: ");
  if (refused) {
    probe_.Refused(failure_.first).Add();
    // Strangers can make these at will: one line a second.
    const absl::Time now = options_.clock->Now();
    if (now >= next_warning_) {
      spdlog::warn("tls connection ended: {}{}", failure_.second,
                   unwarned_ > 0 ? " (and " + std::to_string(unwarned_) + " more)" : "");
      next_warning_ = now + absl::Seconds(1);
      unwarned_ = 0;
    } else {
      ++unwarned_;
    }
  }
  const absl::Status why = absl::UnavailableError(failure_.second);
  const std::shared_ptr<bool> closed = c->closed;
  Drop(id, why);
  if (stranger) return;
  lost_[id] = closed;
  events_.push_back([this, id, why, closed] {
    lost_.erase(id);
    if (!*closed && handler_ != nullptr) handler_->OnEndpointDown(id, why);
  });
}

void TlsTransport::Drop(EndpointId id, const absl::Status& why) {
  auto it = connections_.find(id);
  Connection& c = *it->second;
  for (OutBulk& bulk : c.bulks) {
    events_.push_back([done = std::move(bulk.done), why] { done(why); });
  }
  if (c.sink.done) events_.push_back([done = std::move(c.sink.done), why] { done(why); });
  if (c.accepted && !c.established) --handshakes_;
  probe_.connections.Add(-1);
  connections_.erase(it);
}

absl::Status TlsTransport::Send(EndpointId to, std::string_view message) {
  if (message.size() > kMaxMessageBytes) {
    return absl::InvalidArgumentError("message of " + std::to_string(message.size()) +
                                      " bytes exceeds the limit of " + std::to_string(kMaxMessageBytes));
  }
  Connection* c = Find(to);
  if (c == nullptr) return absl::UnavailableError("the endpoint is down");
  if (c->control_bytes + message.size() > kMaxControlBytes) {
    return absl::ResourceExhaustedError("4 MiB of control messages wait for a peer that does not read");
  }
  std::string frame;
  frame.reserve(kTlsHeadBytes + message.size());
  AppendTlsHead(frame, TlsFrameType::kMessage, 0, message.size());
  frame += message;
  c->control_bytes += frame.size();
  c->control.push_back(std::move(frame));
  probe_.sent_control.Add(message.size());
  if (c->writable) ready_.push_back(to);
  return absl::OkStatus();
}

absl::Status TlsTransport::SendBulk(EndpointId to, std::string_view header,
                                    std::span<const std::byte> payload,
                                    std::function<void(absl::Status)> done) {
  if (header.size() > kTlsMaxBulkHeaderBytes) {
    return absl::InvalidArgumentError("bulk header exceeds 512 bytes");
  }
  if (payload.size() > kTlsMaxBulkBytes) return absl::InvalidArgumentError("bulk payload exceeds 64 GiB");
  Connection* c = Find(to);
  if (c == nullptr) return absl::UnavailableError("the endpoint is down");
  if (c->bulks.size() >= kMaxQueuedBulks) {
    return absl::ResourceExhaustedError("4096 bulk transfers wait for the same peer");
  }
  c->bulks.push_back({std::string(header), payload, std::move(done)});
  if (c->writable) ready_.push_back(to);
  return absl::OkStatus();
}

void TlsTransport::Close(EndpointId endpoint, std::function<void()> quiesced) {
  if (Connection* c = Find(endpoint); c != nullptr) {
    // One attempt to say goodbye; whether it leaves is not waited for.
    if (c->established && !c->blocked_on_write) {
      ERR_clear_error();
      SSL_shutdown(c->ssl.get());
      ERR_clear_error();
    }
    *c->closed = true;
    Drop(endpoint, absl::CancelledError("the endpoint was closed"));
  } else if (auto lost = lost_.find(endpoint); lost != lost_.end()) {
    *lost->second = true;
  }
  events_.push_back(std::move(quiesced));
}

void TlsTransport::CheckTimers(absl::Time now) {
  next_timers_ = now + kTimerStep;
  if (!acceptable_ && now >= accept_after_ && accept_after_ != absl::Time()) {
    acceptable_ = true;
    accept_after_ = absl::Time();
  }
  std::vector<EndpointId> late;
  for (auto& [id, c] : connections_) {
    if (!c->established) {
      if (now - c->born > options_.handshake_timeout) late.push_back(id);
    } else if (now - c->last_heard > options_.idle_timeout) {
      late.push_back(id);
    } else if (now - c->last_sent > options_.idle_timeout / 3 && !c->wants_write()) {
      std::string frame;
      AppendTlsHead(frame, TlsFrameType::kKeepAlive, 0, 0);
      c->control_bytes += frame.size();
      c->control.push_back(std::move(frame));
      ready_.push_back(id);
    }
  }
  for (EndpointId id : late) {
    if (Find(id)->established) {
      Fail(RefusedReason::kIdle, "the peer was silent for " + absl::FormatDuration(options_.idle_timeout));
    } else {
      Fail(RefusedReason::kHandshakeTimeout,
           "no TLS handshake within " + absl::FormatDuration(options_.handshake_timeout));
    }
    Lose(id);
  }
}

int TlsTransport::Progress() {
  epoll_event polled[64];
  const int n = epoll_wait(epoll_.get(), polled, 64, 0);
  int handled = 0;
  for (int i = 0; i < n; ++i) {
    const uint64_t tag = polled[i].data.u64;
    if (tag == kListenTag) {
      acceptable_ = true;
    } else if (tag == kWakeTag) {
      uint64_t count;
      [[maybe_unused]] const ssize_t r = read(wake_.get(), &count, sizeof count);
    } else if (Connection* c = Find(tag); c != nullptr) {
      if ((polled[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) c->readable = true;
      if ((polled[i].events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0) c->writable = true;
      ready_.push_back(tag);
    }
  }
  if (acceptable_) Accept();
  std::vector<EndpointId> ready = std::exchange(ready_, {});
  std::sort(ready.begin(), ready.end());
  ready.erase(std::unique(ready.begin(), ready.end()), ready.end());
  for (EndpointId id : ready) {
    if (Connection* c = Find(id); c != nullptr) {
      Advance(*c);
      ++handled;
    }
  }
  const absl::Time now = options_.clock->Now();
  if (now >= next_timers_) CheckTimers(now);
  // What the handlers cause in turn waits for the next round.
  for (size_t k = events_.size(); k > 0; --k) {
    auto event = std::move(events_.front());
    events_.pop_front();
    event();
    ++handled;
  }
  return handled;
}

void TlsTransport::Wait(int timeout_ms) {
  if (!events_.empty() || !ready_.empty() || acceptable_) return;
  // Deadlines of connections are looked at from Progress.
  if (!connections_.empty() || accept_after_ != absl::Time()) {
    const absl::Duration step = handshakes_ > 0 || accept_after_ != absl::Time()
                                    ? kTimerStep
                                    : std::min(absl::Seconds(1), options_.handshake_timeout / 4);
    timeout_ms = std::min<int64_t>(timeout_ms, std::max<int64_t>(1, absl::ToInt64Milliseconds(step)));
  }
  // Edges are only reported once: leave them to Progress by looking at the epoll set itself.
  pollfd set{epoll_.get(), POLLIN, 0};
  poll(&set, 1, timeout_ms);
}

void TlsTransport::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(wake_.get(), &one, sizeof one);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Transport>> CreateTlsTransport(const TlsTransportOptions& options) {
  auto transport = std::make_unique<TlsTransport>(options);
  TP_RETURN_IF_ERROR(transport->Init());
  return std::unique_ptr<Transport>(std::move(transport));
}

}  // namespace tidepool
