#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tidepool {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

// HttpObserver: follows one request from its head to its end, which is this object's destruction: the server
// and whoever else holds it have let go by then. Called from any thread, never concurrently by the server.
class HttpObserver {
 public:
  virtual ~HttpObserver() = default;
  // The answer's head is about to go out, at most once; headers may be added.
  virtual void OnHead(int status, HttpHeaders& headers) = 0;
  // So many bytes of the answer's body were taken for sending.
  virtual void OnBody(size_t bytes) = 0;
};

// HttpBodySink: takes a request's body while it comes in, instead of HttpRequest::body. Called on the
// server's threads, one call after the other; may write to a file, and must not wait for anything else.
// Destroyed before a handler has seen it: the client went away, or the request was refused.
class HttpBodySink {
 public:
  virtual ~HttpBodySink() = default;
  // False: the rest is not wanted. The handler runs at once, and the connection ends with its answer.
  virtual bool Write(std::string_view bytes) = 0;
};

// One parsed request. Plain data; owned by the handler.
struct HttpRequest {
  std::string method;   // upper case
  std::string path;     // percent-decoded, without the query
  std::string query;    // raw, without '?'
  HttpHeaders headers;  // names in lower case, in order
  std::string body;
  std::string param;                       // what the route's trailing {name} matched
  std::string peer;                        // address of the client
  std::shared_ptr<HttpObserver> observer;  // the filter's; may be null
  std::shared_ptr<HttpBodySink> sink;      // has the body, where the route is an upload's and took it

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

  // Calls `ready` once, when at least half of the buffer is free: maybe at once, on the caller's thread, else
  // on one of the server's, where it must not block. Takes an earlier one's place; never when the client is
  // gone. With chunks of less than half the buffer, a stream that waits for this never overruns it.
  virtual void OnWritable(std::function<void()> ready) { ready(); }

  // Called once, from a server thread, when the client goes away before Send or End was called; at once when
  // it has gone already; never after Send or End. It must not block. At most one callback per writer.
  virtual void OnDisconnect(std::function<void(DisconnectReason)> callback) = 0;
};

// A whole answer.
struct HttpReply {
  int status = 200;
  HttpHeaders headers;
  std::string body;
};

// Sees every request before it is routed, also those to unknown paths; may set its observer, and may answer
// it. On the server's threads; must not block.
using HttpFilter = std::function<std::optional<HttpReply>(HttpRequest&)>;

using HttpHandler = std::function<void(HttpRequest, std::shared_ptr<ResponseWriter>)>;

// HttpUpload: a route whose bodies are larger than body_bytes_max, and never in memory.
struct HttpUpload {
  uint64_t body_bytes_max = 0;  // beyond: 413
  // Called with the head, the filter has not seen it. Null: the body is not wanted; the handler runs at once
  // and says why, and the connection ends with its answer.
  std::function<std::shared_ptr<HttpBodySink>(const HttpRequest& head)> open;
};

// Called with the head of a request whose body is still to come, on the server's threads; must not block. The
// filter has not seen it. False: the body is not read; filter and handler run at once, with an empty body,
// and the connection ends with their answer.
using HttpBodyWanted = std::function<bool(const HttpRequest& head)>;

struct HttpLimits {
  size_t body_bytes_max = 10u << 20;            // beyond: 413, while the body comes in
  size_t header_bytes_max = 32u << 10;          // request line and headers; beyond: 431
  size_t header_field_bytes_max = 8u << 10;     // one header; beyond: 431. The request target: 414
  size_t header_count_max = 100;                // beyond: 431
  size_t connections_max = 4096;                // beyond: 503 and close
  size_t stream_buffer_bytes_max = 256u << 10;  // unread by one client; beyond: cut
  // First byte (or accept, or the end of the TLS handshake) to end of headers; beyond: 408. Also of the
  // handshake.
  absl::Duration header_timeout = absl::Seconds(10);
  absl::Duration body_timeout = absl::Seconds(60);   // end of headers to end of body; beyond: 408
  absl::Duration idle_timeout = absl::Seconds(120);  // between requests of one connection; beyond: closed
  // For 64 KiB of a write that waits for the client, or for all of it; beyond: cut.
  absl::Duration slow_client_timeout = absl::Seconds(10);
};

// PEM files. No certificate: plain TCP.
struct HttpTlsFiles {
  std::string cert;       // with its chain
  std::string key;        // its private key
  std::string client_ca;  // if not empty, clients need a certificate that one of these has signed
};

// HttpServer: a small HTTP/1.1 server (Driver): keep-alive, pipelining (answered one after the other),
// chunked bodies in both directions, Expect: 100-continue; TLS where asked for. No compression. Handlers run
// on the server's own threads and must not block. Malformed requests (Content-Length with Transfer-Encoding,
// repeated Content-Length, bad syntax) are 400 and close; unknown paths 404, known paths with another method
// 405 with Allow. Errors of its own have OpenAI's error body.
class HttpServer {
 public:
  struct Stats {
    size_t connections = 0;
    size_t inflight = 0;           // requests whose answer is not complete
    uint64_t protocol_errors = 0;  // requests refused by the server itself: 400, 408, 413, 414, 417, 431
    uint64_t connections_refused = 0;
    uint64_t tls_failures = 0;  // handshakes that failed or did not end in time
  };

  struct Options {
    std::string listen = "127.0.0.1:0";  // host:port; [v6]:port; port 0: any free one
    int threads = 1;
    HttpLimits limits;
    HttpTlsFiles tls;
    HttpFilter filter;
    HttpBodyWanted body_wanted;  // empty: every body is
    // A request was refused by the server itself, before the filter could see it. On the server's threads.
    std::function<void(int status, std::string_view code, const std::string& peer)> on_refusal;
  };

  explicit HttpServer(Options options);
  // Shutdown(0) where it was not called.
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  // Routes are added before Start. `path` is exact, or ends in `/{name}`, which matches the non-empty rest.
  void Handle(std::string_view method, std::string_view path, HttpHandler handler);
  // Before or after Handle of the same route; `path` is exact.
  void TakeUploads(std::string_view method, std::string_view path, HttpUpload upload);

  // Errors: InvalidArgument (address, TLS files), Unavailable (in use).
  absl::Status Start();
  // Reads the TLS files again, for connections from now on; those that are open keep what they have. On an
  // error, which is InvalidArgument, nothing changes. Nothing to do without TLS. From any thread.
  absl::Status ReloadTls();
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
