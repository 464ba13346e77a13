#include "server/gateway/errors.h"

#include <array>

#include "server/gateway/json.h"

namespace tidepool {
namespace {

using namespace errors;  // NOLINT: the catalogue, listed
constexpr std::array kCatalogue = {
    kInvalidRequest, kInvalidJson, kUnsupported,  kContextLength, kChatTemplate, kUnauthorized,
    kModelNotFound,  kNotFound,    kFileTooLarge, kStorageLimit,  kOverloaded,   kTooManyRequests,
    kQueueFull,      kRateLimited, kInternal,     kBatchesOff,    kStorage,      kNotReady,
    kDraining,       kUnavailable, kTimeout,      kClientGone,    kSlowClient};

}  // namespace

std::string_view ErrorType(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
  }
  return status >= 500 ? "server_error" : "invalid_request_error";
}

std::span<const ErrorKind> ErrorCatalogue() { return kCatalogue; }

ApiError MakeError(const ErrorKind& kind, std::string message, std::string param) {
  ApiError error;
  error.status = kind.status;
  error.code = kind.code;
  error.message = std::move(message);
  error.param = std::move(param);
  return error;
}

ApiError MakeRetryable(const ErrorKind& kind, std::string message, uint32_t retry_after_seconds) {
  ApiError error = MakeError(kind, std::move(message));
  error.retry_after_seconds = retry_after_seconds;
  return error;
}

std::string ErrorBody(const ApiError& error) {
  OrderedJson body;
  body["message"] = error.message;
  body["type"] = ErrorType(error.status);
  body["param"] = error.param.empty() ? OrderedJson(nullptr) : OrderedJson(error.param);
  body["code"] = error.code;
  return DumpJson(OrderedJson{{"error", body}});
}

absl::StatusCode GrpcCode(const ApiError& error) {
  switch (error.status) {
    case 400:
      return absl::StatusCode::kInvalidArgument;
    case 401:
      return absl::StatusCode::kUnauthenticated;
    case 403:
      return absl::StatusCode::kPermissionDenied;
    case 404:
      return absl::StatusCode::kNotFound;
    case 413:
    case 429:
      return absl::StatusCode::kResourceExhausted;
    case 499:
      return absl::StatusCode::kCancelled;
    case 503:
      return absl::StatusCode::kUnavailable;
    case 504:
      return absl::StatusCode::kDeadlineExceeded;
  }
  return absl::StatusCode::kInternal;
}

absl::Status FieldError(std::string_view field, std::string_view what) {
  return absl::InvalidArgumentError(std::string(field) + ": " + std::string(what));
}

ApiError FromFieldError(const ErrorKind& kind, const absl::Status& status) {
  const std::string message(status.message());
  const size_t colon = message.find(": ");
  std::string param = colon == std::string::npos ? "" : message.substr(0, colon);
  if (param.find(' ') != std::string::npos) param.clear();
  return MakeError(kind, message, std::move(param));
}

}  // namespace tidepool
