#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/probe.h"
#include "config/cluster_document.h"
#include "config/loader.h"
#include "server/cluster/config_store.h"

namespace tidepool {

// LiveConfig: a process's configuration while it runs: as it was started with, and what has changed since, in
// its file (Reload) or in the cluster's document, which it watches where cluster.etcd is set. Fields that can
// change under a running process do so at once (ClusterUse::kLive); the others are named in the log and
// counted by tidepool_config_restart_needed until the process is started again or they are as before.
//
// A change is taken as a whole or not at all: a document or file that is broken, or that the process refuses,
// is logged and counted, and what held before goes on to hold. Driver: owns the watch's thread. Thread-safe.
class LiveConfig {
 public:
  struct Options {
    ConfigRole role = ConfigRole::kServe;
    // Reads file, environment and flags, over the cluster's document (null: none), and validates for `role`.
    std::function<absl::StatusOr<LoadedConfig>(std::shared_ptr<const LoadedConfig> cluster)> load;
    MetricRegistry* metrics = nullptr;  // outlives it
    // How long a start may wait for etcd to say what the document is. After it the process starts without,
    // and takes what can be taken when etcd answers.
    absl::Duration first_look = absl::Seconds(3);
    // A document that was refused is tried again so often: what it was refused for may have been a file, or
    // passing.
    absl::Duration try_again = absl::Seconds(5);
  };

  // Errors: those of `load` without a document. A document that is refused is none.
  static absl::StatusOr<std::unique_ptr<LiveConfig>> Start(Options options);
  ~LiveConfig();

  // What the process is to start with; later what it runs with.
  LoadedConfig current() const;

  // From now on changes of live fields go to `apply`, which takes all of it or, on an error, nothing; what
  // came since Start, first. Called from any thread, one call at a time.
  void Run(std::function<absl::Status(const Config&)> apply);
  // Reads file, environment and flags again; a document that is refused is tried with them first. Logs and
  // counts what becomes of it.
  absl::Status Reload();
  // Nothing is applied any more once it has returned. Idempotent.
  void Stop();

 private:
  struct Probe;
  explicit LiveConfig(Options options);
  // The following hold mu_.
  absl::Status TakeStored(const StoredConfig& stored);
  absl::Status TakeRefused();
  // Over `document`: what changes because of it is logged as `why`.
  absl::Status Take(std::shared_ptr<const LoadedConfig> document, const std::string& why);
  void Refuse(const std::string& what, const absl::Status& status);
  void ExportRestart(const LoadedConfig& wanted);

  const Options options_;
  const std::unique_ptr<Probe> probe_;

  mutable std::mutex mu_;
  // What comes while the process is being made of running_ waits until Run.
  enum class Phase { kLooking, kStarting, kRunning, kStopped } phase_ = Phase::kLooking;
  std::function<absl::Status(const Config&)> apply_;
  LoadedConfig running_;
  std::shared_ptr<const LoadedConfig> document_;  // that holds; null: none
  std::optional<StoredConfig> waiting_;           // came in kStarting
  struct Refused {
    StoredConfig stored;
    absl::Status status;
  };
  std::optional<Refused> refused_;         // the document that stands, where it does not hold
  std::vector<std::string_view> restart_;  // paths, as said last
  std::unique_ptr<ConfigWatch> watch_;     // set by Start alone
};

}  // namespace tidepool
