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

// The catalogue: every error a client can get, in one place; what the HTTP server finds by itself, before a
// request reaches the gateway, is in server/http/http_errors.h. `code` is stable. ERRORS.md shows both, and a
// test keeps it equal.
struct ErrorKind {
  std::string_view code;
  int status;
  std::string_view when = {};  // for ERRORS.md: one line of Markdown
};
namespace errors {
inline constexpr ErrorKind kInvalidRequest{"invalid_request", 400, "a field is wrong; `param` names it"};
inline constexpr ErrorKind kInvalidJson{
    "invalid_json", 400,
    "the body is no JSON, or nested too deep, or gives a key twice, or a number out of range"};
inline constexpr ErrorKind kUnsupported{"unsupported_parameter", 400,
                                        "a field that we know and do not serve; `param` names it"};
inline constexpr ErrorKind kContextLength{"context_length_exceeded", 400,
                                          "prompt and answer do not fit the model's context"};
inline constexpr ErrorKind kChatTemplate{"chat_template_error", 400,
                                         "the model's chat template refused the messages"};
inline constexpr ErrorKind kUnauthorized{"invalid_api_key", 401, "no API key, or one that is not known"};
inline constexpr ErrorKind kModelNotFound{"model_not_found", 404, "the model is not served here"};
inline constexpr ErrorKind kNotFound{"not_found", 404, "no such file or batch, or another tenant's"};
inline constexpr ErrorKind kFileTooLarge{"file_too_large", 413, "an uploaded file exceeds the limit"};
inline constexpr ErrorKind kStorageLimit{"storage_limit_reached", 400,
                                         "the tenant's files are as many, or as large, as they may be"};
inline constexpr ErrorKind kOverloaded{"slo_unattainable", 429,
                                       "the scheduler predicts that the answer would come too late"};
inline constexpr ErrorKind kTooManyRequests{"too_many_requests", 429,
                                            "too many requests in flight, of all tenants or of this one"};
inline constexpr ErrorKind kQueueFull{
    "queue_full", 429,
    "too many requests, or prompt tokens, wait for their first token, of all tenants or of this one"};
inline constexpr ErrorKind kRateLimited{"rate_limit_exceeded", 429,
                                        "the tenant's requests or tokens per minute are used up"};
inline constexpr ErrorKind kInternal{"internal_error", 500, "our fault"};
inline constexpr ErrorKind kBatchesOff{"batches_disabled", 501,
                                       "files and batches are not configured on this server"};
inline constexpr ErrorKind kStorage{"storage_unavailable", 503, "files cannot be read or written now"};
inline constexpr ErrorKind kNotReady{"not_ready", 503, "no model or no workers yet"};
inline constexpr ErrorKind kDraining{"draining", 503, "the gateway shuts down"};
inline constexpr ErrorKind kUnavailable{"no_worker", 503, "workers failed, or the scheduler is away"};
inline constexpr ErrorKind kTimeout{"request_timeout", 504,
                                    "the answer was not complete within the deadline"};
// The client's own leaving: nobody reads it; 499 appears in metrics and logs only.
inline constexpr ErrorKind kClientGone{"client_gone", 499, "the client went away; in metrics and logs only"};
inline constexpr ErrorKind kSlowClient{"slow_client", 499,
                                       "the client did not read its stream; in metrics and logs only"};
}  // namespace errors

std::span<const ErrorKind> ErrorCatalogue();
// OpenAI's `type` of a status.
std::string_view ErrorType(int status);

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
