#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "absl/time/time.h"
#include "base/clock.h"
#include "server/cluster/scheduler_locator.h"
#include "server/http/admin_server.h"
#include "server/rpc/rpc.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {

// What is served now. Immutable snapshot.
struct ClusterSnapshot {
  std::optional<v1::ModelIdentity> model;
  int prefilling = 0;  // ready workers that can prefill
  int decoding = 0;    // ready workers that can decode
  uint64_t decode_pool_tokens =
      0;              // KV capacity of the smallest decode worker that is, or was last, ready; 0: unknown
  std::string error;  // why the scheduler did not answer last time; empty: it did

  // Everything is there that an answer takes.
  bool complete() const { return error.empty() && model && decoding > 0 && prefilling > 0; }
};

// ClusterWatch: polls Scheduler.Cluster (Driver; owns one thread). Once known, the model identity is kept
// while the scheduler is away, or new and without workers yet; a scheduler that names another model replaces
// it.
class ClusterWatch {
 public:
  // `channels`, `scheduler` and `clock` outlive it. `bridged`: for how long a request that comes now would
  // wait for a scheduler and a worker rather than be refused; zero: not at all.
  ClusterWatch(ChannelCache& channels, const SchedulerLocator& scheduler, std::string token,
               absl::Duration interval, absl::Duration bridged, const Clock& clock = Clock::Real());
  ~ClusterWatch();

  // `on_poll` runs on the watch's thread after each poll.
  void Start(std::function<void()> on_poll);
  void Stop();
  std::shared_ptr<const ClusterSnapshot> Get() const;
  // Checks for /readyz: scheduler, model, decode, prefill. What was all there a moment ago still counts as
  // there for `bridged`: a takeover takes no gateway out of a load balancer.
  ReadyReport Report() const;

 private:
  void Run();
  void Poll();

  ChannelCache& channels_;
  const SchedulerLocator& scheduler_;
  const std::string token_;
  const absl::Duration interval_, bridged_;
  const Clock& clock_;
  std::function<void()> on_poll_;

  mutable std::mutex mu_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::shared_ptr<const ClusterSnapshot> snapshot_;
  absl::Time complete_at_ = absl::InfinitePast();  // the last poll that found everything
  std::thread thread_;
};

}  // namespace tidepool
