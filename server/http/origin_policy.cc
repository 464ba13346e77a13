#include "server/http/origin_policy.h"

#include <arpa/inet.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "server/http/exchange.h"

namespace tidepool {
namespace {

constexpr char kExposed[] =
    "X-Request-Id, Retry-After, Retry-After-Ms, Traceparent, X-Ratelimit-Limit-Requests, "
    "X-Ratelimit-Limit-Tokens, "
    "X-Ratelimit-Remaining-Requests, X-Ratelimit-Remaining-Tokens, X-Ratelimit-Reset-Requests, "
    "X-Ratelimit-Reset-Tokens";
constexpr char kPreflightSeconds[] = "600";  // browsers remember it; Chromium at most two hours

std::string Lower(std::string_view text) { return absl::AsciiStrToLower(std::string(text)); }

// "Name.:8000" -> "name"; "[::1]:8000" -> "::1".
std::string HostName(std::string_view host) {
  if (!host.empty() && host.front() == '[') {
    const size_t close = host.find(']');
    return close == std::string_view::npos ? "" : Lower(host.substr(1, close - 1));
  }
  std::string name = Lower(host.substr(0, host.find(':')));
  if (!name.empty() && name.back() == '.') name.pop_back();
  return name;
}

// An address, or the one name that no DNS resolves; "127.evil.example" is neither.
bool IsLoopbackName(const std::string& name) {
  if (name == "localhost") return true;
  in_addr v4;
  in6_addr v6;
  if (inet_pton(AF_INET, name.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  return inet_pton(AF_INET6, name.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

}  // namespace

OriginPolicy::OriginPolicy(Options options) : options_(std::move(options)) {
  for (std::string& host : options_.allowed_hosts) {
    any_host_ |= host == "*";
    host = Lower(host);
  }
  any_host_ |= !options_.loopback && options_.allowed_hosts.empty();
  for (std::string& origin : options_.allowed_origins) {
    any_origin_ |= origin == "*";
    origin = Lower(origin);
  }
}

bool OriginPolicy::HostAllowed(std::string_view host) const {
  if (any_host_) return true;
  const std::string name = HostName(host);
  return (options_.loopback && IsLoopbackName(name)) ||
         std::ranges::find(options_.allowed_hosts, name) != options_.allowed_hosts.end();
}

bool OriginPolicy::OriginListed(std::string_view origin) const {
  return any_origin_ ||
         std::ranges::find(options_.allowed_origins, Lower(origin)) != options_.allowed_origins.end();
}

OriginPolicy::Verdict OriginPolicy::Check(const HttpRequest& request) const {
  const std::string_view host = request.Header("host");
  if (!host.empty() && !HostAllowed(host)) return Verdict::kHostRefused;
  const std::string_view origin = request.Header("origin");
  if (origin.empty()) return Verdict::kAllowed;
  const bool same = Lower(origin) == (options_.tls ? "https://" : "http://") + Lower(host);
  return same || OriginListed(origin) ? Verdict::kAllowed : Verdict::kOriginRefused;
}

std::optional<HttpReply> OriginPolicy::Filter(const HttpRequest& request) const {
  const auto refuse = [](const HttpErrorKind& kind, const std::string& message) {
    return HttpReply{kind.status, {{"Content-Type", "application/json"}}, HttpErrorBody(kind, message)};
  };
  switch (Check(request)) {
    case Verdict::kHostRefused:
      return refuse(
          http_errors::kHostNotAllowed,
          "this server has no name like the request's Host; call it as localhost, or add the name to "
          "gateway.allowed_hosts");
    case Verdict::kOriginRefused:
      return refuse(http_errors::kOriginNotAllowed,
                    "web pages of this origin may not call; add it to gateway.cors.allowed_origins");
    case Verdict::kAllowed:
      break;
  }
  if (IsPreflight(request)) return PreflightReply(request);
  return std::nullopt;
}

bool OriginPolicy::IsPreflight(const HttpRequest& request) {
  return request.method == "OPTIONS" && !request.Header("origin").empty() &&
         !request.Header("access-control-request-method").empty();
}

HttpReply OriginPolicy::PreflightReply(const HttpRequest& request) const {
  HttpReply reply;
  reply.status = 204;
  // Those asked for: clients send headers of their own (x-stainless-*), none of which means anything to us.
  const std::string_view wanted = request.Header("access-control-request-headers");
  reply.headers = {{"Access-Control-Allow-Methods", "GET, POST, DELETE"},
                   {"Access-Control-Max-Age", kPreflightSeconds}};
  if (!wanted.empty()) reply.headers.emplace_back("Access-Control-Allow-Headers", std::string(wanted));
  return reply;
}

void OriginPolicy::AddCorsHeaders(std::string_view origin, HttpHeaders& headers) const {
  if (options_.allowed_origins.empty()) return;
  // Also where none is sent: a cache must not give a page an answer that was made for another.
  headers.emplace_back("Vary", "Origin");
  if (origin.empty() || !OriginListed(origin)) return;
  headers.emplace_back("Access-Control-Allow-Origin", any_origin_ ? "*" : std::string(origin));
  headers.emplace_back("Access-Control-Expose-Headers", kExposed);
}

}  // namespace tidepool
