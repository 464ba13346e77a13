#pragma once

#include <sys/types.h>

#include <atomic>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "config/loader.h"
#include "server/batch/file_io.h"

namespace tidepool {

// EmbeddedCluster: a `tidepool serve` of our own, for as long as a command runs (Handle). It listens on free
// ports of the loopback interface, without keys or TLS, and without files and batches of its own. It gets
// SIGTERM when it is destroyed, and when this process dies, however it dies.
class EmbeddedCluster {
 public:
  // Waits until it is ready. Call from the main thread: the parent-death signal follows the thread. Its log
  // goes to our stderr, from level warn on unless one is configured. Errors: InvalidArgument (it refused its
  // configuration), Cancelled (`stop` became true), DeadlineExceeded, Internal.
  static absl::StatusOr<std::unique_ptr<EmbeddedCluster>> Start(const LoadedConfig& config,
                                                                const std::atomic<bool>& stop);
  ~EmbeddedCluster();
  EmbeddedCluster(const EmbeddedCluster&) = delete;
  EmbeddedCluster& operator=(const EmbeddedCluster&) = delete;

  const std::string& endpoint() const { return endpoint_; }  // http://host:port

 private:
  EmbeddedCluster() = default;
  absl::Status Spawn(const LoadedConfig& config, FileHandle& ready);
  absl::Status WaitReady(const FileHandle& ready, absl::Duration timeout, const std::atomic<bool>& stop);

  pid_t pid_ = 0;
  std::string endpoint_;
};

}  // namespace tidepool
