#include "server/gateway/gateway_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>

#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "server/gateway/auth.h"
#include "server/gateway/cluster_watch.h"
#include "server/gateway/grpc_front.h"
#include "server/gateway/http_front.h"
#include "server/gateway/probe.h"
#include "server/gateway/request_runner.h"
#include "server/http/admin_server.h"

namespace tidepool {
namespace {

// Tokenising is a few milliseconds a request: two threads keep one long prompt from holding up the others.
constexpr int kPoolThreads = 2;
constexpr char kService[] = "tidepool.v1.Inference";

HttpServer::Options HttpOptions(const GatewayConfig& config) {
  HttpServer::Options options;
  options.listen = config.http_listen;
  options.threads = 2;
  HttpLimits& limits = options.limits;
  limits.body_bytes_max = config.max_body_bytes;
  limits.header_bytes_max = config.max_header_bytes;
  limits.header_field_bytes_max = std::min<size_t>(limits.header_field_bytes_max, config.max_header_bytes);
  limits.connections_max = config.max_connections;
  limits.stream_buffer_bytes_max = config.max_stream_buffer_bytes;
  limits.header_timeout = config.header_timeout;
  limits.idle_timeout = config.idle_timeout;
  limits.slow_client_timeout = config.slow_client_timeout;
  return options;
}

}  // namespace

struct GatewayServer::Impl {
  Impl(const Config& c, MetricRegistry& registry, const Options& options, std::shared_ptr<const TextModel> t,
       Authenticator a, const GenerationDefaults& defaults)
      : config(c),
        metrics(registry),
        text(std::move(t)),
        auth(std::move(a)),
        probe(registry, config.scheduler.slo),
        pool(kPoolThreads, config.gateway.max_inflight),
        watch(channels.Get(config.cluster.scheduler), config.cluster.token, options.poll_interval),
        runner({&config, text, &auth, &watch, &channels, &probe, &pool, &Clock::Real(), defaults}),
        http_front({&config, text, &auth, &runner, &probe, &pool, options.ping_interval}),
        grpc_front({&config, &auth, &runner, &probe}),
        http(HttpOptions(config.gateway)),
        http_connections(registry.AddGauge("tidepool_gateway_http_connections", "Open HTTP connections")),
        http_protocol_errors(registry.AddCounter("tidepool_gateway_http_protocol_errors_total",
                                                 "Requests that broke HTTP or one of its limits")),
        http_refused(registry.AddCounter("tidepool_gateway_http_connections_refused_total",
                                         "Connections beyond max_connections")) {}

  absl::Status Start();
  ReadyReport Report() const;
  // After each poll: gRPC health, and what the HTTP library counted.
  void Publish();
  void PublishHealth();
  void Shutdown(absl::Duration grace);

  const Config config;
  MetricRegistry& metrics;
  ChannelCache channels;
  const std::shared_ptr<const TextModel> text;
  const Authenticator auth;
  GatewayProbe probe;
  WorkPool pool;
  ClusterWatch watch;
  RequestRunner runner;
  HttpFront http_front;
  GrpcFront grpc_front;
  HttpServer http;
  Gauge& http_connections;
  Counter& http_protocol_errors;
  Counter& http_refused;
  std::unique_ptr<grpc::Server> grpc_server;
  int grpc_port = 0;
  std::mutex shutdown_mu;
  bool shut = false;
};

absl::Status GatewayServer::Impl::Start() {
  metrics.AddGauge("tidepool_build_info", "1; what runs is in the labels", {{"version", TIDEPOOL_VERSION}})
      .Set(1);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(config.gateway.grpc_listen, grpc::InsecureServerCredentials(), &grpc_port);
  builder.SetMaxReceiveMessageSize(static_cast<int>(config.gateway.max_body_bytes));
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, static_cast<int>(config.gateway.max_header_bytes));
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, static_cast<int>(config.gateway.max_inflight));
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // A client that is silently gone is noticed, as over HTTP, within about 20 s.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  builder.RegisterService(&grpc_front);
  grpc_server = builder.BuildAndStart();
  if (grpc_server == nullptr || grpc_port == 0) {
    return absl::UnavailableError("gateway.grpc_listen: cannot listen on " + config.gateway.grpc_listen);
  }

  http_front.AddRoutes(http);
  AddAdminRoutes(http, metrics, [this] { return Report(); });
  if (auto status = http.Start(); !status.ok()) return Annotate(status, "gateway.http_listen");
  watch.Start([this] { Publish(); });
  spdlog::info("gateway listens: http port {}, grpc port {}", http.port(), grpc_port);
  return absl::OkStatus();
}

ReadyReport GatewayServer::Impl::Report() const {
  ReadyReport report = watch.Report();
  report.checks.emplace_back("draining", runner.draining() ? "the gateway is shutting down" : "");
  return report;
}

void GatewayServer::Impl::Publish() {
  PublishHealth();
  const HttpServer::Stats stats = http.stats();
  http_connections.Set(static_cast<double>(stats.connections));
  http_protocol_errors.Add(stats.protocol_errors - http_protocol_errors.value());
  http_refused.Add(stats.connections_refused - http_refused.value());
}

void GatewayServer::Impl::PublishHealth() {
  auto* health = grpc_server->GetHealthCheckService();
  if (health == nullptr) return;
  const bool serving = Report().ready();
  health->SetServingStatus("", serving);
  health->SetServingStatus(kService, serving);
}

void GatewayServer::Impl::Shutdown(absl::Duration grace) {
  std::lock_guard lock(shutdown_mu);
  if (shut) return;
  shut = true;
  const absl::Time deadline = absl::Now() + grace;
  runner.BeginDrain();
  watch.Stop();
  if (grpc_server != nullptr) PublishHealth();
  // Cancels at the end of the grace, so that each request still gets its own last words.
  runner.Shutdown(grace);
  http.Shutdown(std::max(absl::Milliseconds(200), deadline - absl::Now()));
  if (grpc_server != nullptr) {
    grpc_server->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
    grpc_server->Wait();
  }
  http_front.Stop();
  pool.Stop();
  // What came in between the first wait and the closing of the listeners.
  runner.Shutdown(absl::ZeroDuration());
}

GatewayServer::GatewayServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

GatewayServer::~GatewayServer() { Shutdown(absl::ZeroDuration()); }

absl::StatusOr<std::unique_ptr<GatewayServer>> GatewayServer::Start(const Config& config,
                                                                    MetricRegistry& metrics,
                                                                    const Options& options) {
  TP_ASSIGN_OR_RETURN(auto text, TextModel::Load(config.model));
  TP_ASSIGN_OR_RETURN(auto auth, Authenticator::Create(config.gateway));
  TP_ASSIGN_OR_RETURN(const GenerationDefaults defaults, LoadGenerationDefaults(config.model));
  auto impl = std::make_unique<Impl>(config, metrics, options, std::move(text), std::move(auth), defaults);
  const absl::Status status = impl->Start();
  std::unique_ptr<GatewayServer> server(new GatewayServer(std::move(impl)));
  if (!status.ok()) return status;
  return server;
}

int GatewayServer::http_port() const { return impl_->http.port(); }
int GatewayServer::grpc_port() const { return impl_->grpc_port; }
bool GatewayServer::ready() const { return impl_->Report().ready(); }

void GatewayServer::BeginDrain() { impl_->runner.BeginDrain(); }

void GatewayServer::Shutdown(absl::Duration grace) { impl_->Shutdown(grace); }

}  // namespace tidepool
