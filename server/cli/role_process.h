#pragma once

#include <functional>
#include <string>

#include "absl/time/time.h"
#include "server/cli/supervisor.h"

namespace tidepool {

// What a started role offers to its process. All members are set; but where said; callable from any thread.
struct RunningRole {
  std::function<bool()> ready;
  std::function<void()> begin_drain;
  std::function<void(absl::Duration grace)> shutdown;
  ReadyInfo info;  // addresses, for the readiness line and the log
  // What SIGHUP does; may be empty: nothing. It logs its own errors.
  std::function<void()> reload;
};

// The frame around one role in its process: blocks SIGTERM, SIGINT and SIGHUP before any thread exists, calls
// `start`, reports readiness to the supervisor (kReadyFdEnv) once the role is ready, and on the first signal
// drains for at most `drain_timeout` (while still starting: ends at once); a second signal ends the process
// at once with exit code 1. Returns the exit code.
int RunRole(const std::string& role, absl::Duration drain_timeout,
            const std::function<absl::StatusOr<RunningRole>()>& start);

// Writes the readiness line to the descriptor named by kReadyFdEnv, if there is one, and closes it.
void ReportReady(const ReadyInfo& info);

// Readiness is closed to the processes that we start: call before any of them is.
void KeepReadyFdFromChildren();

}  // namespace tidepool
