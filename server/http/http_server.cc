#include "server/http/http_server.h"

#include <boost/asio/bind_executor.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <thread>

#include "absl/strings/numbers.h"
#include "base/log.h"
#include "base/status.h"
#include "server/http/connection.h"
#include "server/http/tls.h"

namespace tidepool {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;

// After a failed accept (no file descriptors left), so that the loop does not spin.
constexpr auto kAcceptPause = std::chrono::milliseconds(100);
// For the last bytes of finished answers to reach their clients.
constexpr auto kCloseGrace = std::chrono::milliseconds(500);

absl::StatusOr<asio::ip::tcp::endpoint> Resolve(asio::io_context& io, const std::string& listen) {
  const size_t colon = listen.rfind(':');
  uint32_t port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(listen.substr(colon + 1), &port) || port > 65535) {
    return absl::InvalidArgumentError("listen address '" + listen +
                                      "' is not host:port; write for instance 127.0.0.1:8000");
  }
  std::string host = listen.substr(0, colon);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  error_code ec;
  const auto address = asio::ip::make_address(host, ec);
  if (!ec) return asio::ip::tcp::endpoint(address, static_cast<uint16_t>(port));
  asio::ip::tcp::resolver resolver(io);
  const auto found = resolver.resolve(host, std::to_string(port), ec);
  if (ec || found.empty()) {
    return absl::InvalidArgumentError("listen address '" + listen + "': host '" + host +
                                      "' does not resolve");
  }
  return found.begin()->endpoint();
}

}  // namespace

std::string_view HttpRequest::Header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return {};
}

struct HttpServer::Impl {
  Options options;
  std::shared_ptr<HttpShared> shared = std::make_shared<HttpShared>();
  asio::executor_work_guard<asio::io_context::executor_type> work{shared->io.get_executor()};
  asio::strand<asio::io_context::executor_type> strand{shared->io.get_executor()};  // of the acceptor
  asio::ip::tcp::acceptor acceptor{shared->io};
  asio::steady_timer pause{shared->io};
  std::vector<std::thread> threads;
  int port = 0;
  bool started = false, stopped = false;

  void Accept() {
    acceptor.async_accept(asio::make_strand(shared->io),
                          asio::bind_executor(strand, [this](error_code ec, HttpConnection::Socket socket) {
                            if (!acceptor.is_open()) return;
                            if (ec) {
                              spdlog::warn("http accept failed: {}", ec.message());
                              pause.expires_after(kAcceptPause);
                              pause.async_wait(asio::bind_executor(strand, [this](error_code) {
                                if (acceptor.is_open()) Accept();
                              }));
                              return;
                            }
                            Admit(std::move(socket));
                            Accept();
                          }));
  }

  void Admit(HttpConnection::Socket socket) {
    std::shared_ptr<asio::ssl::context> tls;
    {
      std::lock_guard lock(shared->mu);
      tls = shared->tls;
    }
    auto connection = std::make_shared<HttpConnection>(shared, std::move(socket), std::move(tls));
    {
      std::lock_guard lock(shared->mu);
      if (shared->connections.size() < shared->limits.connections_max) {
        shared->connections.emplace(connection.get(), connection);
        connection->Start();
        return;
      }
    }
    ++shared->connections_refused;
    connection->RefuseConnection();
  }

  // Waits until `done` or the time is over; `done` is called under the lock.
  template <typename Done>
  void WaitUntil(std::chrono::nanoseconds timeout, Done done) {
    std::unique_lock lock(shared->mu);
    shared->changed.wait_for(lock, timeout, done);
  }

  std::vector<std::shared_ptr<HttpConnection>> Connections() {
    std::vector<std::shared_ptr<HttpConnection>> out;
    std::lock_guard lock(shared->mu);
    for (auto& [unused, weak] : shared->connections) {
      if (auto connection = weak.lock()) out.push_back(std::move(connection));
    }
    return out;
  }
};

HttpServer::HttpServer(Options options) : impl_(std::make_unique<Impl>()) {
  impl_->shared->limits = options.limits;
  impl_->shared->filter = options.filter;
  impl_->shared->body_wanted = options.body_wanted;
  impl_->shared->on_refusal = options.on_refusal;
  impl_->options = std::move(options);
}

HttpServer::~HttpServer() { Shutdown(absl::ZeroDuration()); }

void HttpServer::Handle(std::string_view method, std::string_view path, HttpHandler handler) {
  TP_CHECK(!impl_->started);
  impl_->shared->router.Add(method, path, std::move(handler));
}

void HttpServer::TakeUploads(std::string_view method, std::string_view path, HttpUpload upload) {
  TP_CHECK(!impl_->started);
  impl_->shared->uploads[{std::string(method), std::string(path)}] = std::move(upload);
}

absl::Status HttpServer::Start() {
  TP_CHECK(!impl_->started);
  TP_RETURN_IF_ERROR(ReloadTls());
  TP_ASSIGN_OR_RETURN(const auto endpoint, Resolve(impl_->shared->io, impl_->options.listen));
  error_code ec;
  auto& acceptor = impl_->acceptor;
  auto failed = [&](std::string_view what) {
    acceptor.close();
    return absl::UnavailableError("cannot " + std::string(what) + " " + impl_->options.listen + ": " +
                                  ec.message());
  };
  if (acceptor.open(endpoint.protocol(), ec); ec) return failed("open a socket for");
  if (acceptor.set_option(asio::socket_base::reuse_address(true), ec); ec) return failed("configure");
  if (acceptor.bind(endpoint, ec); ec) return failed("bind");
  if (acceptor.listen(asio::socket_base::max_listen_connections, ec); ec) return failed("listen on");
  impl_->port = acceptor.local_endpoint().port();
  impl_->started = true;
  asio::post(impl_->strand, [impl = impl_.get()] { impl->Accept(); });
  for (int i = 0; i < std::max(1, impl_->options.threads); ++i) {
    impl_->threads.emplace_back([shared = impl_->shared] { shared->io.run(); });
  }
  return absl::OkStatus();
}

absl::Status HttpServer::ReloadTls() {
  if (impl_->options.tls.cert.empty()) return absl::OkStatus();
  TP_ASSIGN_OR_RETURN(auto tls, LoadTls(impl_->options.tls));
  std::lock_guard lock(impl_->shared->mu);
  impl_->shared->tls = std::move(tls);
  return absl::OkStatus();
}

int HttpServer::port() const { return impl_->port; }

HttpServer::Stats HttpServer::stats() const {
  Stats stats;
  stats.protocol_errors = impl_->shared->protocol_errors;
  stats.connections_refused = impl_->shared->connections_refused;
  stats.tls_failures = impl_->shared->tls_failures;
  std::lock_guard lock(impl_->shared->mu);
  stats.connections = impl_->shared->connections.size();
  stats.inflight = impl_->shared->inflight;
  return stats;
}

void HttpServer::Shutdown(absl::Duration grace) {
  if (!impl_->started || impl_->stopped) return;
  impl_->stopped = true;
  auto& shared = *impl_->shared;
  shared.draining = true;
  asio::post(impl_->strand, [impl = impl_.get()] {
    error_code ignored;
    impl->acceptor.close(ignored);
    impl->pause.cancel();
  });
  for (auto& connection : impl_->Connections()) connection->Drain();
  impl_->WaitUntil(absl::ToChronoNanoseconds(grace), [&] { return shared.inflight == 0; });
  if (grace > absl::ZeroDuration()) {
    impl_->WaitUntil(kCloseGrace, [&] { return shared.connections.empty(); });
  }
  // The acceptor may have admitted one more before it closed: cut until none is left.
  impl_->work.reset();
  do {
    for (auto& connection : impl_->Connections()) connection->Cut(DisconnectReason::kShutdown);
    impl_->WaitUntil(std::chrono::milliseconds(50), [&] { return shared.connections.empty(); });
  } while (!impl_->Connections().empty());
  // Every socket and timer is closed: run() returns when the last handler ran.
  for (auto& thread : impl_->threads) thread.join();
}

}  // namespace tidepool
