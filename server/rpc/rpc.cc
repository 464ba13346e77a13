#include "server/rpc/rpc.h"

#include <chrono>

#include "base/digest.h"
#include "base/status.h"

namespace tidepool {
namespace {

// Prompts of a million tokens (5 bytes each as varints) and snapshots of 10^5 block keys fit.
constexpr int kMaxMessageBytes = 16 << 20;
// A dead peer on an idle connection is noticed within 10 + 5 s, without depending on TCP's own minutes.
constexpr int kKeepaliveTimeMs = 10'000;
constexpr int kKeepaliveTimeoutMs = 5'000;
// A restarted worker is reached again within this time instead of gRPC's default two minutes.
constexpr int kMaxReconnectBackoffMs = 500;

}  // namespace

std::shared_ptr<grpc::Channel> ChannelCache::Get(const std::string& host_port) {
  std::lock_guard lock(mu_);
  auto& channel = channels_[host_port];
  if (!channel) {
    grpc::ChannelArguments args;
    args.SetMaxReceiveMessageSize(kMaxMessageBytes);
    args.SetMaxSendMessageSize(kMaxMessageBytes);
    args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
    args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
    args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
    args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 50);
    args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kMaxReconnectBackoffMs);
    // The cluster's addresses are never reached through a proxy named by the environment.
    args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    channel = grpc::CreateCustomChannel(host_port, grpc::InsecureChannelCredentials(), args);
  }
  return channel;
}

void AddClusterToken(grpc::ClientContext& context, std::string_view token) {
  if (!token.empty()) context.AddMetadata(kClusterTokenHeader, std::string(token));
}

absl::Status CheckClusterToken(const grpc::ServerContextBase& context, std::string_view token) {
  if (token.empty()) return absl::OkStatus();
  const auto& metadata = context.client_metadata();
  const auto it = metadata.find(kClusterTokenHeader);
  if (it == metadata.end() || !SecretEquals(std::string_view(it->second.data(), it->second.size()), token)) {
    return absl::UnauthenticatedError(
        "cluster token is missing or wrong; give every process the same cluster.token "
        "(TIDEPOOL_CLUSTER_TOKEN)");
  }
  return absl::OkStatus();
}

void AddTrace(grpc::ClientContext& context, const TraceContext& trace) {
  if (trace.valid()) context.AddMetadata(kTraceparentHeader, FormatTraceparent(ChildOf(trace)));
}

TraceContext TraceOf(const grpc::ServerContextBase& context) {
  const auto& metadata = context.client_metadata();
  const auto it = metadata.find(kTraceparentHeader);
  // Two of them are none (W3C).
  if (it == metadata.end() || metadata.count(kTraceparentHeader) > 1) return {};
  return ParseTraceparent({it->second.data(), it->second.size()}).value_or(TraceContext{});
}

void SetTimeout(grpc::ClientContext& context, absl::Duration timeout) {
  context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(timeout));
}

absl::Duration TimeLeft(const grpc::ServerContextBase& context) {
  if (context.deadline() == std::chrono::system_clock::time_point::max()) return absl::InfiniteDuration();
  return absl::FromChrono(context.deadline() - std::chrono::system_clock::now());
}

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

absl::StatusOr<RpcServer> StartRpcServer(const std::string& listen, grpc::Service* service) {
  return StartRpcServer(listen, {service});
}

absl::StatusOr<RpcServer> StartRpcServer(const std::string& listen,
                                         std::initializer_list<grpc::Service*> services) {
  RpcServer out;
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  // Our own clients ping every kKeepaliveTimeMs: that is no abuse.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kKeepaliveTimeMs / 2);
  // Two processes on one port would each get half of the calls: refuse to share it.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddListeningPort(listen, grpc::InsecureServerCredentials(), &out.port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  out.server = builder.BuildAndStart();
  if (!out.server || out.port == 0) {
    return absl::UnavailableError("cannot listen on " + listen +
                                  "; is the port taken, or the host not of this machine?");
  }
  return out;
}

}  // namespace tidepool
