#include "server/gateway/gateway_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/status.h"
#include "config/address.h"
#include "server/cluster/cluster_member.h"
#include "server/gateway/access_log.h"
#include "server/gateway/auth.h"
#include "server/gateway/batches_front.h"
#include "server/gateway/batches_service.h"
#include "server/gateway/batches_transport.h"
#include "server/gateway/cluster_watch.h"
#include "server/gateway/file_watch.h"
#include "server/gateway/files_front.h"
#include "server/gateway/grpc_front.h"
#include "server/gateway/http_front.h"
#include "server/gateway/probe.h"
#include "server/gateway/request_runner.h"
#include "server/gateway/structured_output.h"
#include "server/gateway/tenant_limits.h"
#include "server/http/admin_server.h"
#include "server/http/exchange.h"
#include "server/http/http_errors.h"
#include "server/http/origin_policy.h"

namespace tidepool {
namespace {

// Tokenising is a few milliseconds a request: two threads keep one long prompt from holding up the others.
constexpr int kPoolThreads = 2;
constexpr char kService[] = "tidepool.v1.Inference";
constexpr int kCertificatePollSeconds = 5;
// Between attempts to read again what could not be read, in looks at the cluster.
constexpr int kReloadRetryPolls = 10;
// For what was said at the end of a shutdown to be sent.
constexpr absl::Duration kLastWords = absl::Seconds(2);
// What gRPC may hold of messages on their way in: those of clients that are not known yet too.
constexpr size_t kGrpcMemoryMin = 512u << 20;
constexpr size_t kGrpcMessagesMin = 16;

bool OnLoopback(const std::string& listen) {
  const auto address = ParseHostPort(listen);
  return address.ok() && address->IsLoopback();
}

OriginPolicy::Options OriginOptions(const GatewayConfig& config) {
  OriginPolicy::Options options;
  options.loopback = OnLoopback(config.http_listen);
  options.tls = config.tls.enabled();
  options.allowed_hosts = config.allowed_hosts;
  options.allowed_origins = config.cors.allowed_origins;
  return options;
}

// gRPC looks at the files by itself.
std::shared_ptr<grpc::ServerCredentials> GrpcCredentials(const TlsConfig& tls) {
  if (!tls.enabled()) return grpc::InsecureServerCredentials();
  namespace experimental = grpc::experimental;
  experimental::TlsServerCredentialsOptions options(
      tls.client_ca.empty() ? std::make_shared<experimental::FileWatcherCertificateProvider>(
                                  tls.key, tls.cert, kCertificatePollSeconds)
                            : std::make_shared<experimental::FileWatcherCertificateProvider>(
                                  tls.key, tls.cert, tls.client_ca, kCertificatePollSeconds));
  options.watch_identity_key_cert_pairs();
  if (!tls.client_ca.empty()) {
    options.watch_root_certs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return experimental::TlsServerCredentials(options);
}

// Probes and scrapers ask every few seconds.
bool Quiet(std::string_view path) {
  return path == "/livez" || path == "/readyz" || path == "/health" || path == "/ping" || path == "/metrics";
}

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
  limits.body_timeout = config.body_timeout;
  limits.idle_timeout = config.idle_timeout;
  limits.slow_client_timeout = config.slow_client_timeout;
  options.tls = {config.tls.cert, config.tls.key, config.tls.client_ca};
  return options;
}

}  // namespace

struct GatewayServer::Impl {
  Impl(const Config& c, MetricRegistry& registry, const Options& options, std::shared_ptr<ClusterMember> m,
       std::shared_ptr<const TextModel> t, const TenantTable& tenants, std::unique_ptr<AccessLog> log,
       const GenerationDefaults& defaults)
      : config(c),
        metrics(registry),
        member(std::move(m)),
        scheduler(MakeLocator(config.cluster, member)),
        text(std::move(t)),
        auth(tenants, config.gateway.server_key),
        limits(config.gateway, tenants, Clock::Real(), registry),
        access_log(std::move(log)),
        origins(OriginOptions(config.gateway)),
        poll_interval(options.poll_interval),
        has_keys(!tenants.keys.empty()),
        live(config.gateway),
        files({config.gateway.api_keys_file, config.gateway.tls.cert, config.gateway.tls.key,
               config.gateway.tls.client_ca}),
        probe(registry, config.scheduler.slo),
        pool(kPoolThreads, config.gateway.max_inflight),
        grammars(text->format(), config.gateway.grammar_cache_bytes, probe),
        watch(channels, *scheduler, config.cluster.token, options.poll_interval,
              // With one scheduler alone nobody takes over, and requests are refused at once.
              config.cluster.etcd.empty() ? absl::ZeroDuration() : config.gateway.placement_wait),
        runner({&config, text, &auth, &watch, scheduler.get(), &channels, &probe, &pool, &Clock::Real(),
                defaults, &limits, &grammars}),
        http_front({&config, text, &auth, &runner, &probe, &pool, &limits, options.ping_interval}),
        batches(BatchDependencies(registry)),
        files_front(&http_front, &batches, config.gateway),
        batches_front(&http_front, &batches),
        grpc_front({&config, text, &auth, &runner, &probe, &pool, &limits, access_log.get()}),
        http(WithHooks(HttpOptions(config.gateway))),
        http_connections(registry.AddGauge("tidepool_gateway_http_connections", "Open HTTP connections")),
        http_protocol_errors(registry.AddCounter("tidepool_gateway_http_protocol_errors_total",
                                                 "Requests that broke HTTP or one of its limits")),
        http_refused(registry.AddCounter("tidepool_gateway_http_connections_refused_total",
                                         "Connections beyond max_connections")),
        http_tls_failures(registry.AddCounter("tidepool_gateway_tls_failures_total",
                                              "TLS handshakes over HTTP's port that failed")),
        http_strangers(registry.AddCounter("tidepool_gateway_http_origin_refused_total",
                                           "Requests refused for their Host or Origin")),
        reloads_good(registry.AddCounter(kReloads, kReloadsHelp, {{"result", "success"}})),
        reloads_bad(registry.AddCounter(kReloads, kReloadsHelp, {{"result", "failure"}})),
        reload_time(registry.AddGauge("tidepool_config_last_reload_success_timestamp_seconds",
                                      "When the configuration that holds was read")) {
    batches.Replace(tenants);
    reload_time.Set(absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()));
  }

  static constexpr char kReloads[] = "tidepool_config_reloads_total";
  static constexpr char kReloadsHelp[] = "Attempts to read keys, limits and certificates again";

  BatchesService::Dependencies BatchDependencies(MetricRegistry& registry);
  HttpServer::Options WithHooks(HttpServer::Options options);
  std::optional<HttpReply> OnRequest(HttpRequest& request);
  void OnRefusal(int status, std::string_view code, const std::string& peer);
  absl::Status Reload();
  absl::Status ReloadOrKeep();
  absl::Status Apply(const Config& now);

  absl::Status Start();
  ReadyReport Report() const;
  // After each poll: gRPC health, and what the HTTP library counted.
  void Publish();
  void PublishHealth();
  void Shutdown(absl::Duration grace);
  // Known in etcd, where there is one.
  void Join();

  const Config config;
  MetricRegistry& metrics;
  const std::shared_ptr<ClusterMember> member;  // null: no etcd
  const std::shared_ptr<SchedulerLocator> scheduler;
  ChannelCache channels;
  const std::shared_ptr<const TextModel> text;
  Authenticator auth;
  TenantLimits limits;
  const std::unique_ptr<AccessLog> access_log;
  const OriginPolicy origins;
  const absl::Duration poll_interval;
  const bool has_keys;                               // which no reload changes
  GatewayConfig live;                                // as it holds now; guarded by reload_mu
  FileWatch files;                                   // the watch's thread
  absl::Time retry_reload = absl::InfiniteFuture();  // the watch's thread
  GatewayProbe probe;
  WorkPool pool;
  GrammarCompiler grammars;
  ClusterWatch watch;
  RequestRunner runner;
  HttpFront http_front;
  BatchesService batches;
  FilesFront files_front;
  BatchesFront batches_front;
  GrpcFront grpc_front;
  HttpServer http;
  std::unique_ptr<HttpServer> admin;  // null: no gateway.metrics_listen
  Gauge& http_connections;
  Counter& http_protocol_errors;
  Counter& http_refused;
  Counter& http_tls_failures;
  Counter& http_strangers;
  Counter& reloads_good;
  Counter& reloads_bad;
  Gauge& reload_time;
  std::mutex reload_mu;
  std::unique_ptr<grpc::Server> grpc_server;
  int grpc_port = 0;
  std::mutex shutdown_mu;
  bool shut = false;
};

HttpServer::Options GatewayServer::Impl::WithHooks(HttpServer::Options options) {
  options.filter = [this](HttpRequest& request) { return OnRequest(request); };
  // Strangers' bodies are not read: the filter, or the route, says why.
  options.body_wanted = [this](const HttpRequest& head) {
    return !origins.Filter(head) && http_front.TenantOf(head).ok();
  };
  options.on_refusal = [this](int status, std::string_view code, const std::string& peer) {
    OnRefusal(status, code, peer);
  };
  return options;
}

std::optional<HttpReply> GatewayServer::Impl::OnRequest(HttpRequest& request) {
  AccessRecord::Options options;
  options.log = Quiet(request.path) ? nullptr : access_log.get();
  options.protocol = "http";
  options.peer = request.peer;
  options.method = request.method;
  options.path = request.path;
  options.traceparent = std::string(request.Header(kTraceparentHeader));
  options.bytes_in = request.body.size();
  options.add_headers = [this, origin = std::string(request.Header("origin"))](HttpHeaders& headers) {
    origins.AddCorsHeaders(origin, headers);
  };
  options.add_tenant_headers = [this](const std::string& tenant, HttpHeaders& headers) {
    for (auto& header : limits.RateHeaders(tenant)) headers.push_back(std::move(header));
  };
  request.observer = std::make_shared<AccessRecord>(std::move(options));
  auto reply = origins.Filter(request);
  if (reply && reply->status == 403) http_strangers.Add();
  return reply;
}

void GatewayServer::Impl::OnRefusal(int status, std::string_view code, const std::string& peer) {
  AccessRecord::Options options;
  options.log = access_log.get();
  options.protocol = "http";
  options.peer = peer;
  AccessRecord(std::move(options)).SetStatus(status, code);
}

absl::Status GatewayServer::Impl::Reload() {
  std::lock_guard lock(reload_mu);
  const absl::Status status = ReloadOrKeep();
  (status.ok() ? reloads_good : reloads_bad).Add();
  if (status.ok()) {
    reload_time.Set(absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()));
    spdlog::info("read keys, limits and certificates again");
  } else {
    spdlog::error("keys, limits and certificates stay as they were: {}", std::string(status.message()));
  }
  return status;
}

// What can fail comes before what takes effect.
absl::Status GatewayServer::Impl::ReloadOrKeep() {
  TP_ASSIGN_OR_RETURN(const TenantTable tenants, LoadTenants(live));
  TP_RETURN_IF_ERROR(access_log->Reopen());
  TP_RETURN_IF_ERROR(Annotate(http.ReloadTls(), "gateway.tls"));
  auth.Replace(tenants);
  limits.Replace(tenants);
  batches.Replace(tenants);
  return absl::OkStatus();
}

absl::Status GatewayServer::Impl::Apply(const Config& now) {
  std::lock_guard lock(reload_mu);
  GatewayConfig next = live;
  next.tenant_limits = now.gateway.tenant_limits;
  next.max_queued_requests = now.gateway.max_queued_requests;
  next.max_queued_tokens = now.gateway.max_queued_tokens;
  TP_ASSIGN_OR_RETURN(const TenantTable tenants, LoadTenants(next));
  live = std::move(next);
  limits.SetBounds(live);
  limits.Replace(tenants);
  auth.Replace(tenants);
  batches.Replace(tenants);
  probe.SetSlo(now.scheduler.slo);
  return absl::OkStatus();
}

BatchesService::Dependencies GatewayServer::Impl::BatchDependencies(MetricRegistry& registry) {
  BatchesService::Dependencies deps;
  deps.config = &config.gateway;
  deps.metrics = &registry;
  deps.transport = [this](const std::string& tenant) {
    return std::make_unique<FrontTransport>(&http_front, tenant);
  };
  deps.load = [this] {
    const RequestRunner::OnlineTraffic traffic = runner.Online();
    return OnlineLoad{traffic.inflight, traffic.waiting, traffic.oldest_wait, traffic.slo_short};
  };
  return deps;
}

absl::Status GatewayServer::Impl::Start() {
  for (const std::string& listen : {config.gateway.http_listen, config.gateway.grpc_listen}) {
    if (!OnLoopback(listen) && !config.gateway.tls.enabled()) {
      spdlog::warn("{} can be reached from outside without TLS: prompts and API keys travel in the clear",
                   listen);
    }
  }
  if (config.gateway.allow_unauthenticated && !OnLoopback(config.gateway.http_listen)) {
    spdlog::warn("gateway.allow_unauthenticated: anybody who can reach {} can use this model",
                 config.gateway.http_listen);
  }
  metrics.AddGauge("tidepool_build_info", "1; what runs is in the labels", {{"version", TIDEPOOL_VERSION}})
      .Set(1);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(config.gateway.grpc_listen, GrpcCredentials(config.gateway.tls), &grpc_port);
  builder.SetMaxReceiveMessageSize(static_cast<int>(config.gateway.max_body_bytes));
  builder.SetResourceQuota(grpc::ResourceQuota("gateway").Resize(
      std::max<size_t>(kGrpcMemoryMin, kGrpcMessagesMin * config.gateway.max_body_bytes)));
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
  files_front.AddRoutes(http);
  batches_front.AddRoutes(http);
  if (!config.gateway.metrics_listen.empty()) {
    auto started = StartAdminServer(config.gateway.metrics_listen, metrics, [this] { return Report(); });
    if (!started.ok()) return Annotate(started.status(), "gateway.metrics_listen");
    admin = *std::move(started);
  }
  if (admin == nullptr && !has_keys) {
    AddAdminRoutes(http, metrics, [this] { return Report(); });
  } else {
    AddHealthRoutes(http, [this] { return Report(); });
    http.Handle("GET", "/metrics", [](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
      const HttpErrorKind& kind = http_errors::kMetricsElsewhere;
      writer->Send(kind.status, {{"Content-Type", "application/json"}},
                   HttpErrorBody(kind,
                                 "metrics tell of all tenants and are not served here; set "
                                 "gateway.metrics_listen and ask there"));
    });
  }
  if (auto status = http.Start(); !status.ok()) return Annotate(status, "gateway.http_listen");
  watch.Start([this] { Publish(); });
  batches.Start();
  spdlog::info("gateway listens: http port {}, grpc port {}", http.port(), grpc_port);
  return absl::OkStatus();
}

ReadyReport GatewayServer::Impl::Report() const {
  ReadyReport report = watch.Report();
  report.checks.emplace_back("draining", runner.draining() ? "the gateway is shutting down" : "");
  return report;
}

void GatewayServer::Impl::Publish() {
  // Reload logs and counts. A file that is being replaced may be half there: what failed is tried again.
  if (files.Changed() || absl::Now() >= retry_reload) {
    retry_reload = Reload().ok() ? absl::InfiniteFuture() : absl::Now() + kReloadRetryPolls * poll_interval;
  }
  PublishHealth();
  const HttpServer::Stats stats = http.stats();
  http_connections.Set(static_cast<double>(stats.connections));
  http_protocol_errors.Add(stats.protocol_errors - http_protocol_errors.value());
  http_refused.Add(stats.connections_refused - http_refused.value());
  http_tls_failures.Add(stats.tls_failures - http_tls_failures.value());
}

void GatewayServer::Impl::Join() {
  if (!member) return;
  char host[256] = {};
  if (gethostname(host, sizeof host - 1) != 0) *host = '\0';
  const std::string& listen = config.gateway.http_listen;
  v1::Member self;
  self.set_address(absl::StrCat(listen.substr(0, listen.rfind(':')), ":", http.port()));
  self.set_id(absl::StrCat("gateway-", host, "-", getpid()));
  self.set_role("gateway");
  self.set_version(TIDEPOOL_VERSION);
  self.set_pid(static_cast<uint32_t>(getpid()));
  self.set_host(host);
  member->Join(self);
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
  if (member) member->Leave();
  runner.BeginDrain();
  watch.Stop();
  if (grpc_server != nullptr) PublishHealth();
  // Their lines run again after the restart: nobody waits for them.
  batches.Stop();
  // Cancels at the end of the grace, so that each request still gets its own last words.
  runner.Shutdown(grace);
  // Last words reach whoever reads them, on a busy machine, too.
  http.Shutdown(std::max(kLastWords, deadline - absl::Now()));
  if (admin != nullptr) admin->Shutdown(absl::Milliseconds(200));
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
  TP_ASSIGN_OR_RETURN(const TenantTable tenants, LoadTenants(config.gateway));
  TP_ASSIGN_OR_RETURN(auto log, AccessLog::Open(config.gateway.access_log));
  TP_ASSIGN_OR_RETURN(const GenerationDefaults defaults, LoadGenerationDefaults(config.model));
  ClusterMember::Options membership;
  membership.config = config.cluster;
  membership.boot_id = RandomHexId();
  membership.metrics = &metrics;
  TP_ASSIGN_OR_RETURN(auto member, ClusterMember::StartIfConfigured(std::move(membership)));
  auto impl = std::make_unique<Impl>(config, metrics, options, std::move(member), std::move(text), tenants,
                                     std::move(log), defaults);
  const absl::Status status = impl->Start();
  if (status.ok()) impl->Join();
  std::unique_ptr<GatewayServer> server(new GatewayServer(std::move(impl)));
  if (!status.ok()) return status;
  return server;
}

int GatewayServer::http_port() const { return impl_->http.port(); }
int GatewayServer::grpc_port() const { return impl_->grpc_port; }
int GatewayServer::metrics_port() const { return impl_->admin == nullptr ? 0 : impl_->admin->port(); }
bool GatewayServer::ready() const { return impl_->Report().ready(); }

absl::Status GatewayServer::Reload() { return impl_->Reload(); }
absl::Status GatewayServer::Apply(const Config& config) { return impl_->Apply(config); }

void GatewayServer::BeginDrain() { impl_->runner.BeginDrain(); }

void GatewayServer::Shutdown(absl::Duration grace) { impl_->Shutdown(grace); }

}  // namespace tidepool
