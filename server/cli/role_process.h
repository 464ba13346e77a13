#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "config/config.h"
#include "server/cli/supervisor.h"

namespace tidepool {

// What a started role offers to its process. All members are set; but where said; callable from any thread.
struct RunningRole {
  std::function<bool()> ready;
  std::function<void()> begin_drain;
  std::function<void(absl::Duration grace)> shutdown;
  ReadyInfo info;  // addresses, for the readiness line and the log
  // Live fields of the configuration hold from now on: all of them, or on an error none. From any thread.
  std::function<absl::Status(const Config&)> apply;
  // What SIGHUP does; may be empty: nothing. It logs its own errors.
  std::function<void()> reload;
  // It was told over the network that the process is to end, and nothing keeps it; may be empty: never.
  std::function<bool()> wants_to_end;
};

// The frame around one role in its process: blocks SIGTERM, SIGINT and SIGHUP before any thread exists, calls
// `start`, reports readiness to the supervisor (kReadyFdEnv) once the role is ready, and on the first signal
// or when the role wants to end, drains for at most `drain_timeout` (while still starting: ends at once); a
// second signal ends the process at once with exit code 1. Returns the exit code.
int RunRole(const std::string& role, absl::Duration drain_timeout,
            const std::function<absl::StatusOr<RunningRole>()>& start);

// Takes the descriptor that kReadyFdEnv names, if any, out of the environment and keeps it from processes
// that we start: to be called once, before any of them and before any thread that may look at the
// environment.
void TakeReadyFd();

// Writes the readiness line to what TakeReadyFd has taken, if anything, and closes it.
void ReportReady(const ReadyInfo& info);

}  // namespace tidepool
