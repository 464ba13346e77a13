#include "server/worker/worker.h"

#include <unistd.h>

#include <algorithm>
#include <thread>

#include "base/digest.h"
#include "base/log.h"
#include "base/status.h"
#include "server/http/admin_server.h"
#include "server/model/text/tokenizer.h"
#include "server/worker/load_progress.h"
#include "server/worker/worker_context.h"
#include "server/worker/worker_service.h"
#include "transport/ucx_transport.h"

namespace tidepool {
namespace {

absl::StatusOr<v1::Role> ParseRole(const std::string& role) {
  if (role == "prefill") return v1::ROLE_PREFILL;
  if (role == "decode") return v1::ROLE_DECODE;
  if (role == "both") return v1::ROLE_BOTH;
  return absl::InvalidArgumentError("worker.role is '" + role + "'; it may be prefill, decode or both");
}

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "localhost";
}

// The tokenizer's digest is part of the fingerprint: equal weights under another tokenizer are another model.
absl::StatusOr<std::shared_ptr<const Model>> Load(const ModelConfig& config, const Tokenizer& tokenizer) {
  LoadProgressPrinter printer;
  return LoadModel(config, tokenizer.Digest(),
                   [&](uint64_t done, uint64_t total) { printer.Update(done, total); });
}

uint32_t Threads(uint32_t configured) {
  return configured > 0 ? configured : std::max(1u, std::thread::hardware_concurrency());
}

v1::ModelIdentity IdentityOf(const Model& model, const BlockLayout& layout) {
  v1::ModelIdentity out;
  out.set_name(model.name);
  out.set_fingerprint(model.fingerprint);
  out.set_layers(layout.layers);
  out.set_kv_heads(layout.kv_heads);
  out.set_head_dim(layout.head_dim);
  out.set_block_tokens(layout.block_tokens);
  out.set_kv_dtype(static_cast<uint32_t>(layout.dtype));
  out.set_max_model_len(model.max_model_len);
  out.set_vocab_size(model.spec.vocab);
  out.set_hidden_size(model.spec.hidden);
  return out;
}

}  // namespace

// Members are destroyed in reverse order: servers first, then what they call.
struct WorkerServer::Impl {
  Impl(const Config& config, MetricRegistry& metrics) : metrics(metrics), probe(metrics) {
    context.config = config;
  }

  MetricRegistry& metrics;
  WorkerProbe probe;
  WorkerContext context;
  ChannelCache channels;
  std::unique_ptr<ConstraintFactory> constraints;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<FetchNode> fetch;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<SlotQueue> slots;
  std::unique_ptr<Reporter> reporter;
  std::unique_ptr<WorkerService> service;
  RpcServer rpc;
  std::unique_ptr<HttpServer> admin;
  bool shut_down = false;

  absl::Status Start();
  absl::Status StartPool();
  absl::Status StartEngineAndFetch();
  void MakeReporter(v1::Role role);
  void FillReport(v1::WorkerReport& report);
};

absl::Status WorkerServer::Impl::StartPool() {
  const KvConfig& kv = context.config.kv;
  context.layout = context.model->Layout(kv.block_tokens);
  const uint64_t slots_wanted = kv.host_bytes / context.layout.block_bytes();
  const uint64_t one_sequence = (context.model->max_model_len + kv.block_tokens - 1) / kv.block_tokens;
  if (slots_wanted < one_sequence) {
    return absl::InvalidArgumentError(
        "kv.host_bytes holds " + std::to_string(slots_wanted) + " blocks of " +
        std::to_string(context.layout.block_bytes()) + " bytes, fewer than the " +
        std::to_string(one_sequence) +
        " of one sequence of model.max_model_len tokens; raise kv.host_bytes or lower model.max_model_len");
  }
  BlockPool::Options options;
  options.layout = context.layout;
  options.slots = static_cast<uint32_t>(std::min<uint64_t>(slots_wanted, UINT32_MAX));
  options.metrics = &metrics;
  TP_ASSIGN_OR_RETURN(pool, BlockPool::Create(options));
  context.pool = pool.get();
  return absl::OkStatus();
}

absl::Status WorkerServer::Impl::StartEngineAndFetch() {
  const Config& config = context.config;
  UcxOptions ucx;
  ucx.net_devices = config.transport.net_devices;
  ucx.tls = config.transport.tls;
  TP_ASSIGN_OR_RETURN(auto transport, CreateUcxTransport(ucx));
  FetchNode::Options fetch_options;
  fetch_options.worker_id = context.self.worker_id();
  fetch_options.boot_id = context.self.boot_id();
  fetch_options.fingerprint = context.model->fingerprint;
  fetch_options.pool = pool.get();
  fetch_options.transport = std::move(transport);
  fetch_options.metrics = &metrics;
  fetch_options.offer_lease = config.kv.offer_lease;
  TP_ASSIGN_OR_RETURN(fetch, FetchNode::Start(std::move(fetch_options)));
  context.fetch = fetch.get();
  context.self.set_transport(fetch->address());

  EngineConfig engine_config = config.engine;
  engine_config.threads = Threads(config.engine.threads);
  Engine::Options engine_options;
  engine_options.config = engine_config;
  engine_options.runner =
      std::make_unique<CpuModelRunner>(context.model, engine_config, config.kv.block_tokens);
  engine_options.pool = pool.get();
  engine_options.role = config.worker.role;
  engine_options.metrics = &metrics;
  TP_ASSIGN_OR_RETURN(engine, Engine::Start(std::move(engine_options)));
  context.engine = engine.get();
  slots = std::make_unique<SlotQueue>(config.engine.max_waiting, metrics);
  context.slots = slots.get();
  return absl::OkStatus();
}

void WorkerServer::Impl::FillReport(v1::WorkerReport& report) {
  const EngineStats stats = engine->stats();
  report.set_running(stats.running);
  report.set_waiting(stats.waiting + static_cast<uint32_t>(slots->waiting()));
  report.set_queued_prefill_tokens(stats.queued_prefill_tokens);
  report.set_running_context_tokens(stats.running_context_tokens);
  const BlockPool::Stats slots_now = pool->stats();
  report.set_slots_total(slots_now.slots);
  report.set_slots_free(slots_now.free + slots_now.evictable);
  const EngineObservations seen = engine->DrainObservations();
  for (const PrefillObservation& p : seen.prefills) {
    auto* sample = report.add_prefills();
    sample->set_new_tokens(p.new_tokens);
    sample->set_cached_tokens(p.cached_tokens);
    sample->set_seconds(p.seconds);
  }
  for (const DecodeObservation& d : seen.decodes) {
    auto* sample = report.add_decodes();
    sample->set_batch(d.batch);
    sample->set_context_tokens(d.context_tokens);
    sample->set_seconds(d.seconds);
  }
  for (v1::FetchSample& sample : context.TakeFetchSamples()) report.add_fetches()->Swap(&sample);
}

void WorkerServer::Impl::MakeReporter(v1::Role role) {
  Reporter::Options options;
  options.scheduler = context.config.cluster.scheduler;
  options.cluster_token = context.config.cluster.token;
  options.interval = context.config.worker.report_interval;
  options.base.set_role(role);
  *options.base.mutable_model() = IdentityOf(*context.model, context.layout);
  options.pool = pool.get();
  options.fill = [this](v1::WorkerReport& report) { FillReport(report); };
  reporter = std::make_unique<Reporter>(std::move(options), channels, metrics);
  context.reporter = reporter.get();
}

absl::Status WorkerServer::Impl::Start() {
  Config& config = context.config;
  TP_ASSIGN_OR_RETURN(const v1::Role role, ParseRole(config.worker.role));
  {
    TP_ASSIGN_OR_RETURN(
        const auto tokenizer,
        Tokenizer::Load(config.model.tokenizer.empty() ? config.model.path : config.model.tokenizer));
    TP_ASSIGN_OR_RETURN(context.model, Load(config.model, *tokenizer));
    constraints = std::make_unique<ConstraintFactory>(*tokenizer, context.model->spec.vocab, metrics);
    context.constraints = constraints.get();
  }
  context.channels = &channels;
  context.probe = &probe;
  const std::string host = HostName();
  if (config.worker.id.empty())
    config.worker.id = config.worker.role + "-" + host + "-" + std::to_string(getpid());
  context.self.set_worker_id(config.worker.id);
  context.self.set_boot_id(RandomHexId());
  context.self.set_pid(static_cast<uint32_t>(getpid()));
  context.self.set_host(host);
  TP_RETURN_IF_ERROR(StartPool());
  TP_RETURN_IF_ERROR(StartEngineAndFetch());

  MakeReporter(role);
  v1::DescribeReply description;
  description.set_role(role);
  description.set_version(TIDEPOOL_VERSION);
  *description.mutable_model() = IdentityOf(*context.model, context.layout);
  service = std::make_unique<WorkerService>(context, std::move(description));
  TP_ASSIGN_OR_RETURN(rpc, StartRpcServer(config.worker.listen, service.get()));
  const size_t colon = config.worker.listen.rfind(':');
  context.self.set_grpc(config.worker.listen.substr(0, colon) + ":" + std::to_string(rpc.port));
  reporter->Start(context.self);
  TP_ASSIGN_OR_RETURN(admin, StartAdminServer(config.worker.metrics_listen, metrics, [this] {
                        const absl::Status registered = reporter->status();
                        ReadyReport report;
                        report.checks.emplace_back("scheduler", std::string(registered.message()));
                        report.checks.emplace_back("accepting", service->draining() ? "draining" : "");
                        return report;
                      }));
  metrics
      .AddGauge("tidepool_engine_info", "What this worker computes with; always 1.",
                {{"role", config.worker.role},
                 {"model", context.model->name},
                 {"kv_dtype", std::string(DTypeName(context.layout.dtype))},
                 {"block_tokens", std::to_string(context.layout.block_tokens)}})
      .Set(1);
  metrics.AddCollector([this, &active = metrics.AddGauge("tidepool_worker_requests_active",
                                                         "Requests whose outcome is open.")] {
    active.Set(service->active());
  });
  spdlog::info("model {}: {} layers, {}, {} KV blocks of {} tokens ({} bytes each), {} threads",
               context.model->name, context.layout.layers, context.layout.ToString(), pool->stats().slots,
               context.layout.block_tokens, context.layout.block_bytes(), Threads(config.engine.threads));
  return absl::OkStatus();
}

WorkerServer::WorkerServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
WorkerServer::~WorkerServer() { Shutdown(absl::ZeroDuration()); }

absl::StatusOr<std::unique_ptr<WorkerServer>> WorkerServer::Start(const Config& config,
                                                                  MetricRegistry& metrics) {
  auto impl = std::make_unique<Impl>(config, metrics);
  TP_RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<WorkerServer>(new WorkerServer(std::move(impl)));
}

int WorkerServer::port() const { return impl_->rpc.port; }
int WorkerServer::metrics_port() const { return impl_->admin->port(); }
const std::string& WorkerServer::id() const { return impl_->context.self.worker_id(); }
bool WorkerServer::ready() const { return impl_->reporter->status().ok() && !impl_->service->draining(); }
void WorkerServer::BeginDrain() { impl_->service->BeginDrain(); }

void WorkerServer::Shutdown(absl::Duration grace) {
  if (std::exchange(impl_->shut_down, true)) return;
  impl_->service->BeginDrain();
  const bool idle = impl_->service->WaitIdle(grace);
  if (!idle) spdlog::warn("{} requests are cut: the drain time is over", impl_->service->active());
  impl_->admin->Shutdown(absl::ZeroDuration());
  // Cancels the calls left: each gives its slots back through its own OnCancel.
  impl_->rpc.server->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(idle ? 500 : 0));
  impl_->rpc.server->Wait();
  impl_->engine->Stop();    // its sinks use the reporter
  impl_->reporter.reset();  // its thread reads the slot queue's length
  impl_->slots.reset();
}

}  // namespace tidepool
