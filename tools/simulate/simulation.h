#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "scheduler/elasticity.h"
#include "scheduler/fair_queue.h"
#include "scheduler/options.h"
#include "scheduler/replication.h"
#include "tools/simulate/profile.h"
#include "tools/simulate/result.h"
#include "tools/simulate/workload.h"

namespace tidepool {

// What goes wrong in a run. All of it is drawn from the run's seed. Zero: never.
struct FaultOptions {
  double worker_crash_every_seconds = 0;  // mean, over all workers: one loses all that it has
  double worker_down_seconds = 5;         // mean, until it is back as another process
  double report_loss = 0;                 // share of the reports that do not arrive
  double report_delay_seconds = 0;        // at most so much later, so that they overtake each other
  double scheduler_crash_every_seconds = 0;
  double scheduler_down_seconds = 2;
};

struct SimOptions {
  uint32_t prefill = 0, decode = 0, both = 0;  // workers by role
  SchedulerOptions scheduler;                  // its objectives are those that requests are judged by, too
  ReplicationOptions replication;
  ElasticityMode elasticity = ElasticityMode::kOff;
  ElasticityOptions elasticity_options;
  bool oracle_lengths = false;  // the scheduler knows how long answers get
  std::string eviction = "turn-aware";
  FairQueue::Order order = FairQueue::Order::kVtc;  // of what waits in an engine
  uint32_t pool_blocks = 0;                         // 0: the profile's
  uint32_t max_tokens = 2048;                       // what clients ask for at most, where answers are shorter
  double report_interval_seconds = 0.1;
  double sample_seconds = 0;  // of the load; 0: a thousandth of the arrivals' span
  uint64_t seed = 1;
  FaultOptions faults;
  uint32_t attempts_max = 4;  // workers that a request is placed on before it counts as failed
};

// Share of the requests that have ended; called often.
using SimProgress = std::function<void(double share)>;

// Simulates a cluster of such workers under the workload: events in order of time, one thread, the same for
// the same options. What ships runs in it: SchedulerCore decides, fed by reports at their interval that carry
// block events; PoolCore with its policy holds the blocks of each worker; BatchCore orders each engine's
// steps. Modelled are: how long a step takes (WorkerProfile), how fast bytes move (Links), and the messages
// between processes (a constant time). InvalidArgument names the option, its limit and what to do.
absl::StatusOr<SimResult> Simulate(const SimOptions& options, const Workload& workload,
                                   const WorkerProfile& profile, const SimProgress& progress = {});

}  // namespace tidepool
