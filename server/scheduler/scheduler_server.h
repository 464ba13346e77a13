#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/probe.h"
#include "config/config.h"
#include "server/cluster/scheduler_locator.h"

namespace tidepool {

// SchedulerServer: the scheduler process's gRPC service (tidepool.v1.Scheduler). Driver: owns the listener,
// a timer thread and the SchedulerCore, which one mutex guards (a decision takes microseconds, so callers
// wait for each other on gRPC's callback threads). All that it knows comes from workers' reports: it may be
// restarted at any time. Thread-safe.
class SchedulerServer {
 public:
  // Listens at once. `metrics` (and `clock`, `leadership`) outlive the server. With `leadership`, which one
  // of several schedulers has at a time, calls are Unavailable while another leads, and say who. Errors:
  // Unavailable, the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<SchedulerServer>> Start(const SchedulerConfig& config,
                                                                const std::string& cluster_token,
                                                                MetricRegistry& metrics,
                                                                const Clock& clock = Clock::Real(),
                                                                Leadership* leadership = nullptr);
  // Shuts down without grace where Shutdown was not called.
  ~SchedulerServer();

  // From now on: the objectives, policies and limits of `config`. What listens stays as it is. From any
  // thread.
  void Apply(const SchedulerConfig& config);

  int port() const;
  // Listening and not being shut down. That workers are there is the gateway's condition.
  bool ready() const;
  // Refuses new calls, waits at most `grace` for those running, joins. Idempotent.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  explicit SchedulerServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
