#include "server/worker/worker.h"

#include <algorithm>
#include <optional>
#include <thread>

#include "base/log.h"
#include "base/status.h"
#include "server/http/admin_server.h"
#include "server/kv/kv_service.h"
#include "server/model/text/tokenizer.h"
#include "server/worker/calibrate.h"
#include "server/worker/kv_node.h"
#include "server/worker/load_progress.h"
#include "server/worker/prefill_times.h"
#include "server/worker/role_change.h"
#include "server/worker/worker_context.h"
#include "server/worker/worker_service.h"

namespace tidepool {
namespace {

// What measuring first prefills may take before a worker is ready.
constexpr absl::Duration kCalibration = absl::Milliseconds(300);
// How long a worker waits for its disk tier before it is ready without.
constexpr absl::Duration kDiskOpen = absl::Seconds(10);
// What storing the last blocks may take at shutdown where the grace is used up.
constexpr absl::Duration kFlushMin = absl::Milliseconds(200);

absl::StatusOr<v1::Role> ParseRole(const std::string& role) {
  if (role == "prefill") return v1::ROLE_PREFILL;
  if (role == "decode") return v1::ROLE_DECODE;
  if (role == "both") return v1::ROLE_BOTH;
  return absl::InvalidArgumentError("worker.role is '" + role + "'; it may be prefill, decode or both");
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

}  // namespace

// Members are destroyed in reverse order: servers first, then what they call.
struct WorkerServer::Impl {
  Impl(const Config& config, MetricRegistry& metrics)
      : metrics(metrics), probe(metrics), loader_probe(metrics), node(context.config, channels, metrics) {
    context.config = config;
  }

  MetricRegistry& metrics;
  WorkerProbe probe;
  LoaderProbe loader_probe;
  WorkerContext context;
  ChannelCache channels;
  std::unique_ptr<ConstraintFactory> constraints;
  PrefillTimes prefill_times;
  std::vector<PrefillObservation> first_prefills;  // not yet reported; the reporter's, once it runs
  SourceSpeeds speeds;
  BlockLoader::Environment loads;
  KvNode node;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<SlotQueue> slots;
  AnswerLengths lengths;
  std::unique_ptr<Deadlines> deadlines;
  std::unique_ptr<Reporter> reporter;
  std::optional<RoleChange> roles;
  Counter* role_changes = nullptr;
  std::unique_ptr<WorkerService> service;
  std::unique_ptr<KvService> kv;
  RpcServer rpc;
  std::unique_ptr<HttpServer> admin;
  bool shut_down = false;

  absl::Status Start();
  absl::Status StartTiers();
  // So that the first request after a restart finds what is there.
  void WaitDiskOpen() const;
  absl::Status StartEngineAndFetch();
  void StartLoads();
  void FillReport(v1::WorkerReport& report);
  // Makes a change of role that is due, tells of it, and of one that is under way.
  void FollowRole(v1::WorkerReport& report);
  Gauge& Info(const std::string& role);
};

absl::Status WorkerServer::Impl::StartTiers() {
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
  TP_RETURN_IF_ERROR(node.StartTiers(IdentityOf(*context.model, kv.block_tokens, kv.codec)));
  context.pool = node.pool.get();
  context.store = node.store.get();
  return absl::OkStatus();
}

void WorkerServer::Impl::WaitDiskOpen() const {
  if (!node.disk) return;
  const absl::Time limit = Clock::Real().Now() + kDiskOpen;
  while (node.disk->health().state == TierState::kOpening) {
    if (Clock::Real().Now() > limit) {
      spdlog::warn("the disk tier is still being opened; its blocks are found when it is");
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

absl::Status WorkerServer::Impl::StartEngineAndFetch() {
  const Config& config = context.config;
  TP_RETURN_IF_ERROR(node.StartFetch());
  context.fetch = node.fetch.get();
  context.self = node.context.self;

  EngineConfig engine_config = config.engine;
  engine_config.threads = Threads(config.engine.threads);
  Engine::Options engine_options;
  engine_options.config = engine_config;
  engine_options.runner =
      std::make_unique<CpuModelRunner>(context.model, engine_config, config.kv.block_tokens);
  TP_ASSIGN_OR_RETURN(first_prefills,
                      MeasurePrefills(*engine_options.runner, engine_config.max_step_tokens, kCalibration));
  prefill_times.Observe(first_prefills);
  engine_options.pool = node.pool.get();
  engine_options.role = config.worker.role;
  engine_options.metrics = &metrics;
  if (WriteBehind* const store = node.store.get(); store != nullptr) {
    engine_options.on_short = [store] { store->DropQueued(); };
  }
  TP_ASSIGN_OR_RETURN(engine, Engine::Start(std::move(engine_options)));
  context.engine = engine.get();
  slots = std::make_unique<SlotQueue>(SlotCore::Options{.max_waiting = config.engine.max_waiting,
                                                        .order = *ParseQueueOrder(config.engine.order),
                                                        .preempt = config.engine.preemption != "off"},
                                      metrics);
  context.slots = slots.get();
  context.lengths = &lengths;
  context.prefill_seconds = [this](uint64_t new_tokens, uint64_t cached) {
    return prefill_times.Seconds(new_tokens, cached);
  };
  StartLoads();
  return absl::OkStatus();
}

void WorkerServer::Impl::StartLoads() {
  const Config& config = context.config;
  if (config.kv.load == "never") return;
  deadlines = std::make_unique<Deadlines>(context.clock);
  loads.pool = node.pool.get();
  loads.disk = node.disk.get();
  loads.fetch = [this](FetchSpec spec, std::function<void(FetchResult)> done) {
    node.fetch->Fetch(std::move(spec), std::move(done));
  };
  loads.abort = [this](const std::string& request, uint32_t attempt) { node.fetch->Abort(request, attempt); };
  loads.speeds = &speeds;
  loads.deadlines = deadlines.get();
  loads.probe = &loader_probe;
  loads.prefill = [this](uint64_t new_tokens, uint64_t cached) {
    return prefill_times.Seconds(new_tokens, cached);
  };
  loads.clock = context.clock;
  loads.timeout = config.transport.fetch_timeout;
  loads.options.load_all = config.kv.load == "always";
  loads.sample = [this](const SourceId& source, uint64_t bytes, absl::Duration elapsed) {
    context.AddFetchSample(source, bytes, elapsed);
  };
  context.loads = &loads;
}

Gauge& WorkerServer::Impl::Info(const std::string& role) {
  return metrics.AddGauge("tidepool_engine_info", "What this worker computes with; 1 for the role it has.",
                          {{"role", role},
                           {"model", context.model->name},
                           {"kv_dtype", std::string(DTypeName(context.layout.dtype))},
                           {"block_tokens", std::to_string(context.layout.block_tokens)}});
}

void WorkerServer::Impl::FollowRole(v1::WorkerReport& report) {
  const std::optional<Reporter::Told> last = reporter->told();
  std::optional<RoleChange::State> told;
  if (last) told = {.role = last->role, .next = last->next_role};
  roles->Advance(told, service->active_by_kind(), context.clock->Now());
  const RoleChange::State state = roles->Get();
  report.set_role(state.role);
  report.set_next_role(state.next);
  // Nobody is to be placed here until it has changed.
  if (state.changing()) report.set_draining(true);
  if (const std::string role = RoleText(state.role); role != node.role) {
    Info(node.role).Set(0);
    Info(role).Set(1);
    role_changes->Add();
    node.SetRole(role, reporter->status().ok());
  }
}

void WorkerServer::Impl::FillReport(v1::WorkerReport& report) {
  FollowRole(report);
  const EngineStats stats = engine->stats();
  report.set_preempts(context.config.engine.preemption != "off");
  report.set_running(stats.running);
  report.set_waiting(stats.waiting + static_cast<uint32_t>(slots->waiting()));
  report.set_queued_prefill_tokens(stats.queued_prefill_tokens);
  report.set_running_context_tokens(stats.running_context_tokens);
  EngineObservations seen = engine->DrainObservations();
  prefill_times.Observe(seen.prefills);
  // The first report tells what was measured before the first request, too.
  seen.prefills.insert(seen.prefills.begin(), first_prefills.begin(), first_prefills.end());
  first_prefills.clear();
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
  node.SetName(config.worker.role, config.worker.id);
  config.worker.id = node.context.self.worker_id();
  context.self = node.context.self;
  TP_RETURN_IF_ERROR(node.FindScheduler());
  TP_RETURN_IF_ERROR(StartTiers());
  TP_RETURN_IF_ERROR(StartEngineAndFetch());
  WaitDiskOpen();

  reporter = node.MakeReporter(role, [this](v1::WorkerReport& report) { FillReport(report); });
  context.reporter = reporter.get();
  roles.emplace(role);
  role_changes =
      &metrics.AddCounter("tidepool_worker_role_changes_total", "Times that this worker's role has changed.");
  service = std::make_unique<WorkerService>(context, *roles, *node.scheduler, node.Describe(role));
  kv = std::make_unique<KvService>(node.context, metrics);
  TP_ASSIGN_OR_RETURN(rpc, StartRpcServer(config.worker.listen, {service.get(), kv.get()}));
  node.SetListening(config.worker.listen, rpc.port);
  context.self.set_grpc(node.context.self.grpc());
  Info(node.role).Set(1);
  reporter->Start(context.self);
  TP_ASSIGN_OR_RETURN(admin, StartAdminServer(config.worker.metrics_listen, metrics, [this] {
                        const absl::Status registered = reporter->status();
                        ReadyReport report;
                        report.checks.emplace_back("scheduler", std::string(registered.message()));
                        report.checks.emplace_back("accepting", service->draining() ? "draining" : "");
                        return report;
                      }));
  metrics.AddCollector([this, &active = metrics.AddGauge("tidepool_worker_requests_active",
                                                         "Requests whose outcome is open.")] {
    active.Set(service->active());
  });
  spdlog::info("model {}: {} layers, {}, {} KV blocks of {} tokens ({} bytes each), {} threads",
               context.model->name, context.layout.layers, context.layout.ToString(),
               node.pool->stats().slots, context.layout.block_tokens, context.layout.block_bytes(),
               Threads(config.engine.threads));
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
bool WorkerServer::wants_to_end() const {
  if (!impl_->service->end_process() || impl_->service->active() > 0 || impl_->node.fetch->offers() > 0)
    return false;
  // Whom the scheduler sends here yet would have to go elsewhere.
  const std::optional<Reporter::Told> last = impl_->reporter->told();
  return !impl_->reporter->status().ok() || (last && last->draining);
}
void WorkerServer::Apply(const KvConfig& kv) { impl_->node.Apply(kv); }
void WorkerServer::BeginDrain() { impl_->service->BeginDrain(); }

void WorkerServer::Shutdown(absl::Duration grace) {
  if (std::exchange(impl_->shut_down, true)) return;
  const absl::Time deadline = Clock::Real().Now() + grace;
  impl_->service->BeginDrain();
  const bool idle = impl_->service->WaitIdle(grace);
  if (!idle) spdlog::warn("{} requests are cut: the drain time is over", impl_->service->active());
  impl_->admin->Shutdown(absl::ZeroDuration());
  impl_->kv->Stop();
  // Cancels the calls left: each gives its slots back through its own OnCancel.
  impl_->rpc.server->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(idle ? 500 : 0));
  impl_->rpc.server->Wait();
  impl_->engine->Stop();  // its sinks use the reporter
  // What is sealed and not stored yet, as far as the grace goes.
  WriteBehind* const store = impl_->node.store.get();
  if (store != nullptr && !store->Flush(std::max(deadline - Clock::Real().Now(), kFlushMin))) {
    spdlog::warn("some blocks were not stored: the drain time is over");
  }
  impl_->reporter->Leave();
  impl_->reporter.reset();  // its thread reads the slot queue's length
  impl_->slots.reset();
}

}  // namespace tidepool
