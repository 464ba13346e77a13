#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/trace.h"

// What every gRPC call between Tidepool's own processes has in common.
namespace tidepool {

// Metadata that carries the shared secret of the cluster's processes.
inline constexpr char kClusterTokenHeader[] = "x-tidepool-cluster-token";

// What processes of one cluster have to agree on beside the model: raised where an older version would
// misread a message of server/ or transport/. Compared when a worker registers.
inline constexpr uint32_t kClusterProtocol = 1;

// ChannelCache: one channel an address, connected lazily and kept. Thread-safe.
class ChannelCache {
 public:
  std::shared_ptr<grpc::Channel> Get(const std::string& host_port);

 private:
  std::mutex mu_;
  std::map<std::string, std::shared_ptr<grpc::Channel>> channels_;
};

void AddClusterToken(grpc::ClientContext& context, std::string_view token);
// Unauthenticated unless the caller sent `token` (compared in constant time). An empty token admits
// everyone: the configuration allows that on loopback only.
absl::Status CheckClusterToken(const grpc::ServerContextBase& context, std::string_view token);

// The call is part of `trace`, under a parent id of its own; nothing where there is no trace.
void AddTrace(grpc::ClientContext& context, const TraceContext& trace);
// What the caller sent; no trace where that is malformed.
TraceContext TraceOf(const grpc::ServerContextBase& context);

// Sets the call's deadline `timeout` from now.
void SetTimeout(grpc::ClientContext& context, absl::Duration timeout);
// What the caller still waits for; InfiniteDuration where it set no deadline.
absl::Duration TimeLeft(const grpc::ServerContextBase& context);

// The two code sets are the same by number.
absl::Status FromGrpc(const grpc::Status& status);
grpc::Status ToGrpc(const absl::Status& status);

struct RpcServer {
  std::unique_ptr<grpc::Server> server;
  int port = 0;
};

// Starts a plaintext server of these services on host:port (port 0: any free one). Unavailable: the address
// cannot be bound. The services are borrowed until the server is shut down.
absl::StatusOr<RpcServer> StartRpcServer(const std::string& listen, grpc::Service* service);
absl::StatusOr<RpcServer> StartRpcServer(const std::string& listen,
                                         std::initializer_list<grpc::Service*> services);

}  // namespace tidepool
