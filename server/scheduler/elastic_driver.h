#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "absl/time/time.h"
#include "base/clock.h"
#include "base/probe.h"
#include "scheduler/elasticity.h"
#include "server/rpc/rpc.h"
#include "tidepool/v1/cluster.pb.h"

namespace tidepool {

// ElasticDriver: looks at the cluster about once a second and, with ElasticityMode::kAct, tells a worker to
// change its role where ElasticityCore says so. Driver: owns a thread, which is the one that waits for
// workers' answers. Thread-safe.
class ElasticDriver {
 public:
  // A cluster as its scheduler sees it now.
  struct View {
    uint64_t term = 0;  // 0: there are no terms
    ElasticityLoad load;
    // How to reach a worker of `load`; empty: it is gone. Called as Look is.
    std::function<std::string(const std::string& worker)> grpc;
  };
  // Called on the driver's thread, without its lock; nullopt: this scheduler does not lead.
  using Look = std::function<std::optional<View>()>;

  // `metrics` and `clock` outlive it.
  ElasticDriver(ElasticityMode mode, absl::Duration dwell, std::string cluster_token, Look look,
                MetricRegistry& metrics, const Clock& clock);
  ~ElasticDriver();

  void Start();
  // Ends a call under way. Idempotent.
  void Stop();
  // From now on.
  void Apply(ElasticityMode mode, absl::Duration dwell);
  // What was found last; mode only before that.
  v1::Elasticity Get() const;

 private:
  void Run();
  // One look, and what follows from it; `lock` is let go meanwhile.
  void Once(std::unique_lock<std::mutex>& lock);
  absl::Status Order(const std::string& worker, Role role, const View& view,
                     std::unique_lock<std::mutex>& lock);
  void Export(const ElasticityAdvice& advice);
  // There is nothing to say: not looked at, or not by this scheduler.
  void Clear();
  absl::Duration Interval() const;

  const std::string token_;
  const Look look_;
  MetricRegistry& metrics_;
  const Clock& clock_;
  Counter& changed_;
  Counter& refused_;
  ChannelCache channels_;

  mutable std::mutex mu_;
  std::condition_variable wake_;
  ElasticityMode mode_;
  ElasticityOptions options_;
  std::optional<ElasticityCore> core_;  // of term_; none while this scheduler does not lead
  uint64_t term_ = 0;
  v1::Elasticity last_;
  std::string said_;  // of a worker that should change, to the log
  grpc::ClientContext* call_ = nullptr;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace tidepool
