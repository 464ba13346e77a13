#pragma once

// Logging is spdlog's default logger: spdlog::info("...") anywhere. Levels: error cannot go on as asked;
// warn odd but continuing; info lifecycle; debug per object. Lower case, request id first, never prompts
// or secrets.
#include <spdlog/spdlog.h>

#include <string>
#include <string_view>

#include "base/status.h"

namespace tidepool {

// `text` as one line that a terminal shows as it is: control characters, characters that turn the direction
// of writing, and bytes that are no UTF-8 become \xNN. Names out of files and from peers may hold any of
// them.
std::string Printable(std::string_view text);
// The same status with its message as Printable gives it: for parsers, whose messages quote what they read.
absl::Status PrintableStatus(const absl::Status& status);

// Sends the process's log to stderr as "time level role[pid] message", the message as Printable gives it:
// what others wrote can neither begin a line of its own nor drive the terminal. `level`: error, warn, info,
// debug.
absl::Status InitLogging(std::string_view role, std::string_view level);

}  // namespace tidepool
