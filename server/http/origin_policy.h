#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/http/http_server.h"

namespace tidepool {

// OriginPolicy: which names a server answers to, and which web pages may call it (pure, immutable).
//
// A page in a browser can send requests to a server on the same machine: under the page's own host name, once
// its DNS points here (DNS rebinding), or across origins. The first shows in Host, the second in Origin;
// programs that are no browsers send Host as they were told and no Origin.
class OriginPolicy {
 public:
  struct Options {
    // The listener is on loopback: only localhost, 127.0.0.0/8, ::1 and allowed_hosts are its names.
    // Otherwise any name is, unless allowed_hosts has some.
    bool loopback = true;
    bool tls = false;
    std::vector<std::string> allowed_hosts;    // without port; "*": any
    std::vector<std::string> allowed_origins;  // "https://app.example"; "*": any
  };
  explicit OriginPolicy(Options options);

  enum class Verdict { kAllowed, kHostRefused, kOriginRefused };
  // A request without Host is HTTP/1.0 and no browser's; one of the same origin is allowed.
  Verdict Check(const HttpRequest& request) const;

  // The above for a server's filter: nullopt lets the request pass, else a 403 that names the fix, or the
  // answer to a preflight.
  std::optional<HttpReply> Filter(const HttpRequest& request) const;

  // OPTIONS with what browsers ask before a request across origins.
  static bool IsPreflight(const HttpRequest& request);
  // The answer to the preflight of an allowed origin.
  HttpReply PreflightReply(const HttpRequest& request) const;
  // What lets a page read the answer; nothing where `origin` is empty or not in the list.
  void AddCorsHeaders(std::string_view origin, HttpHeaders& headers) const;

 private:
  bool HostAllowed(std::string_view host) const;
  bool OriginListed(std::string_view origin) const;

  Options options_;
  bool any_host_ = false, any_origin_ = false;
};

}  // namespace tidepool
