#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/gateway/json.h"

namespace tidepool {

// A line of JSON as ParseJson reads it, but lenient about text: bytes that are not UTF-8 and surrogate
// escapes without their other half read as U+FFFD (one per maximal subpart, one per escape).
absl::StatusOr<OrderedJson> ParseJsonLine(std::string_view line);

// Turns one line of input into one line of output (appended to `out`, without its end). An error is for lines
// that cannot be read; it is reported in their place.
using LineFn = std::function<absl::Status(const OrderedJson& line, std::string& out)>;
// How such an error is written: the JSON members that go in front of "error".
//
// Reads objects, one a line, from the file descriptor `in` to its end, and writes one line to `out` for each
// that is not blank, buffered, but never holding back an answer while it waits for more. A line that cannot
// be read becomes {PREFIX"error":"line N: ..."}; the others go on, and the result is 1 with a summary on
// stderr. 0 otherwise.
int RunJsonLines(int in, std::FILE* out, std::string_view error_prefix, const LineFn& fn);

}  // namespace tidepool
