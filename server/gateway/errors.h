#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tidepool {

// ApiError: why a request was not answered, as clients see it over HTTP and gRPC. Plain data.
struct ApiError {
  int status = 500;                  // HTTP
  std::string_view code;             // from the catalogue below; static storage; also the metrics' `reason`
  std::string message;               // what is wrong, the limit, the fix; never addresses, paths or prompts
  std::string param;                 // the request's field, where one is to blame
  uint32_t retry_after_seconds = 0;  // with 429 and 503
};

// The catalogue: every error a client can get, in one place. `code` is stable.
struct ErrorKind {
  std::string_view code;
  int status;
};
namespace errors {
inline constexpr ErrorKind kInvalidRequest{"invalid_request", 400};  // a field is wrong: see param
inline constexpr ErrorKind kInvalidJson{"invalid_json", 400};
inline constexpr ErrorKind kUnsupported{"unsupported_parameter", 400};  // a field we know and do not serve
inline constexpr ErrorKind kContextLength{"context_length_exceeded", 400};
inline constexpr ErrorKind kChatTemplate{"chat_template_error", 400};  // the template refused the messages
inline constexpr ErrorKind kUnauthorized{"invalid_api_key", 401};
inline constexpr ErrorKind kModelNotFound{"model_not_found", 404};
inline constexpr ErrorKind kOverloaded{"slo_unattainable", 429};        // early rejection by the scheduler
inline constexpr ErrorKind kTooManyRequests{"too_many_requests", 429};  // the gateway's own limit
inline constexpr ErrorKind kInternal{"internal_error", 500};
inline constexpr ErrorKind kNotReady{"not_ready", 503};  // no model or no workers yet
inline constexpr ErrorKind kDraining{"draining", 503};
inline constexpr ErrorKind kUnavailable{"no_worker", 503};  // workers failed, or the scheduler is away
inline constexpr ErrorKind kTimeout{"request_timeout", 504};
// The client's own leaving: nobody reads it; 499 appears in metrics and logs only.
inline constexpr ErrorKind kClientGone{"client_gone", 499};
inline constexpr ErrorKind kSlowClient{"slow_client", 499};
}  // namespace errors

std::span<const ErrorKind> ErrorCatalogue();

ApiError MakeError(const ErrorKind& kind, std::string message, std::string param = {});
// 429 and 503 tell when to come back.
ApiError MakeRetryable(const ErrorKind& kind, std::string message, uint32_t retry_after_seconds);

// OpenAI's body: {"error":{"message","type","param","code"}}.
std::string ErrorBody(const ApiError& error);
absl::StatusCode GrpcCode(const ApiError& error);

// InvalidArgument whose message is "field: what", as the parsers return; the field becomes `param`.
absl::Status FieldError(std::string_view field, std::string_view what);
ApiError FromFieldError(const ErrorKind& kind, const absl::Status& status);

}  // namespace tidepool
