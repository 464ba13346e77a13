#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/probe.h"
#include "config/config.h"

namespace tidepool {

// GatewayServer: the front door (Driver). Owns the HTTP and gRPC listeners, the tokeniser, the connection to
// the scheduler and every request in flight. Thread-safe.
//
// Uses of Config: model.{path,tokenizer,name,max_model_len}, gateway.*, cluster.{scheduler,token},
// scheduler.slo (for tidepool_slo_requests_total).
class GatewayServer {
 public:
  struct Options {
    // Between `: ping` comments of a stream that has nothing to say; below the 15 s and more after which
    // proxies drop a silent connection.
    absl::Duration ping_interval = absl::Seconds(10);
    // Between two looks at Scheduler.Cluster.
    absl::Duration poll_interval = absl::Milliseconds(500);
  };

  // Loads the tokeniser and listens at once; /readyz stays 503 until the scheduler knows a model and workers
  // that can serve it, and is 503 again when they have been away for longer than gateway.placement_wait
  // bridges. `metrics` is borrowed and must outlive the server. Errors: InvalidArgument, NotFound (tokeniser,
  // chat template, addresses), Unavailable (address in use).
  static absl::StatusOr<std::unique_ptr<GatewayServer>> Start(const Config& config, MetricRegistry& metrics,
                                                              const Options& options);
  static absl::StatusOr<std::unique_ptr<GatewayServer>> Start(const Config& config, MetricRegistry& metrics) {
    return Start(config, metrics, Options{});
  }
  // Shuts down without grace where Shutdown was not called.
  ~GatewayServer();
  GatewayServer(const GatewayServer&) = delete;
  GatewayServer& operator=(const GatewayServer&) = delete;

  int http_port() const;
  int grpc_port() const;
  // Of gateway.metrics_listen; 0 where that is empty.
  int metrics_port() const;
  // What /readyz says.
  bool ready() const;

  // Reads again what may change while the gateway runs: gateway.api_keys_file, the TLS files; opens the
  // access log's file anew. All or nothing: on an error (InvalidArgument, NotFound) what holds stays. Done by
  // itself when one of the files changes. From any thread.
  absl::Status Reload();
  // From now on: gateway.tenant_limits, max_queued_requests and max_queued_tokens, scheduler.slo. What is
  // admitted stays so. All or nothing: an error (the keys' file cannot be read) changes nothing. Everything
  // else in the configuration needs a restart. From any thread.
  absl::Status Apply(const Config& config);

  // Not ready any more; new requests get 503 (gRPC: UNAVAILABLE), those in flight go on. Idempotent.
  void BeginDrain();
  // BeginDrain, wait at most `grace` for requests in flight, cancel the rest, close everything. Idempotent.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  explicit GatewayServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
