#pragma once

// Logging is spdlog's default logger: spdlog::info("...") anywhere. Levels: error cannot go on as asked;
// warn odd but continuing; info lifecycle; debug per object. Lower case, request id first, never prompts
// or secrets.
#include <spdlog/spdlog.h>

#include <string_view>

#include "base/status.h"

namespace tidepool {

// Sends the process's log to stderr as "time level role[pid] message". `level`: error, warn, info, debug.
absl::Status InitLogging(std::string_view role, std::string_view level);

}  // namespace tidepool
