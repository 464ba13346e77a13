#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/http/http_server.h"

namespace tidepool {

// HttpUrl: where an HTTP service is, and the path under which it is.
struct HttpUrl {
  bool tls = false;
  std::string host;  // a name or an address; IPv6 without its brackets
  uint16_t port = 0;
  std::string path;  // "" or "/v1": begins with '/', does not end in one; no query

  // "http://host:port", IPv6 in brackets: equal for equal services.
  std::string Origin() const;
};

// "http://host[:port][/path]" or https; a bare "host:port" is http. Errors: InvalidArgument.
absl::StatusOr<HttpUrl> ParseHttpUrl(std::string_view url);

// One request. Host and Content-Length are written by the client.
struct OutboundCall {
  HttpUrl url;  // its path is not used
  std::string method = "GET";
  std::string target;  // begins with '/'; percent-encoded already
  HttpHeaders headers;
  std::string body;
  // From Send to the answer's last byte, connecting included.
  absl::Duration timeout = absl::Seconds(60);
};

// HttpReplyHandler: where the answer to one call goes. Calls come one after the other, on one of the client's
// threads, and must not block: other calls wait meanwhile. `at`: when the bytes were read, on Clock::Real().
// OnSending at most once; OnHead at most once, before OnBody; OnDone exactly once, last, also where Send
// failed to connect. Statuses of OnDone, whatever the answer's HTTP status:
//   OK                 the answer is complete
//   Unavailable        no connection, or it broke before the first byte of the answer
//   DataLoss           the answer is not HTTP, or ended in the middle
//   ResourceExhausted  the answer is larger than reply_bytes_max
//   DeadlineExceeded, Cancelled; InvalidArgument: a header or the target cannot be written
class HttpReplyHandler {
 public:
  virtual ~HttpReplyHandler() = default;
  // The connection stands and the request's first byte goes out.
  virtual void OnSending(absl::Time at);
  virtual void OnHead(int status, HttpHeaders headers, absl::Time at);
  // The next bytes of the body, as they came in, without chunked framing. Borrowed for the call.
  virtual void OnBody(std::string_view bytes, absl::Time at) = 0;
  virtual void OnDone(absl::Status status, absl::Time at) = 0;
};

// HttpClient: an HTTP/1.1 client for many answers at once (Driver): thousands of streams on one thread. Keeps
// idle connections for a while and uses them again; a request goes out once and is never repeated. TLS with
// verification of the peer's certificate and name. No redirects, no proxies, no compression. Thread-safe.
class HttpClient {
 public:
  struct Options {
    int threads = 1;
    absl::Duration connect_timeout = absl::Seconds(10);  // name, connection and TLS handshake
    // Longer than this idle, a connection is not used again: below what servers commonly grant.
    absl::Duration idle_timeout = absl::Seconds(30);
    size_t idle_connections_max = 4096;
    uint64_t reply_bytes_max = uint64_t{256} << 20;  // of one body
    std::string ca_file;                             // PEM; "": the system's
    bool verify_peer = true;
    bool measure_lag = false;  // TakeLag
  };

  explicit HttpClient(Options options);
  HttpClient() : HttpClient(Options()) {}
  // Cancels what is in flight; every handler has had its OnDone when it returns. Not from a handler.
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  // A call that was sent; cancelling one that is over does nothing. From any thread.
  class InFlight {
   public:
    virtual ~InFlight() = default;
    virtual void Cancel() = 0;
  };

  std::weak_ptr<InFlight> Send(OutboundCall call, std::shared_ptr<HttpReplyHandler> handler);

  struct Reply {
    int status = 0;
    HttpHeaders headers;  // names in lower case
    std::string body;

    // The first header of that (lower-case) name; empty if there is none.
    std::string_view Header(std::string_view name) const;
  };
  // Sends and waits for the whole answer, of whatever HTTP status. Not from a handler. Errors as OnDone's.
  absl::StatusOr<Reply> Fetch(OutboundCall call);

  size_t connections() const;  // open now, idle ones too

  // How late the threads come to what is due, sampled every 20 ms by a timer on each: what a load generator
  // adds to the times that it measures. Since the last call; 0 without Options::measure_lag.
  struct Lag {
    double ms_mean = 0, ms_max = 0;
  };
  Lag TakeLag();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
