#include "server/gateway/errors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "server/http/http_errors.h"

namespace tidepool {
namespace {

constexpr char kPage[] = "server/gateway/ERRORS.md";

const char* GrpcName(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
      return "INVALID_ARGUMENT";
    case absl::StatusCode::kUnauthenticated:
      return "UNAUTHENTICATED";
    case absl::StatusCode::kPermissionDenied:
      return "PERMISSION_DENIED";
    case absl::StatusCode::kNotFound:
      return "NOT_FOUND";
    case absl::StatusCode::kResourceExhausted:
      return "RESOURCE_EXHAUSTED";
    case absl::StatusCode::kCancelled:
      return "CANCELLED";
    case absl::StatusCode::kUnavailable:
      return "UNAVAILABLE";
    case absl::StatusCode::kDeadlineExceeded:
      return "DEADLINE_EXCEEDED";
    default:
      return "INTERNAL";
  }
}

std::string Page() {
  std::string page =
      "# Errors\n\n"
      "Every error that a client can get; made from `errors.h` and `server/http/http_errors.h` by\n"
      "`TIDEPOOL_REGENERATE=1 gateway_errors_test`, and kept equal to them by that test.\n\n"
      "The body is OpenAI's, `{\"error\": {\"message\", \"type\", \"param\", \"code\"}}`; `/v1/messages` "
      "answers in\n"
      "Anthropic's shape. `code` is stable and also the `reason` of `tidepool_requests_total`; `message` "
      "names the\n"
      "field, the limit and the fix, and never a path, an address or a place in the source. 429 and 503 "
      "carry\n"
      "`Retry-After` in seconds and `Retry-After-Ms`; over gRPC `grpc-retry-pushback-ms`. An error after the "
      "first\n"
      "event of a stream is an `error` event without `[DONE]`, or the call's status.\n\n"
      "| code | HTTP | type | gRPC | when |\n|---|---|---|---|---|\n";
  for (const ErrorKind& kind : ErrorCatalogue()) {
    ApiError error = MakeError(kind, "");
    absl::StrAppend(&page, "| `", std::string(kind.code), "` | ", kind.status, " | ",
                    std::string(ErrorType(kind.status)), " | ", GrpcName(GrpcCode(error)), " | ",
                    std::string(kind.when), " |\n");
  }
  absl::StrAppend(&page,
                  "\nWhat the HTTP server answers before a request reaches the gateway:\n\n"
                  "| code | HTTP | when |\n|---|---|---|\n");
  for (const HttpErrorKind& kind : kHttpErrorCatalogue) {
    absl::StrAppend(&page, "| `", std::string(kind.code), "` | ", kind.status, " | ", std::string(kind.when),
                    " |\n");
  }
  return page;
}

TEST(ErrorsTest, ThePageShowsTheCatalogue) {
  if (std::getenv("TIDEPOOL_REGENERATE") != nullptr) std::ofstream(kPage) << Page();
  std::stringstream written;
  written << std::ifstream(kPage).rdbuf();
  EXPECT_EQ(written.str(), Page()) << "run with TIDEPOOL_REGENERATE=1";
}

TEST(ErrorsTest, EveryKindSaysWhenAndOneCodeIsOneStatus) {
  std::map<std::string_view, int> statuses;
  for (const ErrorKind& kind : ErrorCatalogue()) {
    EXPECT_FALSE(kind.when.empty()) << kind.code;
    EXPECT_TRUE(statuses.emplace(kind.code, kind.status).second) << kind.code;
  }
  for (const HttpErrorKind& kind : kHttpErrorCatalogue) {
    EXPECT_FALSE(kind.when.empty()) << kind.code;
    EXPECT_EQ(statuses.emplace(kind.code, kind.status).first->second, kind.status) << kind.code;
  }
}

TEST(ErrorsTest, TypesAreOpenAis) {
  EXPECT_EQ(ErrorType(400), "invalid_request_error");
  EXPECT_EQ(ErrorType(401), "authentication_error");
  EXPECT_EQ(ErrorType(403), "permission_error");
  EXPECT_EQ(ErrorType(404), "not_found_error");
  EXPECT_EQ(ErrorType(429), "rate_limit_error");
  EXPECT_EQ(ErrorType(503), "server_error");
}

}  // namespace
}  // namespace tidepool
