#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/probe.h"
#include "config/config.h"

namespace tidepool {

// StoreServer: a node of DRAM and disk that computes nothing (`tidepool store`): a pool, its disk tier, a
// fetch node that serves both, the control API, and a follower that takes over what the workers' requests
// proved worth keeping. Blocks know nothing of models here but their layout and the model's fingerprint, both
// of which come from the cluster, or from the directory `store.model`.
class StoreServer {
 public:
  // Without store.model: waits until the scheduler knows a model (its first worker said which), for
  // cluster.start_timeout at most; /readyz says meanwhile what it waits for. With it nobody is waited for;
  // where the cluster's model turns out to be another, the scheduler refuses the store, and /readyz and the
  // log say in what they differ. Errors: those of DescribeModel and Tokenizer::Load, DeadlineExceeded,
  // InvalidArgument (configuration), ResourceExhausted (memory), Unavailable (an address cannot be bound).
  static absl::StatusOr<std::unique_ptr<StoreServer>> Start(const Config& config, MetricRegistry& metrics);
  ~StoreServer();

  int port() const;          // of its gRPC
  int metrics_port() const;  // of /metrics, /livez, /readyz
  const std::string& id() const;
  // Registered with the scheduler and not draining.
  bool ready() const;
  // Tenants' quotas from now on. From any thread.
  void Apply(const KvConfig& kv);

  // The scheduler sends nobody here any more; what is here can still be fetched.
  void BeginDrain();
  // It was drained with the wish that its process ends (Worker.Drain), and the scheduler knows.
  bool wants_to_end() const;
  // Ends what runs after `grace` at most.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  explicit StoreServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
