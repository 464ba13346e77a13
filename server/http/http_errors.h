#pragma once

#include <array>
#include <string_view>

namespace tidepool {

// What the HTTP server answers by itself: the lower half of the catalogue of errors (the gateway's own are in
// server/gateway/errors.h). `code` is stable; all have OpenAI's error body.
struct HttpErrorKind {
  std::string_view code;
  int status;
  std::string_view when;  // for ERRORS.md: one line of Markdown
};
namespace http_errors {
inline constexpr HttpErrorKind kBadHttp{
    "bad_http", 400, "malformed HTTP/1.x, or ambiguous: two lengths, a length with chunks, no Host"};
inline constexpr HttpErrorKind kHostNotAllowed{
    "host_not_allowed", 403,
    "the Host header is none of this server's names (DNS rebinding): see `gateway.allowed_hosts`"};
inline constexpr HttpErrorKind kOriginNotAllowed{
    "origin_not_allowed", 403, "a web page of another origin asks: see `gateway.cors.allowed_origins`"};
inline constexpr HttpErrorKind kMetricsElsewhere{"metrics_elsewhere", 403,
                                                 "metrics are served on `gateway.metrics_listen` alone"};
inline constexpr HttpErrorKind kNotFound{"not_found", 404, "nothing is at this path"};
inline constexpr HttpErrorKind kMethodNotAllowed{"method_not_allowed", 405,
                                                 "the path takes other methods: see `Allow`"};
inline constexpr HttpErrorKind kSlowRequest{
    "slow_request", 408, "headers not complete within `header_timeout`, or the body within `body_timeout`"};
inline constexpr HttpErrorKind kTooLarge{"request_too_large", 413, "the body exceeds `max_body_bytes`"};
inline constexpr HttpErrorKind kUriTooLong{"uri_too_long", 414, "the request target exceeds 8 KiB"};
inline constexpr HttpErrorKind kExpectation{"expectation_failed", 417, "an Expect other than 100-continue"};
inline constexpr HttpErrorKind kHeaderTooLarge{
    "header_too_large", 431, "more than 100 headers, one above 8 KiB, or all above `max_header_bytes`"};
inline constexpr HttpErrorKind kInternal{"internal_error", 500, "our fault"};
inline constexpr HttpErrorKind kTooManyConnections{"too_many_connections", 503,
                                                   "more than `max_connections` are open"};
inline constexpr HttpErrorKind kBadVersion{"bad_http_version", 505, "neither HTTP/1.0 nor HTTP/1.1"};
}  // namespace http_errors

inline constexpr std::array kHttpErrorCatalogue = {http_errors::kBadHttp,
                                                   http_errors::kHostNotAllowed,
                                                   http_errors::kOriginNotAllowed,
                                                   http_errors::kMetricsElsewhere,
                                                   http_errors::kNotFound,
                                                   http_errors::kMethodNotAllowed,
                                                   http_errors::kSlowRequest,
                                                   http_errors::kTooLarge,
                                                   http_errors::kUriTooLong,
                                                   http_errors::kExpectation,
                                                   http_errors::kHeaderTooLarge,
                                                   http_errors::kInternal,
                                                   http_errors::kTooManyConnections,
                                                   http_errors::kBadVersion};

}  // namespace tidepool
