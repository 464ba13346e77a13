#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/probe.h"
#include "config/config.h"
#include "server/cluster/config_author.h"
#include "server/cluster/etcd_client.h"

namespace tidepool {

// What stands in etcd under PREFIX/config; README.md has the keys. Not judged yet: whoever can write to etcd
// may have written anything.
struct StoredConfig {
  std::string text;
  int64_t revision = 0;                // of the document; 0: there is none
  std::optional<ConfigAuthor> author;  // nullopt: it was written past `ctl config apply`

  // "/tidepool/config@12", for messages about it.
  std::string name;
};

// One look. Errors: EtcdClient's; FailedPrecondition: cluster.etcd is empty.
absl::StatusOr<StoredConfig> ReadStoredConfig(const ClusterConfig& config);

// Writes `text` where the document is still of `revision` (0: there is none); returns its revision. Aborted:
// somebody else was faster; it says who.
absl::StatusOr<int64_t> WriteStoredConfig(const ClusterConfig& config, int64_t revision,
                                          const std::string& text, const ConfigAuthor& author);

// ConfigWatch: tells what stands there, at the beginning and whenever it changes (Driver: owns a thread and a
// client). While etcd is away, or has lost its data, what was told last stays. Thread-safe.
class ConfigWatch {
 public:
  // Both are called on the watch's thread: `on_change` once with what is there, a document or none, then
  // after every change; `on_idle` every `idle` in which nothing else ended the watch.
  static absl::StatusOr<std::unique_ptr<ConfigWatch>> Start(
      const ClusterConfig& config, std::function<void(const StoredConfig&)> on_change,
      std::function<void()> on_idle, absl::Duration idle);
  ~ConfigWatch();

  // Until the first on_change has returned; false: etcd did not answer in time.
  bool WaitFirst(absl::Duration limit);
  // No on_change any more once it has returned. Idempotent.
  void Stop();

 private:
  ConfigWatch(std::string prefix, std::unique_ptr<EtcdClient> etcd,
              std::function<void(const StoredConfig&)> on_change, std::function<void()> on_idle,
              absl::Duration idle);
  void Run();
  void Tell();
  void TakeListing(const EtcdListing& listing);

  const std::string prefix_;
  const std::unique_ptr<EtcdClient> etcd_;
  const std::function<void(const StoredConfig&)> on_change_;
  const std::function<void()> on_idle_;
  const absl::Duration idle_;  // one that has gone silent is noticed after it, too

  // Of the watch's thread.
  std::optional<EtcdEntry> document_, author_;
  // Of the document that was told last; an etcd that lost its data counts revisions anew.
  std::optional<std::pair<int64_t, std::string>> told_;
  int64_t seen_ = 0;   // etcd's own, as last heard of
  bool lost_ = false;  // etcd has lost its data, and the document that holds with it

  std::mutex mu_;
  std::condition_variable wake_;
  bool stop_ = false;
  bool first_ = false;
  std::thread thread_;
};

}  // namespace tidepool
