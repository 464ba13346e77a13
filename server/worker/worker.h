#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/probe.h"
#include "config/config.h"

namespace tidepool {

// WorkerServer: a prefill, decode or aggregated worker: model, pool, engine, transport, and the gRPC service
// by which others reach them. Thread-safe.
//
// Uses of Config: model.*, engine.*, kv.*, transport.*, worker.*, cluster.{scheduler,token}.
class WorkerServer {
 public:
  // Loads the model (minutes for a large one, with progress on stderr) before any port opens, then listens
  // and reports to the scheduler. `metrics` is borrowed and must outlive the server.
  // Errors: those of LoadModel and Tokenizer::Load; InvalidArgument (role, limits, a pool too small for one
  // sequence); Unavailable (address taken, no transport).
  static absl::StatusOr<std::unique_ptr<WorkerServer>> Start(const Config& config, MetricRegistry& metrics);
  // Shuts down without grace where Shutdown was not called.
  ~WorkerServer();
  WorkerServer(const WorkerServer&) = delete;
  WorkerServer& operator=(const WorkerServer&) = delete;

  int port() const;          // of the cluster's gRPC
  int metrics_port() const;  // of /metrics, /livez, /readyz
  const std::string& id() const;
  // Accepted by the scheduler and not draining: what /readyz says.
  bool ready() const;
  // It was drained with the wish that its process ends (Worker.Drain), and nothing runs here any more, nor
  // does anybody have blocks to fetch that were promised.
  bool wants_to_end() const;

  // Tenants' quotas from now on. From any thread.
  void Apply(const KvConfig& kv);

  // Refuses new requests and tells the scheduler; those in flight go on. Idempotent.
  void BeginDrain();
  // BeginDrain, wait at most `grace` for the requests in flight, cancel the rest, close everything.
  // Idempotent.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  explicit WorkerServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
