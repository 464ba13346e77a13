#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "base/status.h"
#include "server/cli/supervisor.h"

namespace tidepool {

// What a running `tidepool serve` leaves for `tidepool ctl` of the same user: where its scheduler is, the
// cluster token, and its processes. JSON in a file of mode 0600 in a directory of mode 0700, removed at the
// end; a file whose process is gone is ignored.
struct ServeRuntime {
  pid_t pid = 0;
  std::string http;       // host:port of the gateway
  std::string grpc;       // host:port of the gateway
  std::string scheduler;  // host:port
  std::string token;
  std::string metrics;  // host:port of the supervisor's own HTTP
  std::vector<ChildStatus> children;
  // Of ListRuntimes: SIGUSR1 makes it read its configuration again. An older one would end by it.
  bool reloads = false;
};

// $XDG_RUNTIME_DIR/tidepool, else /tmp/tidepool-UID.
std::string RuntimeDirectory();
// The file of process `pid`.
std::string RuntimePath(pid_t pid);

// The file of live fields that process `pid` leaves for its children once it has read its configuration
// again.
std::string ReloadedPath(pid_t pid);
// Replaces it in one step. Errors: as WriteRuntime; InvalidArgument: it is longer than what a child reads.
absl::Status WriteReloaded(pid_t pid, const std::string& yaml);

// Replaces the file of `runtime.pid` in one step. Errors: FailedPrecondition where the directory is not
// ours alone.
absl::Status WriteRuntime(const ServeRuntime& runtime);
// Both files.
void RemoveRuntime(pid_t pid);
// Those of this user whose process lives, and is the one that wrote the file. Unreadable files are skipped.
std::vector<ServeRuntime> ListRuntimes();

const char* StateName(SupervisorCore::State state);

}  // namespace tidepool
