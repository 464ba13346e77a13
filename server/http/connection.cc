#include "server/http/connection.h"

#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sys/socket.h>

#include <boost/asio/post.hpp>

#include "base/log.h"

namespace tidepool {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;

// Pipelined bytes read ahead while an answer is pending: only read to notice the client's leaving.
constexpr size_t kReadAheadBytes = 64u << 10;
constexpr size_t kUploadProgressBytes = 1 << 20;  // in each body_timeout
// Of a stalled answer in each slow_client_timeout: a byte now and then does not hold it for ever.
constexpr size_t kWriteProgressBytes = 64u << 10;
constexpr size_t kReadBytes = 16u << 10;
// After a refusal the rest of the request is read and dropped for this long, or the reset that closing would
// cause could overtake the answer.
constexpr absl::Duration kLinger = absl::Seconds(2);
constexpr size_t kLingerBytes = 64u << 20;
// Small, so that a client that stops reading shows within the stream buffer rather than in the kernel's.
constexpr int kSendBufferBytes = 128 << 10;
constexpr size_t kPathShown = 256;  // of the client's own path, in an error
// What one Flush writes without giving way.
constexpr int kFlushRoundsMax = 16;
// A peer that is silently gone (no RST) fails a write after this long.
constexpr unsigned kUserTimeoutMs = 20'000;

}  // namespace

void HttpShared::RequestBegan() {
  std::lock_guard lock(mu);
  ++inflight;
}

void HttpShared::RequestEnded() {
  {
    std::lock_guard lock(mu);
    --inflight;
  }
  changed.notify_all();
}

HttpConnection::HttpConnection(std::shared_ptr<HttpShared> shared, Socket socket,
                               std::shared_ptr<asio::ssl::context> tls)
    : shared_(std::move(shared)),
      socket_(std::move(socket)),
      tls_context_(std::move(tls)),
      read_timer_(socket_.get_executor()),
      write_timer_(socket_.get_executor()),
      reader_(shared_->limits, &shared_->uploads, &shared_->body_wanted) {
  if (tls_context_) tls_.emplace(socket_, *tls_context_);
  error_code ignored;
  socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket_.non_blocking(true, ignored);  // for WriteNow
  socket_.set_option(asio::socket_base::send_buffer_size(kSendBufferBytes), ignored);
  ::setsockopt(socket_.native_handle(), IPPROTO_TCP, TCP_USER_TIMEOUT, &kUserTimeoutMs,
               sizeof kUserTimeoutMs);
}

void HttpConnection::Start() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    if (self->state_ == State::kClosed) return;
    self->ArmReadTimer(self->shared_->limits.header_timeout);
    self->tls_ ? self->Handshake() : self->Read();
  });
}

void HttpConnection::Handshake() {
  state_ = State::kHandshake;
  tls_->async_handshake(asio::ssl::stream_base::server,
                        [self = shared_from_this()](error_code ec) { self->OnHandshake(ec); });
}

void HttpConnection::OnHandshake(error_code ec) {
  if (state_ == State::kClosed) return;
  if (!ec) {
    state_ = State::kHeader;
    ArmReadTimer(shared_->limits.header_timeout);
    return Read();
  }
  ++shared_->tls_failures;
  if (ec.category() == asio::error::get_ssl_category() && ERR_GET_REASON(ec.value()) == SSL_R_HTTP_REQUEST) {
    // Somebody typed http: for https:. What OpenSSL put into the socket so far is nothing.
    const std::string body = HttpErrorBody(http_errors::kBadHttp, "this port speaks TLS; use https");
    const std::string bytes =
        ResponseHead(400,
                     {{"Content-Type", "application/json"}, {"Content-Length", std::to_string(body.size())}},
                     false, true) +
        body;
    (void)::send(socket_.native_handle(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  Close(DisconnectReason::kClientGone);
}

void HttpConnection::RefuseConnection() {
  error_code ignored;
  // In TLS an answer would take a handshake.
  if (tls_) {
    socket_.close(ignored);
    return;
  }
  // The answer fits the empty send buffer, so one write that does not wait is all it takes; a client beyond
  // the limit is owed no memory.
  const std::string body =
      HttpErrorBody(http_errors::kTooManyConnections, "too many connections; try again later");
  const std::string bytes = ResponseHead(503,
                                         {{"Content-Type", "application/json"},
                                          {"Retry-After", "1"},
                                          {"Retry-After-Ms", "1000"},
                                          {"Content-Length", std::to_string(body.size())}},
                                         false, true) +
                            body;
  const int fd = socket_.native_handle();
  if (::send(fd, bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) ::shutdown(fd, SHUT_WR);
  // What the client sent already is read, or closing would reset the connection and lose the answer.
  char drop[4096];
  for (int i = 0; i < 16 && ::recv(fd, drop, sizeof drop, MSG_DONTWAIT) > 0; ++i) {
  }
  socket_.close(ignored);
}

void HttpConnection::Drain() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    const bool quiet = self->state_ == State::kHeader && self->reader_.idle();
    if (quiet || self->state_ == State::kHandshake) self->Close(DisconnectReason::kShutdown);
  });
}

void HttpConnection::Cut(DisconnectReason reason) {
  asio::post(socket_.get_executor(), [self = shared_from_this(), reason] {
    error_code ignored;
    // A reset, so that the kernel does not keep what the client does not read.
    self->socket_.set_option(asio::socket_base::linger(true, 0), ignored);
    self->Close(reason);
  });
}

void HttpConnection::ArmReadTimer(absl::Duration after) {
  const uint64_t epoch = ++read_timer_epoch_;
  read_timer_.expires_after(absl::ToChronoNanoseconds(after));
  read_timer_.async_wait([self = shared_from_this(), epoch](error_code ec) {
    if (!ec && epoch == self->read_timer_epoch_) self->OnReadTimeout();
  });
}

void HttpConnection::OnReadTimeout() {
  switch (state_) {
    case State::kHandshake:
      ++shared_->tls_failures;
      return Close(DisconnectReason::kClientGone);
    case State::kHeader:
      // Between requests nobody is owed an answer.
      if (reader_.idle()) return Close(DisconnectReason::kClientGone);
      return Refuse(http_errors::kSlowRequest, "the request's headers did not arrive in time");
    case State::kBody:
      return Refuse(http_errors::kSlowRequest, "the request's body did not arrive in time");
    case State::kLingering:
      return Close(DisconnectReason::kClientGone);
    case State::kResponding:
    case State::kClosed:
      return;
  }
}

void HttpConnection::NextRequest() {
  state_ = State::kHeader;
  if (shared_->draining && reader_.idle()) return Linger();
  ArmReadTimer(reader_.idle() ? shared_->limits.idle_timeout : shared_->limits.header_timeout);
  Parse();
  Read();
}

void HttpConnection::Read() {
  if (reading_ || state_ == State::kClosed) return;
  if (state_ == State::kResponding && reader_.unread() >= kReadAheadBytes) return;
  reading_ = true;
  auto done = [self = shared_from_this()](error_code ec, size_t bytes) { self->OnRead(ec, bytes); };
  const auto room = reader_.Prepare(kReadBytes);
  tls_ ? tls_->async_read_some(room, std::move(done)) : socket_.async_read_some(room, std::move(done));
}

void HttpConnection::OnRead(error_code ec, size_t bytes) {
  reading_ = false;
  if (state_ == State::kClosed) return;
  if (ec) return Close(DisconnectReason::kClientGone);
  if (state_ == State::kLingering) {
    lingered_ += bytes;
    if (lingered_ > kLingerBytes) return Close(DisconnectReason::kClientGone);
    return Read();
  }
  const bool first = state_ == State::kHeader && reader_.idle();
  reader_.Commit(bytes);
  if (first) ArmReadTimer(shared_->limits.header_timeout);
  // An upload may take long, as long as it moves.
  if (state_ == State::kBody && reader_.uploading()) {
    upload_progress_bytes_ += bytes;
    if (upload_progress_bytes_ >= kUploadProgressBytes) {
      upload_progress_bytes_ = 0;
      ArmReadTimer(shared_->limits.body_timeout);
    }
  }
  Parse();
  Read();
}

void HttpConnection::Parse() {
  while (state_ == State::kHeader || state_ == State::kBody) {
    switch (reader_.Next()) {
      case RequestReader::Step::kMore:
        return;
      case RequestReader::Step::kHead:
        state_ = State::kBody;
        ArmReadTimer(shared_->limits.body_timeout);
        if (reader_.wants_continue()) {
          own_out_ += "HTTP/1.1 100 Continue\r\n\r\n";
          Flush();
        }
        break;
      case RequestReader::Step::kRequest:
        return Dispatch();
      case RequestReader::Step::kError:
        return Refuse(reader_.error().kind, reader_.error().message);
    }
  }
}

std::string HttpConnection::Peer() const {
  error_code ignored;
  return socket_.remote_endpoint(ignored).address().to_string();
}

void HttpConnection::Dispatch() {
  state_ = State::kResponding;
  ++read_timer_epoch_;
  read_timer_.cancel();

  RequestReader::Taken taken = reader_.Take();
  HttpRequest& request = taken.request;
  request.peer = Peer();
  std::optional<HttpReply> reply;
  if (shared_->filter) reply = shared_->filter(request);

  Exchange::Context context;
  context.keep_alive = taken.keep_alive && !shared_->draining;
  context.http11 = taken.http11;
  context.head = request.method == "HEAD";
  context.buffer_bytes_max = shared_->limits.stream_buffer_bytes_max;
  context.observer = request.observer;
  // Weak: a writer may outlive the connection. Posted: never on the caller's thread.
  context.wake = [weak = weak_from_this(), shared = shared_] {
    auto self = weak.lock();
    if (self == nullptr) return;
    auto executor = self->socket_.get_executor();
    asio::post(executor, [weak] {
      if (auto self = weak.lock()) self->Flush();
    });
  };
  context.cut = [weak = weak_from_this(), shared = shared_](DisconnectReason reason) {
    if (auto self = weak.lock()) self->Cut(reason);
  };
  exchange_ = std::make_shared<Exchange>(std::move(context));
  answer_taken_ = false;
  shared_->RequestBegan();
  auto writer = std::make_shared<ExchangeWriter>(exchange_);
  if (reply) return writer->Send(reply->status, std::move(reply->headers), std::move(reply->body));
  Route(std::move(request), taken.bad_path, std::move(writer));
}

void HttpConnection::Route(HttpRequest request, bool bad_path, std::shared_ptr<ResponseWriter> writer) {
  const auto refuse = [&](const HttpErrorKind& kind, const std::string& message, HttpHeaders headers = {}) {
    headers.emplace_back("Content-Type", "application/json");
    writer->Send(kind.status, std::move(headers), HttpErrorBody(kind, message));
  };
  if (bad_path) return refuse(http_errors::kBadHttp, "the path holds a malformed % escape");
  Router::Match match = shared_->router.Find(request.method == "HEAD" ? "GET" : request.method, request.path);
  if (match.handler == nullptr && match.allow.empty()) {
    return refuse(http_errors::kNotFound, "there is nothing at " + request.path.substr(0, kPathShown));
  }
  if (match.handler == nullptr) {
    return refuse(http_errors::kMethodNotAllowed,
                  request.path.substr(0, kPathShown) + " takes " + match.allow + ", not " + request.method,
                  {{"Allow", match.allow}});
  }
  request.param = std::move(match.param);
  try {
    (*match.handler)(std::move(request), std::move(writer));
  } catch (const std::exception& e) {
    // Third-party code below a handler may throw; the writer's destructor answered 500.
    spdlog::error("http handler failed: {}", e.what());
  }
}

void HttpConnection::Refuse(const HttpErrorKind& kind, std::string_view message) {
  ++shared_->protocol_errors;
  if (shared_->on_refusal) shared_->on_refusal(kind.status, kind.code, Peer());
  const std::string body = HttpErrorBody(kind, message);
  own_out_ += ResponseHead(
      kind.status, {{"Content-Type", "application/json"}, {"Content-Length", std::to_string(body.size())}},
      false, true);
  own_out_ += body;
  close_after_own_ = true;
  reader_.DropUnread();
  // Lingering from now on: whatever still arrives is dropped.
  state_ = State::kLingering;
  ArmReadTimer(kLinger + shared_->limits.slow_client_timeout);
  Flush();
}

void HttpConnection::Flush() {
  if (state_ == State::kClosed || !writing_.empty()) return;
  for (int round = 0; NextBytes(); ++round) {
    if (!WriteNow()) return WriteSoon();
    if (round < kFlushRoundsMax) continue;
    // A writer as fast as the socket must not keep this thread from the other connections.
    asio::post(socket_.get_executor(), [self = shared_from_this()] { self->Flush(); });
    return;
  }
}

// Fills writing_ with what goes out next; false: nothing does, or the connection has gone on to what comes
// after its answer.
bool HttpConnection::NextBytes() {
  if (state_ == State::kClosed) return false;
  written_ = 0;
  if (!own_out_.empty()) {
    writing_.swap(own_out_);
    own_out_.clear();
    writing_answer_ = false;
    return true;
  }
  if (close_after_own_) {
    Linger();
    return false;
  }
  if (exchange_ == nullptr) return false;
  if (!answer_taken_) {
    answer_taken_ = exchange_->Take(writing_);
    writing_answer_ = !writing_.empty();
    if (writing_answer_) return true;
  }
  if (answer_taken_) ResponseDone();
  return false;
}

// A stream's next event is small and the kernel has room for it: no timer, no second trip through the
// executor, which together cost more than the write. True: all of writing_ is out (or the connection closed).
bool HttpConnection::WriteNow() {
  if (tls_) return false;
  error_code ec;
  const size_t bytes =
      socket_.write_some(asio::buffer(writing_.data() + written_, writing_.size() - written_), ec);
  if (ec == asio::error::would_block || ec == asio::error::try_again) return false;
  if (ec) {
    Close(DisconnectReason::kClientGone);
    return true;
  }
  Wrote(bytes);
  return writing_.empty();
}

void HttpConnection::WriteSoon() {
  if (!write_timer_armed_) {
    write_timer_armed_ = true;
    write_progress_bytes_ = 0;
    const uint64_t epoch = ++write_timer_epoch_;
    write_timer_.expires_after(absl::ToChronoNanoseconds(shared_->limits.slow_client_timeout));
    write_timer_.async_wait([self = shared_from_this(), epoch](error_code ec) {
      if (!ec && epoch == self->write_timer_epoch_) self->Cut(DisconnectReason::kSlowClient);
    });
  }
  // One write_some at a time, so that progress is seen.
  auto done = [self = shared_from_this()](error_code ec, size_t bytes) { self->OnWrite(ec, bytes); };
  const auto bytes = asio::buffer(writing_.data() + written_, writing_.size() - written_);
  tls_ ? tls_->async_write_some(bytes, std::move(done)) : socket_.async_write_some(bytes, std::move(done));
}

void HttpConnection::OnWrite(error_code ec, size_t bytes) {
  if (state_ == State::kClosed) return;
  if (ec) return Close(DisconnectReason::kClientGone);
  Wrote(bytes);
  write_progress_bytes_ += bytes;
  if (writing_.empty() || write_progress_bytes_ >= kWriteProgressBytes) {
    ++write_timer_epoch_;
    write_timer_.cancel();
    write_timer_armed_ = false;
  }
  if (!writing_.empty()) return WriteSoon();
  Flush();
}

void HttpConnection::Wrote(size_t bytes) {
  if (writing_answer_ && exchange_ != nullptr) exchange_->Wrote(bytes);
  written_ += bytes;
  if (written_ == writing_.size()) writing_.clear();
}

void HttpConnection::ResponseDone() {
  const bool keep_alive = exchange_->keep_alive() && !shared_->draining;
  exchange_.reset();
  std::string().swap(writing_);  // its capacity was the stream's
  shared_->RequestEnded();
  if (keep_alive) return NextRequest();
  Linger();
}

void HttpConnection::Linger() {
  state_ = State::kLingering;
  reader_.DropUnread();
  ArmReadTimer(kLinger);
  if (tls_) {
    // Says close_notify, and waits for the client's: the read timer ends it where none comes.
    tls_->async_shutdown(
        [self = shared_from_this()](error_code) { self->Close(DisconnectReason::kClientGone); });
  } else {
    error_code ignored;
    socket_.shutdown(asio::socket_base::shutdown_send, ignored);
  }
  Read();
}

void HttpConnection::Close(DisconnectReason reason) {
  if (state_ == State::kClosed) return;
  state_ = State::kClosed;
  ++read_timer_epoch_;
  ++write_timer_epoch_;
  read_timer_.cancel();
  write_timer_.cancel();
  error_code ignored;
  socket_.close(ignored);
  if (exchange_ != nullptr) {
    exchange_->Disconnect(reason);
    exchange_.reset();
    shared_->RequestEnded();
  }
  {
    std::lock_guard lock(shared_->mu);
    shared_->connections.erase(this);
  }
  shared_->changed.notify_all();
}

}  // namespace tidepool
