#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "server/gateway/json.h"

// Codec: OpenAI's batch lines.
//
//   in   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
//   out  {"id": "batch_req_HEX", "custom_id": "a",
//         "response": {"status_code": 200, "request_id": "...", "body": {...}} | null,
//         "error": null | {"code": "...", "message": "...", "line": 17}}
//
// `response` is there whenever a server answered, whatever it answered; `error` says why there is none. Its
// `line` (ours) is the number of the input's line, from 1, and there where that line names no custom_id.
namespace tidepool {

inline constexpr size_t kCustomIdCharsMax = 512;

// The urls that a line may ask for.
std::span<const std::string_view> BatchUrls();

// What is wrong with a line, or why it has no answer. `code` is stable.
struct BatchError {
  std::string code;
  std::string message;
  std::string param;
  uint64_t line = 0;  // of the input, from 1; 0: not said
};

// One line of input: with an error, only custom_id may be set (it may be known nevertheless).
struct BatchLine {
  std::string custom_id;
  std::string url;
  OrderedJson body;
  std::optional<BatchError> error;
};

// `number`: for messages. Never fails as a whole.
BatchLine ParseBatchLine(std::string_view text, uint64_t number);

// Lines of output, with their end. `body`: a JSON value on one line, written as it is.
std::string FormatAnswer(std::string_view custom_id, int status, std::string_view request_id,
                         std::string_view body);
// An empty custom_id becomes null.
std::string FormatFailure(std::string_view custom_id, const BatchError& error);

// What a line of output says of its input.
struct DoneLine {
  std::string custom_id;  // empty: see line
  uint64_t line = 0;
  bool ok = false;  // answered with 2xx
};
// Errors: InvalidArgument: no line of ours.
absl::StatusOr<DoneLine> ParseDoneLine(std::string_view text);

}  // namespace tidepool
