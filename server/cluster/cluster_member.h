#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/probe.h"
#include "config/config.h"
#include "server/cluster/etcd_client.h"
#include "server/cluster/member_core.h"
#include "server/cluster/scheduler_locator.h"
#include "tidepool/v1/member.pb.h"

namespace tidepool {

// ClusterMember: this process's place in a cluster that meets in etcd: a lease, its entry under members/, who
// leads, and, of a scheduler, the election. Driver around MemberCore; owns two threads, one for the lease,
// one for the watch. While etcd is away everything stays as it was last seen. Thread-safe. README.md has the
// keys.
class ClusterMember final : public SchedulerLocator, public Leadership {
 public:
  struct Options {
    ClusterConfig config;
    bool candidate = false;
    // Watch the members, too; else only who leads.
    bool watch_members = false;
    std::string boot_id;
    MetricRegistry* metrics = nullptr;  // outlives it
  };

  // Starts looking for etcd and does not wait for it. InvalidArgument: a PEM file that cannot be read.
  static absl::StatusOr<std::unique_ptr<ClusterMember>> Start(Options options);
  // Null where the configuration names no etcd.
  static absl::StatusOr<std::shared_ptr<ClusterMember>> StartIfConfigured(Options options);
  // Resigns.
  ~ClusterMember() override;

  // Known as `self` from now on; a candidate campaigns from now on. Again: what is known of it has changed;
  // with another role (or id) under another key, and under the old one no more.
  void Join(const v1::Member& self);
  // Known no more.
  void Leave();
  // Gives the lease back, and with it the leadership: another scheduler takes over at once. The last call.
  void Resign();

  Place Get() const override;
  bool Obey(uint64_t term) override;

  std::optional<uint64_t> Term(uint64_t callers_term) override;
  std::string LeaderAddress() const override;
  std::vector<v1::Member> Members() const override;
  bool EtcdReachable() const override;

 private:
  struct Probe;
  explicit ClusterMember(Options options);

  void Run();
  // One call to etcd, with the lock let go meanwhile.
  void Execute(const MemberCore::Step& step, std::unique_lock<std::mutex>& lock);
  // What stands in the leader's key afterwards.
  absl::StatusOr<EtcdEntry> Campaign(const MemberCore::Step& step, v1::Member self);
  void Watch();
  // These hold mu_.
  void TakeListing(const EtcdListing& listing);
  void TakeEvent(const EtcdClient::WatchEvent& event);
  // What the value says; nullopt: it is not understood, which is counted.
  std::optional<v1::Member> Decode(const EtcdEntry& entry);
  std::optional<Leader> ToLeader(const EtcdEntry& entry);
  void TakeLeader(const EtcdEntry& entry);
  void TakeMember(const EtcdEntry& entry);
  void Changed();
  void Note(const absl::Status& status, const char* what);
  std::string MemberKey() const;

  const Options options_;
  const std::string prefix_;  // ends in /
  const std::unique_ptr<Probe> probe_;
  std::unique_ptr<EtcdClient> etcd_;

  mutable std::mutex mu_;
  std::condition_variable wake_;
  bool stop_ = false;
  bool changed_ = false;
  MemberCore core_;
  v1::Member self_;
  bool joined_ = false;
  std::vector<std::string> old_keys_;          // under which self_ may still be known
  uint64_t wishes_ = 0;                        // Join and Leave, counted
  std::map<std::string, v1::Member> members_;  // by key
  Place told_;                                 // to the log
  std::string last_error_;
  std::thread lease_thread_, watch_thread_;
};

// The scheduler's locator of this configuration: `member`, where there is one, else the configured address.
std::shared_ptr<SchedulerLocator> MakeLocator(const ClusterConfig& config,
                                              std::shared_ptr<ClusterMember> member);

// Asks etcd once who leads: for commands. Unavailable: nobody, or etcd does not answer.
absl::StatusOr<std::string> FindLeader(const ClusterConfig& config);

}  // namespace tidepool
