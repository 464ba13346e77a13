#include "server/http/connection.h"

#include <netinet/tcp.h>
#include <sys/socket.h>

#include <boost/asio/post.hpp>
#include <boost/beast/http/error.hpp>

#include "absl/strings/ascii.h"
#include "base/log.h"

namespace tidepool {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

// Pipelined bytes read ahead while an answer is pending: only read to notice the client's leaving.
constexpr size_t kReadAheadBytes = 64u << 10;
constexpr size_t kReadBytes = 16u << 10;
// After a refusal the rest of the request is read and dropped for this long, or the reset that closing would
// cause could overtake the answer.
constexpr absl::Duration kLinger = absl::Seconds(2);
constexpr size_t kLingerBytes = 64u << 20;
// Small, so that a client that stops reading shows within the stream buffer rather than in the kernel's.
constexpr int kSendBufferBytes = 128 << 10;
// A peer that is silently gone (no RST) fails a write after this long.
constexpr unsigned kUserTimeoutMs = 20'000;

std::string_view View(boost::beast::string_view s) { return {s.data(), s.size()}; }

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

HttpConnection::HttpConnection(std::shared_ptr<HttpShared> shared, Socket socket)
    : shared_(std::move(shared)),
      socket_(std::move(socket)),
      read_timer_(socket_.get_executor()),
      write_timer_(socket_.get_executor()) {
  error_code ignored;
  socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket_.set_option(asio::socket_base::send_buffer_size(kSendBufferBytes), ignored);
  ::setsockopt(socket_.native_handle(), IPPROTO_TCP, TCP_USER_TIMEOUT, &kUserTimeoutMs,
               sizeof kUserTimeoutMs);
}

void HttpConnection::Start() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    if (self->state_ == State::kClosed) return;
    self->ArmReadTimer(self->shared_->limits.header_timeout);
    self->Read();
  });
}

void HttpConnection::RefuseConnection() {
  // The answer fits the empty send buffer, so one write that does not wait is all it takes; a client beyond
  // the limit is owed no memory.
  const std::string body =
      HttpErrorBody(503, "too_many_connections", "too many connections; try again later");
  const std::string bytes = ResponseHead(503,
                                         {{"Content-Type", "application/json"},
                                          {"Retry-After", "1"},
                                          {"Content-Length", std::to_string(body.size())}},
                                         false, true) +
                            body;
  const int fd = socket_.native_handle();
  if (::send(fd, bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) ::shutdown(fd, SHUT_WR);
  // What the client sent already is read, or closing would reset the connection and lose the answer.
  char drop[4096];
  for (int i = 0; i < 16 && ::recv(fd, drop, sizeof drop, MSG_DONTWAIT) > 0; ++i) {
  }
  error_code ignored;
  socket_.close(ignored);
}

void HttpConnection::Drain() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    if (self->state_ == State::kHeader && self->buffer_.size() == 0) self->Close(DisconnectReason::kShutdown);
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
    case State::kHeader:
      // Between requests nobody is owed an answer.
      if (buffer_.size() == 0 && parser_ == std::nullopt) return Close(DisconnectReason::kClientGone);
      return Refuse(408, "request_timeout", "the request's headers did not arrive in time");
    case State::kBody:
      return Refuse(408, "request_timeout", "the request's body did not arrive in time");
    case State::kLingering:
      return Close(DisconnectReason::kClientGone);
    case State::kResponding:
    case State::kClosed:
      return;
  }
}

void HttpConnection::NextRequest() {
  state_ = State::kHeader;
  parser_.reset();
  if (shared_->draining && buffer_.size() == 0) return Linger();
  ArmReadTimer(buffer_.size() == 0 ? shared_->limits.idle_timeout : shared_->limits.header_timeout);
  Parse();
  Read();
}

void HttpConnection::Read() {
  if (reading_ || state_ == State::kClosed) return;
  if (state_ == State::kResponding && buffer_.size() >= kReadAheadBytes) return;
  reading_ = true;
  socket_.async_read_some(
      buffer_.prepare(kReadBytes),
      [self = shared_from_this()](error_code ec, size_t bytes) { self->OnRead(ec, bytes); });
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
  const bool first = state_ == State::kHeader && buffer_.size() == 0 && !parser_;
  buffer_.commit(bytes);
  if (first) ArmReadTimer(shared_->limits.header_timeout);
  Parse();
  Read();
}

void HttpConnection::Parse() {
  const HttpLimits& limits = shared_->limits;
  while ((state_ == State::kHeader || state_ == State::kBody) && buffer_.size() > 0) {
    if (!parser_) {
      parser_.emplace();
      parser_->header_limit(static_cast<uint32_t>(limits.header_bytes_max));
      parser_->body_limit(limits.body_bytes_max);
      parser_->eager(false);  // stop after the headers: they are judged before the body is read
    }
    error_code ec;
    const size_t used = parser_->put(buffer_.data(), ec);
    buffer_.consume(used);
    if (ec == http::error::need_more) {
      // Only headers and chunk headers pile up here.
      if (buffer_.size() > limits.header_bytes_max) {
        return Refuse(state_ == State::kHeader ? 431 : 400, "header_too_large",
                      "the request's headers or chunk headers are too large");
      }
      if (used == 0) return;
      ec = {};
    }
    if (ec == http::error::header_limit) {
      return Refuse(431, "header_too_large",
                    "the request's headers exceed " + std::to_string(limits.header_bytes_max) + " bytes");
    }
    if (ec == http::error::body_limit) {
      return Refuse(413, "request_too_large",
                    "the request's body exceeds " + std::to_string(limits.body_bytes_max) +
                        " bytes; shorten the input");
    }
    if (ec) return Refuse(400, "bad_http", "malformed HTTP request: " + ec.message());
    if (state_ == State::kHeader && parser_->is_header_done()) {
      if (!CheckHead()) return;
      state_ = State::kBody;
      ArmReadTimer(limits.body_timeout);
    }
    if (parser_->is_done()) return Dispatch();
  }
}

bool HttpConnection::CheckHead() {
  const HttpLimits& limits = shared_->limits;
  const auto& head = parser_->get();
  if (head.version() != 10 && head.version() != 11) {
    Refuse(505, "bad_http_version", "only HTTP/1.0 and HTTP/1.1 are spoken here");
    return false;
  }
  if (head.target().size() > limits.header_field_bytes_max) {
    Refuse(414, "uri_too_long",
           "the request target exceeds " + std::to_string(limits.header_field_bytes_max) + " bytes");
    return false;
  }
  size_t count = 0, lengths = 0, hosts = 0, encodings = 0;
  for (const auto& field : head) {
    ++count;
    lengths += field.name() == http::field::content_length;
    hosts += field.name() == http::field::host;
    encodings += field.name() == http::field::transfer_encoding;
    if (field.name_string().size() + field.value().size() > limits.header_field_bytes_max) {
      Refuse(431, "header_too_large",
             "a header exceeds " + std::to_string(limits.header_field_bytes_max) + " bytes");
      return false;
    }
  }
  if (count > limits.header_count_max) {
    Refuse(431, "header_too_large", "more than " + std::to_string(limits.header_count_max) + " headers");
    return false;
  }
  // Two lengths, or a length and an encoding, are how requests are smuggled past proxies.
  if (lengths > 1 || (lengths > 0 && encodings > 0)) {
    Refuse(400, "bad_http", "Content-Length may be given once, and not with Transfer-Encoding");
    return false;
  }
  if (encodings > 0 && (encodings > 1 || !parser_->chunked() || head.version() == 10 ||
                        !boost::beast::iequals(head[http::field::transfer_encoding], "chunked"))) {
    Refuse(400, "bad_http", "the only Transfer-Encoding taken is chunked, in HTTP/1.1");
    return false;
  }
  if (hosts > 1 || (hosts == 0 && head.version() == 11)) {
    Refuse(400, "bad_http", "a request carries exactly one Host header");
    return false;
  }
  if (auto it = head.find(http::field::expect); it != head.end()) {
    if (!boost::beast::iequals(it->value(), "100-continue")) {
      Refuse(417, "expectation_failed", "the only expectation met is 100-continue");
      return false;
    }
    if (head.version() == 11 && !parser_->is_done()) {
      own_out_ += "HTTP/1.1 100 Continue\r\n\r\n";
      Flush();
    }
  }
  return true;
}

void HttpConnection::Dispatch() {
  state_ = State::kResponding;
  ++read_timer_epoch_;
  read_timer_.cancel();

  auto message = parser_->release();
  HttpRequest request;
  request.method = std::string(View(message.method_string()));
  const std::string_view target = View(message.target());
  const size_t query = target.find('?');
  if (query != std::string_view::npos) request.query = std::string(target.substr(query + 1));
  const auto path = PercentDecode(target.substr(0, query));
  for (const auto& field : message) {
    request.headers.emplace_back(absl::AsciiStrToLower(std::string(View(field.name_string()))),
                                 std::string(View(field.value())));
  }
  request.body = std::move(message.body());
  error_code ignored;
  request.peer = socket_.remote_endpoint(ignored).address().to_string();

  Exchange::Context context;
  context.keep_alive = message.keep_alive() && !shared_->draining;
  context.http11 = message.version() == 11;
  context.head = request.method == "HEAD";
  context.buffer_bytes_max = shared_->limits.stream_buffer_bytes_max;
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

  const HttpHeaders json = {{"Content-Type", "application/json"}};
  if (!path) {
    return writer->Send(400, json, HttpErrorBody(400, "bad_http", "the path holds a malformed % escape"));
  }
  request.path = *path;
  Router::Match match = shared_->router.Find(request.method == "HEAD" ? "GET" : request.method, request.path);
  if (match.handler == nullptr) {
    if (match.allow.empty()) {
      return writer->Send(404, json, HttpErrorBody(404, "not_found", "there is nothing at " + request.path));
    }
    return writer->Send(405, {{"Content-Type", "application/json"}, {"Allow", match.allow}},
                        HttpErrorBody(405, "method_not_allowed",
                                      request.path + " takes " + match.allow + ", not " + request.method));
  }
  request.param = std::move(match.param);
  try {
    (*match.handler)(std::move(request), std::move(writer));
  } catch (const std::exception& e) {
    // Third-party code below a handler may throw; the writer's destructor answered 500.
    spdlog::error("http handler failed: {}", e.what());
  }
}

void HttpConnection::Refuse(int status, std::string_view code, std::string_view message) {
  ++shared_->protocol_errors;
  const std::string body = HttpErrorBody(status, code, message);
  own_out_ += ResponseHead(
      status, {{"Content-Type", "application/json"}, {"Content-Length", std::to_string(body.size())}}, false,
      true);
  own_out_ += body;
  close_after_own_ = true;
  buffer_.consume(buffer_.size());
  // Lingering from now on: whatever still arrives is dropped.
  state_ = State::kLingering;
  ArmReadTimer(kLinger + shared_->limits.slow_client_timeout);
  Flush();
}

void HttpConnection::Flush() {
  if (state_ == State::kClosed || !writing_.empty()) return;
  written_ = 0;
  if (!own_out_.empty()) {
    writing_.swap(own_out_);
    own_out_.clear();
    writing_answer_ = false;
    return Write();
  }
  if (close_after_own_) return Linger();
  if (exchange_ == nullptr) return;
  if (!answer_taken_) {
    Exchange::Taken taken = exchange_->Take();
    answer_taken_ = taken.complete;
    if (!taken.bytes.empty()) {
      writing_ = std::move(taken.bytes);
      writing_answer_ = true;
      return Write();
    }
  }
  if (answer_taken_) ResponseDone();
}

void HttpConnection::Write() {
  const uint64_t epoch = ++write_timer_epoch_;
  write_timer_.expires_after(absl::ToChronoNanoseconds(shared_->limits.slow_client_timeout));
  write_timer_.async_wait([self = shared_from_this(), epoch](error_code ec) {
    if (!ec && epoch == self->write_timer_epoch_) self->Cut(DisconnectReason::kSlowClient);
  });
  // One write_some at a time, so that any progress restarts the slow client's clock.
  socket_.async_write_some(
      asio::buffer(writing_.data() + written_, writing_.size() - written_),
      [self = shared_from_this()](error_code ec, size_t bytes) { self->OnWrite(ec, bytes); });
}

void HttpConnection::OnWrite(error_code ec, size_t bytes) {
  ++write_timer_epoch_;
  write_timer_.cancel();
  if (state_ == State::kClosed) return;
  if (ec) return Close(DisconnectReason::kClientGone);
  if (writing_answer_ && exchange_ != nullptr) exchange_->Wrote(bytes);
  written_ += bytes;
  if (written_ < writing_.size()) return Write();
  writing_.clear();
  Flush();
}

void HttpConnection::ResponseDone() {
  const bool keep_alive = exchange_->keep_alive() && !shared_->draining;
  exchange_.reset();
  shared_->RequestEnded();
  if (keep_alive) return NextRequest();
  Linger();
}

void HttpConnection::Linger() {
  error_code ignored;
  socket_.shutdown(asio::socket_base::shutdown_send, ignored);
  state_ = State::kLingering;
  buffer_.consume(buffer_.size());
  ArmReadTimer(kLinger);
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
