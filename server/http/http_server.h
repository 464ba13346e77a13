#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tidepool {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

// One parsed request. Plain data; owned by the handler.
struct HttpRequest {
  std::string method;   // upper case
  std::string path;     // percent-decoded, without the query
  std::string query;    // raw, without '?'
  HttpHeaders headers;  // names in lower case, in order
  std::string body;
  std::string param;  // what the route's trailing {name} matched
  std::string peer;   // address of the client

  // The first header of that (lower-case) name; empty if there is none.
  std::string_view Header(std::string_view name) const;
};

enum class DisconnectReason {
  kClientGone,  // closed, reset, or silent beyond the kernel's patience
  kSlowClient,  // did not read for slow_client_timeout, or let the stream buffer run full
  kShutdown,    // the server closed
};

// ResponseWriter: the answer to one request (Handle). Every method may be called from any thread and never
// blocks; calls of one writer must be ordered by the caller. Either Send once, or StartStream, Write*, End.
// A writer that is destroyed before it answered sends 500; a stream that is destroyed before End is cut, so
// that the client sees an incomplete response.
class ResponseWriter {
 public:
  virtual ~ResponseWriter() = default;

  // A whole response with Content-Length. A second answer to the same request is ignored.
  virtual void Send(int status, HttpHeaders headers, std::string body) = 0;
  // The head of a response of unknown length (chunked; HTTP/1.0: until close).
  virtual void StartStream(int status, HttpHeaders headers) = 0;
  // Queues bytes of the stream. False: the client is gone, or has more than max_stream_buffer_bytes unread,
  // in which case the connection is cut; nothing was queued and the caller should cancel its work.
  virtual bool Write(std::string_view bytes) = 0;
  // Ends the stream; the connection may then be reused.
  virtual void End() = 0;
  // Cuts the stream: the client sees an incomplete response.
  virtual void Abort() = 0;

  // Called once, from a server thread, when the client goes away before Send or End was called; at once when
  // it has gone already; never after Send or End. It must not block. At most one callback per writer.
  virtual void OnDisconnect(std::function<void(DisconnectReason)> callback) = 0;
};

using HttpHandler = std::function<void(HttpRequest, std::shared_ptr<ResponseWriter>)>;

struct HttpLimits {
  size_t body_bytes_max = 10u << 20;                  // beyond: 413, while the body comes in
  size_t header_bytes_max = 32u << 10;                // request line and headers; beyond: 431
  size_t header_field_bytes_max = 8u << 10;           // one header; beyond: 431. The request target: 414
  size_t header_count_max = 100;                      // beyond: 431
  size_t connections_max = 4096;                      // beyond: 503 and close
  size_t stream_buffer_bytes_max = 256u << 10;        // unread by one client; beyond: cut
  absl::Duration header_timeout = absl::Seconds(10);  // first byte (or accept) to end of headers; beyond: 408
  absl::Duration body_timeout = absl::Seconds(60);    // end of headers to end of body; beyond: 408
  absl::Duration idle_timeout = absl::Seconds(120);   // between requests of one connection; beyond: closed
  absl::Duration slow_client_timeout = absl::Seconds(10);  // without progress of a write; beyond: cut
};

// HttpServer: a small HTTP/1.1 server (Driver): keep-alive, pipelining (answered one after the other),
// chunked bodies in both directions, Expect: 100-continue. No TLS, no compression. Handlers run on the
// server's own threads and must not block. Malformed requests (Content-Length with Transfer-Encoding,
// repeated Content-Length, bad syntax) are 400 and close; unknown paths 404, known paths with another method
// 405 with Allow. Errors of its own have OpenAI's error body.
class HttpServer {
 public:
  struct Stats {
    size_t connections = 0;
    size_t inflight = 0;           // requests whose answer is not complete
    uint64_t protocol_errors = 0;  // requests refused by the server itself: 400, 408, 413, 414, 417, 431
    uint64_t connections_refused = 0;
  };

  struct Options {
    std::string listen = "127.0.0.1:0";  // host:port; [v6]:port; port 0: any free one
    int threads = 1;
    HttpLimits limits;
  };

  explicit HttpServer(Options options);
  // Shutdown(0) where it was not called.
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // Routes are added before Start. `path` is exact, or ends in `/{name}`, which matches the non-empty rest.
  void Handle(std::string_view method, std::string_view path, HttpHandler handler);

  // Errors: InvalidArgument (address), Unavailable (in use).
  absl::Status Start();
  int port() const;
  Stats stats() const;

  // Stops accepting, closes idle connections, waits at most `grace` for requests in flight, cuts the rest,
  // joins the threads. Idempotent. Not from a handler.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
