#include "server/bench/http_client.h"

#include <openssl/ssl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/connect.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <condition_variable>
#include <deque>
#include <limits>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"

namespace tidepool {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;

constexpr size_t kReadBytes = 16u << 10;
constexpr uint32_t kHeaderBytesMax = 64u << 10;
constexpr auto kLagInterval = std::chrono::milliseconds(20);
constexpr auto kNameLifetime = std::chrono::seconds(30);

using SteadyTime = std::chrono::steady_clock::time_point;

bool HasControl(std::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) { return absl::ascii_iscntrl(c) && c != '\t'; });
}

// Null: the call can be written as it is.
const char* WhatCannotBeWritten(const OutboundCall& call) {
  if (call.method.empty() || !std::all_of(call.method.begin(), call.method.end(), absl::ascii_isupper)) {
    return "method";
  }
  if (!call.target.starts_with('/') || HasControl(call.target) || call.target.find(' ') != call.target.npos) {
    return "target";
  }
  for (const auto& [name, value] : call.headers) {
    if (name.empty() || HasControl(name) || HasControl(value) || name.find_first_of(" :") != name.npos) {
      return "headers";
    }
  }
  return nullptr;
}

std::string HostAndPort(const HttpUrl& url) {
  const bool v6 = url.host.find(':') != url.host.npos;
  return absl::StrCat(v6 ? "[" : "", url.host, v6 ? "]" : "", ":", url.port);
}

std::string HeadOf(const OutboundCall& call) {
  const bool usual = call.url.port == (call.url.tls ? 443 : 80);
  std::string host = HostAndPort(call.url);
  if (usual) host.resize(host.rfind(':'));
  std::string head = absl::StrCat(call.method, " ", call.target, " HTTP/1.1\r\nHost: ", host, "\r\n");
  if (!call.body.empty() || call.method == "POST") {
    absl::StrAppend(&head, "Content-Length: ", call.body.size(), "\r\n");
  }
  for (const auto& [name, value] : call.headers) absl::StrAppend(&head, name, ": ", value, "\r\n");
  return head += "\r\n";
}

class Call;

// Connection: one socket, plain or TLS, that carries one call at a time. Lives on its loop's thread.
class Connection {
 public:
  virtual ~Connection() = default;
  virtual tcp::socket& socket() = 0;
  // After the TCP connection stands. Ends in call->OnConnected.
  virtual void Handshake(const std::shared_ptr<Call>& call, std::shared_ptr<Connection> self) = 0;
  virtual void Read(const std::shared_ptr<Call>& call, std::shared_ptr<Connection> self) = 0;
  virtual void Write(const std::shared_ptr<Call>& call, std::shared_ptr<Connection> self) = 0;

  // Pending reads and writes end with an error.
  void Close() {
    error_code ignored;
    socket().close(ignored);
  }
  // The server closed it, or sent what nobody asked for.
  bool Stale() {
    char byte = 0;
    const ssize_t n = ::recv(socket().native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return n >= 0 || (errno != EAGAIN && errno != EWOULDBLOCK);
  }

  boost::beast::flat_buffer buffer;  // what was read and not parsed
};

struct Idle {
  std::shared_ptr<Connection> connection;
  SteadyTime since;
};

struct Name {
  std::vector<tcp::endpoint> endpoints;
  SteadyTime since;
};

// Loop: one thread and all that lives on it; nothing here is touched by another, but for io, calls' posts and
// the count.
struct Loop {
  explicit Loop(const HttpClient::Options& o) : options(o) {}

  const HttpClient::Options& options;
  asio::io_context io{1};
  asio::executor_work_guard<asio::io_context::executor_type> work{io.get_executor()};
  std::thread thread;
  absl::flat_hash_set<std::shared_ptr<Call>> calls;
  absl::flat_hash_map<std::string, std::deque<Idle>> idle;  // by origin, the latest last
  size_t idle_count = 0;
  absl::flat_hash_map<std::string, Name> names;
  std::atomic<size_t> connections{0};
  std::optional<asio::ssl::context> tls;
  std::string tls_error;
  asio::steady_timer lag_timer{io};
  std::mutex lag_mu;
  double lag_ms_sum = 0, lag_ms_max = 0;  // guarded by lag_mu
  uint64_t lag_count = 0;
  bool closing = false;

  void MeasureLag();
  asio::ssl::context* Tls();
  std::shared_ptr<Connection> TakeIdle(const std::string& origin);
  void PutIdle(const std::string& origin, std::shared_ptr<Connection> connection);
};

class Call final : public HttpClient::InFlight, public std::enable_shared_from_this<Call> {
 public:
  Call(Loop& loop, OutboundCall call, std::shared_ptr<HttpReplyHandler> handler)
      : loop_(loop),
        call_(std::move(call)),
        handler_(std::move(handler)),
        timer_(loop.io),
        resolver_(loop.io),
        deadline_(std::chrono::steady_clock::now() +
                  absl::ToChronoNanoseconds(std::min(call_.timeout, absl::Hours(24 * 365)))) {}

  void Cancel() override {
    asio::post(loop_.io, [self = shared_from_this()] { self->Done(absl::CancelledError("cancelled")); });
  }

  // On the loop's thread from here on.
  void Start();
  void OnConnected(error_code ec);
  void OnRead(error_code ec, size_t bytes);
  void OnWritten(error_code ec);
  void Done(absl::Status status);

  Loop& loop() { return loop_; }
  const HttpUrl& url() const { return call_.url; }
  std::array<asio::const_buffer, 2> RequestBuffers() const {
    return {asio::buffer(head_), asio::buffer(call_.body)};
  }

 private:
  using Parser = http::response_parser<http::string_body>;

  void ArmTimer(SteadyTime at);
  void Resolve();
  void Connect();
  void Begin();
  void NewParser();
  void Parse(absl::Time at);
  bool GiveHead(absl::Time at);  // false: an interim answer, skipped
  void GiveBody(absl::Time at);
  void Broken(const std::string& how);

  Loop& loop_;
  OutboundCall call_;
  std::shared_ptr<HttpReplyHandler> handler_;
  asio::steady_timer timer_;
  tcp::resolver resolver_;
  const SteadyTime deadline_;
  std::string origin_, head_;
  std::vector<tcp::endpoint> endpoints_;
  std::shared_ptr<Connection> connection_;
  std::optional<Parser> parser_;
  bool connecting_ = false, written_ = false, reading_ = false, got_bytes_ = false, head_given_ = false,
       reusable_ = false, done_ = false;
};

template <typename Stream>
class ConnectionOver final : public Connection {
 public:
  template <typename... Args>
  explicit ConnectionOver(Loop& loop, Args&... args) : loop_(loop), stream_(loop.io, args...) {
    ++loop_.connections;
  }
  ~ConnectionOver() override { --loop_.connections; }

  static constexpr bool kTls = !std::is_same_v<Stream, tcp::socket>;

  tcp::socket& socket() override {
    if constexpr (kTls) {
      return stream_.next_layer();
    } else {
      return stream_;
    }
  }

  void Handshake(const std::shared_ptr<Call>& call, std::shared_ptr<Connection> self) override {
    if constexpr (kTls) {
      const std::string& host = call->url().host;
      // Not for an address: RFC 6066 section 3 allows names only.
      error_code not_an_address;
      asio::ip::make_address(host, not_an_address);
      if (not_an_address) SSL_set_tlsext_host_name(stream_.native_handle(), host.c_str());
      if (loop_.options.verify_peer) {
        stream_.set_verify_mode(asio::ssl::verify_peer);
        stream_.set_verify_callback(asio::ssl::host_name_verification(host));
      } else {
        stream_.set_verify_mode(asio::ssl::verify_none);
      }
      stream_.async_handshake(asio::ssl::stream_base::client,
                              [call, self = std::move(self)](error_code ec) { call->OnConnected(ec); });
    } else {
      call->OnConnected({});
    }
  }

  void Read(const std::shared_ptr<Call>& call, std::shared_ptr<Connection> self) override {
    stream_.async_read_some(
        buffer.prepare(kReadBytes),
        [call, self = std::move(self)](error_code ec, size_t bytes) { call->OnRead(ec, bytes); });
  }

  void Write(const std::shared_ptr<Call>& call, std::shared_ptr<Connection> self) override {
    asio::async_write(stream_, call->RequestBuffers(),
                      [call, self = std::move(self)](error_code ec, size_t) { call->OnWritten(ec); });
  }

 private:
  Loop& loop_;
  Stream stream_;
};

void Loop::MeasureLag() {
  // Cancelling does not reach a wait whose end is in the queue already.
  if (closing) return;
  lag_timer.expires_after(kLagInterval);
  lag_timer.async_wait([this](error_code ec) {
    if (ec) return;
    const std::chrono::duration<double, std::milli> late =
        std::chrono::steady_clock::now() - lag_timer.expiry();
    {
      std::lock_guard lock(lag_mu);
      lag_ms_sum += late.count();
      lag_ms_max = std::max(lag_ms_max, late.count());
      ++lag_count;
    }
    MeasureLag();
  });
}

asio::ssl::context* Loop::Tls() {
  if (tls || !tls_error.empty()) return tls ? &*tls : nullptr;
  tls.emplace(asio::ssl::context::tls_client);
  error_code ec;
  tls->set_options(
      asio::ssl::context::default_workarounds | asio::ssl::context::no_tlsv1 | asio::ssl::context::no_tlsv1_1,
      ec);
  if (!ec && options.ca_file.empty()) tls->set_default_verify_paths(ec);
  if (!ec && !options.ca_file.empty()) tls->load_verify_file(options.ca_file, ec);
  if (!ec) return &*tls;
  tls_error = absl::StrCat("certificate authorities ", options.ca_file.empty() ? "of the system" : "in ",
                           options.ca_file, ": ", ec.message());
  tls.reset();
  return nullptr;
}

std::shared_ptr<Connection> Loop::TakeIdle(const std::string& origin) {
  const auto it = idle.find(origin);
  if (it == idle.end()) return nullptr;
  const SteadyTime oldest =
      std::chrono::steady_clock::now() - absl::ToChronoNanoseconds(options.idle_timeout);
  while (!it->second.empty()) {
    Idle last = std::move(it->second.back());
    it->second.pop_back();
    --idle_count;
    if (last.since >= oldest && !last.connection->Stale()) return std::move(last.connection);
  }
  return nullptr;
}

void Loop::PutIdle(const std::string& origin, std::shared_ptr<Connection> connection) {
  const SteadyTime now = std::chrono::steady_clock::now();
  auto& list = idle[origin];
  while (!list.empty() && list.front().since < now - absl::ToChronoNanoseconds(options.idle_timeout)) {
    list.pop_front();
    --idle_count;
  }
  if (idle_count >= options.idle_connections_max) return;
  list.push_back({std::move(connection), now});
  ++idle_count;
}

void Call::ArmTimer(SteadyTime at) {
  timer_.expires_at(std::min(at, deadline_));
  timer_.async_wait([self = shared_from_this()](error_code ec) {
    // A wait that was over before it was moved comes with no error.
    if (ec || self->timer_.expiry() > std::chrono::steady_clock::now()) return;
    if (self->connecting_ && std::chrono::steady_clock::now() < self->deadline_) {
      return self->Done(
          absl::UnavailableError(absl::StrCat("no connection to ", self->origin_, " within ",
                                              absl::FormatDuration(self->loop_.options.connect_timeout))));
    }
    self->Done(absl::DeadlineExceededError(
        absl::StrCat("no complete answer within ", absl::FormatDuration(self->call_.timeout))));
  });
}

void Call::Start() {
  loop_.calls.insert(shared_from_this());
  if (const char* what = WhatCannotBeWritten(call_)) {
    return Done(absl::InvalidArgumentError(absl::StrCat("the call's ", what, " cannot be written")));
  }
  origin_ = call_.url.Origin();
  head_ = HeadOf(call_);
  connection_ = loop_.TakeIdle(origin_);
  if (connection_ != nullptr) {
    ArmTimer(deadline_);
    return Begin();
  }
  connecting_ = true;
  ArmTimer(std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(loop_.options.connect_timeout));
  Resolve();
}

void Call::Resolve() {
  error_code ec;
  const auto address = asio::ip::make_address(call_.url.host, ec);
  if (!ec) {
    endpoints_ = {tcp::endpoint(address, call_.url.port)};
    return Connect();
  }
  const auto known = loop_.names.find(origin_);
  if (known != loop_.names.end() && known->second.since + kNameLifetime > std::chrono::steady_clock::now()) {
    endpoints_ = known->second.endpoints;
    return Connect();
  }
  resolver_.async_resolve(
      call_.url.host, std::to_string(call_.url.port),
      [self = shared_from_this()](error_code ec, const tcp::resolver::results_type& found) {
        if (self->done_) return;
        if (ec || found.empty()) {
          return self->Done(absl::UnavailableError(
              absl::StrCat("host '", self->call_.url.host, "' does not resolve: ", ec.message())));
        }
        for (const auto& entry : found) self->endpoints_.push_back(entry.endpoint());
        self->loop_.names[self->origin_] = {self->endpoints_, std::chrono::steady_clock::now()};
        self->Connect();
      });
}

void Call::Connect() {
  if (call_.url.tls) {
    asio::ssl::context* tls = loop_.Tls();
    if (tls == nullptr) return Done(absl::InvalidArgumentError(loop_.tls_error));
    connection_ = std::make_shared<ConnectionOver<asio::ssl::stream<tcp::socket>>>(loop_, *tls);
  } else {
    connection_ = std::make_shared<ConnectionOver<tcp::socket>>(loop_);
  }
  asio::async_connect(
      connection_->socket(), endpoints_,
      [self = shared_from_this(), connection = connection_](error_code ec, const tcp::endpoint&) {
        if (self->done_) return;
        if (ec) return self->OnConnected(ec);
        error_code ignored;
        connection->socket().set_option(tcp::no_delay(true), ignored);
        connection->Handshake(self, connection);
      });
}

void Call::OnConnected(error_code ec) {
  if (done_) return;
  if (ec) {
    return Done(absl::UnavailableError(absl::StrCat("cannot connect to ", origin_, ": ", ec.message())));
  }
  connecting_ = false;
  ArmTimer(deadline_);
  Begin();
}

void Call::Begin() {
  NewParser();
  handler_->OnSending(Clock::Real().Now());
  connection_->Write(shared_from_this(), connection_);
  // Read at once: a refusal may come before the body is out.
  reading_ = true;
  connection_->Read(shared_from_this(), connection_);
}

void Call::NewParser() {
  parser_.emplace();
  parser_->eager(true);
  parser_->header_limit(kHeaderBytesMax);
  parser_->body_limit(loop_.options.reply_bytes_max);
  parser_->skip(call_.method == "HEAD");
}

void Call::OnWritten(error_code ec) {
  if (done_) return;
  written_ = !ec;
  // The reader learns more: the server may have answered before it closed.
  if (ec && !reading_) Broken(ec.message());
}

void Call::OnRead(error_code ec, size_t bytes) {
  reading_ = false;
  if (done_) return;
  const absl::Time at = Clock::Real().Now();
  if (ec) {
    if (ec == asio::error::eof && head_given_) {
      error_code end;
      parser_->put_eof(end);
      if (!end && parser_->is_done()) {
        GiveBody(at);
        return Done(absl::OkStatus());
      }
    }
    return Broken(ec.message());
  }
  got_bytes_ = true;
  connection_->buffer.commit(bytes);
  Parse(at);
  if (done_) return;
  reading_ = true;
  connection_->Read(shared_from_this(), connection_);
}

void Call::Broken(const std::string& how) {
  if (got_bytes_) {
    Done(absl::DataLossError("the connection ended in the middle of the answer: " + how));
  } else {
    Done(absl::UnavailableError("the connection ended before the answer: " + how));
  }
}

void Call::Parse(absl::Time at) {
  auto& buffer = connection_->buffer;
  while (buffer.size() > 0 && !done_) {
    error_code ec;
    const size_t used = parser_->put(buffer.data(), ec);
    buffer.consume(used);
    if (ec == http::error::body_limit) {
      return Done(absl::ResourceExhaustedError(
          absl::StrCat("the answer is larger than ", loop_.options.reply_bytes_max, " bytes")));
    }
    if (ec && ec != http::error::need_more) {
      return Done(absl::DataLossError("the answer is not HTTP: " + ec.message()));
    }
    if (parser_->is_header_done() && !head_given_ && !GiveHead(at)) continue;
    if (head_given_) GiveBody(at);
    if (done_) return;  // the handler cancelled
    if (parser_->is_done()) {
      reusable_ = written_ && buffer.size() == 0 && parser_->get().keep_alive();
      return Done(absl::OkStatus());
    }
    if (used == 0 && ec == http::error::need_more) {
      // Only a chunk's header piles up unparsed.
      if (buffer.size() > kHeaderBytesMax) Done(absl::DataLossError("the answer is not HTTP: endless line"));
      return;
    }
  }
}

bool Call::GiveHead(absl::Time at) {
  const auto& message = parser_->get();
  if (message.result_int() < 200) {
    NewParser();
    return false;
  }
  head_given_ = true;
  HttpHeaders headers;
  for (const auto& field : message) {
    const auto name = field.name_string();
    headers.emplace_back(absl::AsciiStrToLower({name.data(), name.size()}), std::string(field.value()));
  }
  handler_->OnHead(static_cast<int>(message.result_int()), std::move(headers), at);
  return true;
}

void Call::GiveBody(absl::Time at) {
  std::string& body = parser_->get().body();
  if (body.empty()) return;
  handler_->OnBody(body, at);
  body.clear();
}

void Call::Done(absl::Status status) {
  if (done_) return;
  done_ = true;
  auto self = shared_from_this();
  loop_.calls.erase(self);
  timer_.cancel();
  resolver_.cancel();
  if (connection_ != nullptr) {
    if (reusable_) {
      loop_.PutIdle(origin_, std::move(connection_));
    } else {
      connection_->Close();
    }
    connection_ = nullptr;
  }
  auto handler = std::move(handler_);
  handler->OnDone(std::move(status), Clock::Real().Now());
}

// What Fetch waits for.
class Collector final : public HttpReplyHandler {
 public:
  void OnHead(int status, HttpHeaders headers, absl::Time) override {
    reply_.status = status;
    reply_.headers = std::move(headers);
  }
  void OnBody(std::string_view bytes, absl::Time) override { reply_.body += bytes; }
  void OnDone(absl::Status status, absl::Time) override {
    std::lock_guard lock(mu_);
    status_ = std::move(status);
    changed_.notify_all();
  }
  absl::StatusOr<HttpClient::Reply> Wait() {
    std::unique_lock lock(mu_);
    // Every call has a deadline.
    changed_.wait(lock, [&] { return status_.has_value(); });
    if (!status_->ok()) return *status_;
    return std::move(reply_);
  }

 private:
  HttpClient::Reply reply_;
  std::mutex mu_;
  std::condition_variable changed_;
  std::optional<absl::Status> status_;
};

}  // namespace

std::string HttpUrl::Origin() const { return absl::StrCat(tls ? "https://" : "http://", HostAndPort(*this)); }

absl::StatusOr<HttpUrl> ParseHttpUrl(std::string_view text) {
  const auto bad = [&](std::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat("URL '", std::string(text.substr(0, 256)), "' ",
                                                   std::string(why),
                                                   "; write for instance http://127.0.0.1:8000"));
  };
  HttpUrl url;
  std::string_view rest = text;
  if (const size_t scheme = rest.find("://"); scheme != rest.npos) {
    if (rest.substr(0, scheme) == "https") {
      url.tls = true;
    } else if (rest.substr(0, scheme) != "http") {
      return bad("is neither http nor https");
    }
    rest.remove_prefix(scheme + 3);
  }
  const size_t slash = rest.find('/');
  if (slash != rest.npos) url.path = std::string(rest.substr(slash));
  while (url.path.ends_with('/')) url.path.pop_back();
  if (HasControl(text) || text.find_first_of(" ?#@") != text.npos) {
    return bad("has a space, a query, a fragment or credentials");
  }
  rest = rest.substr(0, slash);
  std::string_view port;
  if (rest.starts_with('[')) {
    const size_t end = rest.find(']');
    if (end == rest.npos) return bad("has '[' without ']'");
    url.host = std::string(rest.substr(1, end - 1));
    port = rest.substr(end + 1);
    if (!port.empty() && port[0] != ':') return bad("has text after ']'");
  } else {
    const size_t colon = rest.find(':');
    url.host = std::string(rest.substr(0, colon));
    if (colon != rest.npos) port = rest.substr(colon);
  }
  if (url.host.empty()) return bad("names no host");
  url.port = url.tls ? 443 : 80;
  if (!port.empty()) {
    uint32_t number = 0;
    port.remove_prefix(1);
    if (!absl::SimpleAtoi(absl::string_view(port.data(), port.size()), &number) || number == 0 ||
        number > 65535) {
      return bad("has a bad port");
    }
    url.port = static_cast<uint16_t>(number);
  }
  return url;
}

void HttpReplyHandler::OnSending(absl::Time) {}
void HttpReplyHandler::OnHead(int, HttpHeaders, absl::Time) {}

std::string_view HttpClient::Reply::Header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return {};
}

struct HttpClient::Impl {
  Options options;
  std::vector<std::unique_ptr<Loop>> loops;
  std::atomic<size_t> next{0};
};

HttpClient::HttpClient(Options options) : impl_(std::make_unique<Impl>()) {
  impl_->options = std::move(options);
  for (int i = 0; i < std::max(1, impl_->options.threads); ++i) {
    impl_->loops.push_back(std::make_unique<Loop>(impl_->options));
    Loop& loop = *impl_->loops.back();
    if (impl_->options.measure_lag) loop.MeasureLag();
    loop.thread = std::thread([&loop] { loop.io.run(); });
  }
}

HttpClient::~HttpClient() {
  for (auto& loop : impl_->loops) {
    asio::post(loop->io, [loop = loop.get()] {
      const std::vector<std::shared_ptr<Call>> calls(loop->calls.begin(), loop->calls.end());
      for (const auto& call : calls) call->Done(absl::CancelledError("the client closes"));
      loop->idle.clear();
      loop->closing = true;
      loop->lag_timer.cancel();
      loop->work.reset();
    });
  }
  for (auto& loop : impl_->loops) loop->thread.join();
}

std::weak_ptr<HttpClient::InFlight> HttpClient::Send(OutboundCall call,
                                                     std::shared_ptr<HttpReplyHandler> handler) {
  Loop& loop = *impl_->loops[impl_->next.fetch_add(1, std::memory_order_relaxed) % impl_->loops.size()];
  auto sent = std::make_shared<Call>(loop, std::move(call), std::move(handler));
  asio::post(loop.io, [sent] { sent->Start(); });
  return sent;
}

absl::StatusOr<HttpClient::Reply> HttpClient::Fetch(OutboundCall call) {
  auto collector = std::make_shared<Collector>();
  Send(std::move(call), collector);
  return collector->Wait();
}

size_t HttpClient::connections() const {
  size_t sum = 0;
  for (const auto& loop : impl_->loops) sum += loop->connections;
  return sum;
}

HttpClient::Lag HttpClient::TakeLag() {
  Lag out;
  double sum = 0;
  uint64_t count = 0;
  for (const auto& loop : impl_->loops) {
    std::lock_guard lock(loop->lag_mu);
    sum += std::exchange(loop->lag_ms_sum, 0);
    count += std::exchange(loop->lag_count, 0);
    out.ms_max = std::max(out.ms_max, std::exchange(loop->lag_ms_max, 0));
  }
  if (count > 0) out.ms_mean = sum / static_cast<double>(count);
  return out;
}

}  // namespace tidepool
