#include "tools/simulate/simulation.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <limits>
#include <optional>
#include <queue>
#include <span>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/rng.h"
#include "base/status.h"
#include "kvstore/policy/policy.h"
#include "kvstore/pool_core.h"
#include "scheduler/core.h"
#include "server/bench/random.h"
#include "tools/simulate/links.h"
#include "tools/simulate/sim_engine.h"

namespace tidepool {

namespace {

const absl::Time kEpoch = absl::UnixEpoch() + absl::Hours(1);
constexpr SimTime kNever = INT64_MAX;
// Workers have registered when the first request comes.
constexpr SimTime kWarmUp = kSimSecond;
constexpr SimTime kReplicateEvery = kSimSecond;
constexpr SimTime kWeighEvery = kSimSecond;
// A gateway asks again where no worker is ready: as long as a scheduler that restarts may take.
constexpr SimTime kUnavailableRetry = kSimSecond / 2;
constexpr uint32_t kUnavailableRetriesMax = 120;
// And this long after a worker failed a request.
constexpr SimTime kRetryPause = kSimSecond / 10;
constexpr size_t kSamplesPerReportMax = 16;
constexpr uint64_t kProgressEvery = 16384;

absl::Time At(SimTime t) { return kEpoch + absl::Nanoseconds(t); }

// A request on its way through the cluster, one attempt after the other. Named by its slot and generation,
// which moves on with every attempt: what is late finds nobody.
struct Live {
  uint32_t generation = 1;
  bool used = false;
  uint32_t request = 0;
  uint32_t attempt = 0, unavailable = 0;
  uint32_t prefill = 0, decode = 0;            // workers
  uint32_t prefill_boot = 0, decode_boot = 0;  // the processes that hold the leases
  uint32_t emitted = 0;                        // tokens that the client has
  SimTime first_token = -1;
  double predicted_ttft = 0, predicted_itl = 0;
  std::string excluded;  // the worker that failed it last
  std::vector<PrefixHolder> holders;

  // Of this attempt.
  uint32_t prompt_tokens = 0;  // with what was emitted before
  std::vector<SlotRef> at_prefill, at_decode;
  uint32_t published = 0;         // leading blocks that the worker which computes had, and has fetched
  uint32_t fetched = 0;           // of those
  uint32_t decode_published = 0;  // that the decode worker had
  uint32_t fetching = 0;
  bool placed = false, computed = false, handed_over = false, decoding = false;

  bool local() const { return prefill == decode; }
};

enum class TransferKind : uint8_t { kFetch, kHandoff, kCopy };

struct Transfer {
  uint32_t generation = 1;
  TransferKind kind = TransferKind::kFetch;
  uint64_t live = 0;
  uint32_t from = 0, to = 0, from_boot = 0, to_boot = 0;
  uint32_t begin = 0;            // first block
  std::vector<SlotRef> sources;  // leased there
  std::vector<SlotRef> targets;  // kCopy: leased at `to`
  std::vector<BlockKey> keys;    // kCopy
  double bytes = 0;
  SimTime began = 0;
};

struct SimWorker {
  std::string id;
  Role role = Role::kBoth;
  Role configured_role = Role::kBoth;  // that it starts with
  std::optional<Role> next_role;       // it takes nothing new until it has this role
  bool told = false;                   // the scheduler knows
  std::unique_ptr<PoolCore> pool;
  std::unique_ptr<SimEngine> engine;
  SimTime engine_event = SimEngine::kIdle;  // when the event is due that ends its step
  uint32_t engine_version = 0;
  bool up = true;
  bool touched = false;
  uint32_t boot = 1;
  uint64_t seq = 0;
  bool snapshot = true;
  std::deque<uint64_t> slot_queue[2];  // online; batch class
  uint32_t slots_waiting = 0;
  uint64_t prompt_tokens_waiting = 0;  // of those in slot_queue that are to be computed here
  std::vector<PrefillSample> prefills;
  std::vector<DecodeSample> decodes;
  std::vector<FetchSample> fetches;
  std::vector<std::string> prefilled;
};

enum class EventKind : uint8_t {
  kPlace,
  kAtDecode,
  kAtPrefill,
  kEngine,
  kLanded,
  kHandedOver,
  kReport,
  kCrash,
  kBoot,
  kSchedulerDown,
  kSchedulerUp,
  kSetRole
};

struct Event {
  SimTime at;
  uint64_t serial;
  EventKind kind;
  uint32_t version;
  uint64_t subject;
  bool operator>(const Event& o) const { return at != o.at ? at > o.at : serial > o.serial; }
};

// Oracle: knows what the simulator knows. The length comes with the request's id.
class OracleLengths final : public LengthPredictor {
 public:
  explicit OracleLengths(const Workload& workload) : workload_(workload) {}
  LengthPrediction Predict(const PlaceRequest& request) const override {
    uint32_t index = 0;
    TP_CHECK(absl::SimpleAtoi(std::string(request.request_id).substr(1), &index));
    const uint32_t n = workload_.requests[index].output_tokens;
    return {.mean = n, .median = n, .high = n, .learnt = true};
  }
  void Observe(const std::string&, const std::string&, uint32_t) override {}

 private:
  const Workload& workload_;
};

class Simulation {
 public:
  Simulation(const SimOptions& options, const Workload& workload, const WorkerProfile& profile)
      : o_(options),
        workload_(workload),
        profile_(profile),
        block_tokens_(profile.layout.block_tokens),
        pool_blocks_(options.pool_blocks > 0 ? options.pool_blocks : profile.pool_blocks),
        control_(FromSeconds(profile.control_seconds)),
        rng_(Mix64(options.seed)),
        fault_rng_(Mix64(options.seed ^ 0xfa17)),
        links_(options.prefill + options.decode + options.both, profile.link_bytes_per_second),
        report_interval_(std::max<SimTime>(1, FromSeconds(options.report_interval_seconds))) {
    model_.name = profile.name.substr(0, 15);
    model_.fingerprint = "sim";
    model_.layout = profile.layout;
    model_.max_model_len = profile.max_model_len;
    model_.vocab_size = 1;
  }

  absl::Status Prepare();
  SimResult Run(const SimProgress& progress);

 private:
  // --- time ---
  void Push(SimTime at, EventKind kind, uint64_t subject, uint32_t version = 0) {
    events_.push({at, ++serials_, kind, version, subject});
  }
  void Handle(const Event& event);

  // --- requests ---
  uint64_t IdOf(uint32_t slot) const { return uint64_t{live_[slot].generation} << 32 | slot; }
  Live* Find(uint64_t id) {
    Live& l = live_[static_cast<uint32_t>(id)];
    return l.used && l.generation == id >> 32 ? &l : nullptr;
  }
  SimTime ArrivesAt(size_t request) const { return workload_.requests[request].at + kWarmUp; }
  void Arrive(uint32_t request);
  void Place(uint32_t slot);
  void AtDecode(Live& l, uint64_t id);
  void AtPrefill(Live& l, uint64_t id);
  // The next attempt, or the end: `worker` failed it.
  void Fail(Live& l, uint32_t worker);
  void End(Live& l);
  void Reject(Live& l, const std::string& kind);
  void GiveUp(Live& l);
  void Complete(Live& l);
  void DropLeases(Live& l);
  void Judge(const Live& l);
  const SimRequest& RequestOf(const Live& l) const { return workload_.requests[l.request]; }
  uint32_t MaxTokens(const Live& l) const {
    const SimRequest& r = RequestOf(l);
    return std::max(r.output_tokens, std::min(o_.max_tokens, RoomFor(r))) - l.emitted;
  }
  uint32_t RoomFor(const SimRequest& r) const {
    return profile_.max_model_len > r.prompt_tokens ? profile_.max_model_len - r.prompt_tokens : 1;
  }
  bool BatchClass(const Live& l) const { return RequestOf(l).slo_class == SloClass::kBatch; }
  SimEngine::Owner OwnerOf(const Live& l) const {
    return {.tenant = workload_.tenants[RequestOf(l).tenant],
            .priority = RequestOf(l).slo_class == SloClass::kInteractive ? 1 : 0,
            .batch_class = BatchClass(l)};
  }
  GroupResult& TenantOf(const Live& l) { return *tenants_[RequestOf(l).tenant]; }
  GroupResult& ClassOf(const Live& l) { return result_.classes[static_cast<size_t>(RequestOf(l).slo_class)]; }
  template <typename F>
  void Groups(const Live& l, F f) {
    f(result_.all);
    f(TenantOf(l));
    f(ClassOf(l));
  }
  double SloTtft(const Live& l) const;
  double SloItl(const Live& l) const;

  // --- slots ---
  uint32_t Blocks(uint64_t tokens) const {
    return static_cast<uint32_t>((tokens + block_tokens_ - 1) / block_tokens_);
  }
  void QueueForSlots(uint32_t w, Live& l, uint64_t id);
  void TrySlots(uint32_t w);
  // False: no slots now.
  bool TryReserve(uint32_t w, Live& l);
  void Granted(uint32_t w, Live& l, uint64_t id);
  void Publish(uint32_t w, const SimRequest& r, std::vector<SlotRef>& leases, std::span<const BlockKey> keys,
               uint32_t from);
  void Release(uint32_t w, std::vector<SlotRef>& leases, LeaseKind kind);
  void Touch(uint32_t w) {
    if (workers_[w].touched) return;
    workers_[w].touched = true;
    touched_.push_back(w);
  }
  void Settle();

  // --- transfers ---
  uint64_t NewTransfer(Transfer transfer, double bytes);
  void StartFetch(Live& l, uint64_t id, uint32_t w);
  void FetchEnded(Live& l, uint64_t id, uint32_t w);
  void StartHandoff(Live& l, uint64_t id);
  void HandedOver(Live& l, uint64_t id);
  void Landed(uint64_t id);
  void Cut(uint64_t id);
  void FreeTransfer(uint32_t slot);
  void Copy(const CopyOrder& order);

  // --- engines ---
  void ToEngine(Live& l, uint64_t id, uint32_t w);
  void EngineEnded(uint32_t w);
  void Prefilled(uint32_t w, const SimEngine::Prefilled& p);
  void FirstToken(Live& l);

  // --- reports and faults ---
  void Report(uint32_t w);
  void Deliver(uint32_t slot);
  void NewCore();
  void StartWorker(uint32_t w);
  void Crash(uint32_t w);
  void Sample();

  // --- roles ---
  void Weigh();
  // What it would not do in its next role is done.
  bool MayChange(uint32_t w) const;
  SimTime Exponential(double mean) { return FromSeconds(mean * DrawExponential(fault_rng_)); }
  bool Over() const { return ended_ == workload_.requests.size(); }

  const SimOptions& o_;
  const Workload& workload_;
  const WorkerProfile& profile_;
  const uint32_t block_tokens_;
  const uint32_t pool_blocks_;
  const SimTime control_;
  Rng rng_, fault_rng_;
  Links links_;
  const SimTime report_interval_;
  ModelIdentity model_;

  SimTime now_ = 0;
  uint64_t serials_ = 0;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  std::unique_ptr<SchedulerCore> core_;  // null: it is down
  std::optional<ElasticityCore> elastic_;
  std::vector<SimWorker> workers_;
  absl::flat_hash_map<std::string, uint32_t> worker_of_;
  std::vector<PrefillSample> first_prefills_;  // what a worker measures when it starts
  std::vector<Live> live_;
  std::vector<uint32_t> free_live_;
  std::vector<Transfer> transfers_;
  std::vector<uint32_t> free_transfers_;
  struct Mail {
    uint32_t worker = 0, boot = 0;
    WorkerReport report;
  };
  std::vector<Mail> mail_;
  std::vector<uint32_t> free_mail_;
  std::vector<uint32_t> touched_;
  size_t next_arrival_ = 0, ended_ = 0;
  SimTime report_base_ = 0;
  uint64_t next_report_ = 0;  // the n-th of all workers' turns
  SimTime next_tick_ = 0, next_replicate_ = kReplicateEvery, next_sample_ = 0, sample_every_ = kSimSecond;
  SimTime next_weigh_ = kNever;
  std::vector<GroupResult*> tenants_;
  SimResult result_;

  // Scratch.
  std::vector<BlockKey> keys_;
  std::vector<uint32_t> slots_;
  std::vector<PoolCore::Taken> taken_;
  std::vector<uint64_t> begun_;
  SimEngine::Outcome outcome_;
};

absl::Status Simulation::Prepare() {
  if (o_.prefill + o_.decode + o_.both == 0)
    return absl::InvalidArgumentError("no worker; give --prefill and --decode, or --both");
  if (o_.both == 0 && o_.decode == 0)
    return absl::InvalidArgumentError("--decode is 0; prefill workers alone answer nothing");
  if (workload_.stretch_tokens % block_tokens_ != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("block-tokens is ", block_tokens_, "; it must divide the ", workload_.stretch_tokens,
                     " tokens that one hash id of the workload stands for (512 x length-scale)"));
  }
  if (!(o_.report_interval_seconds > 0))
    return absl::InvalidArgumentError("report-interval must be above 0, 100ms for example");
  if (o_.faults.report_loss < 0 || o_.faults.report_loss >= 1)
    return absl::InvalidArgumentError("report-loss must be at least 0 and below 1");
  TP_RETURN_IF_ERROR(CreatePolicy({.name = o_.eviction, .capacity = 1}).status());
  for (uint32_t n = 16; n <= profile_.max_step_tokens; n *= 2)
    first_prefills_.push_back({n, 0, profile_.PrefillSeconds(n, 0)});

  result_.workload = workload_.name;
  result_.prefill = o_.prefill;
  result_.decode = o_.decode;
  result_.both = o_.both;
  result_.seed = o_.seed;
  result_.slo_ttft_seconds = absl::ToDoubleSeconds(o_.scheduler.slo_ttft);
  result_.slo_itl_seconds = absl::ToDoubleSeconds(o_.scheduler.slo_itl);
  for (const std::string& tenant : workload_.tenants) tenants_.push_back(&result_.tenants[tenant]);
  result_.service.resize(workload_.tenants.size());
  result_.arrival_seconds = ToSeconds(workload_.span());
  sample_every_ = o_.sample_seconds > 0 ? FromSeconds(o_.sample_seconds)
                                        : std::max<SimTime>(kSimSecond / 10, workload_.span() / 1000);
  NewCore();
  const auto add = [&](uint32_t n, Role role, char letter) {
    for (uint32_t i = 0; i < n; ++i) {
      SimWorker& w = workers_.emplace_back();
      w.id = letter + std::to_string(i);
      w.role = w.configured_role = role;
      worker_of_[w.id] = static_cast<uint32_t>(workers_.size() - 1);
    }
  };
  workers_.reserve(o_.prefill + o_.decode + o_.both);
  add(o_.prefill, Role::kPrefill, 'p');
  add(o_.decode, Role::kDecode, 'd');
  add(o_.both, Role::kBoth, 'b');
  for (uint32_t w = 0; w < workers_.size(); ++w) StartWorker(w);
  if (o_.faults.worker_crash_every_seconds > 0)
    Push(Exponential(o_.faults.worker_crash_every_seconds), EventKind::kCrash, 0);
  if (o_.faults.scheduler_crash_every_seconds > 0)
    Push(Exponential(o_.faults.scheduler_crash_every_seconds), EventKind::kSchedulerDown, 0);
  return absl::OkStatus();
}

void Simulation::NewCore() {
  SchedulerOptions options = o_.scheduler;
  options.seed = o_.seed;
  options.max_workers = std::max<uint32_t>(options.max_workers, o_.prefill + o_.decode + o_.both);
  options.chunk_tokens = profile_.max_step_tokens;
  core_ = std::make_unique<SchedulerCore>(
      options, o_.replication, o_.oracle_lengths ? std::make_unique<OracleLengths>(workload_) : nullptr);
  elastic_.emplace(o_.elasticity_options);
}

void Simulation::StartWorker(uint32_t w) {
  SimWorker& worker = workers_[w];
  auto policy = CreatePolicy({.name = o_.eviction, .capacity = pool_blocks_});
  worker.pool = std::make_unique<PoolCore>(PoolCore::Options{
      .slots = pool_blocks_, .slot_bytes = profile_.layout.block_bytes(), .policy = *std::move(policy)});
  worker.engine = std::make_unique<SimEngine>(profile_, rng_.Next(), &result_.gaps, o_.order);
  worker.engine_event = SimEngine::kIdle;
  ++worker.engine_version;
  worker.up = true;
  worker.role = worker.configured_role;
  worker.next_role.reset();
  worker.told = false;
  worker.seq = 0;
  worker.snapshot = true;
  worker.prefills = first_prefills_;
  Report(w);
}

// --- requests ---

void Simulation::Arrive(uint32_t request) {
  uint32_t slot = static_cast<uint32_t>(live_.size());
  if (free_live_.empty()) {
    live_.emplace_back();
  } else {
    slot = free_live_.back();
    free_live_.pop_back();
  }
  const uint32_t generation = live_[slot].generation + 1;
  live_[slot] = Live();
  live_[slot].generation = generation;
  live_[slot].used = true;
  live_[slot].request = request;
  Groups(live_[slot], [](GroupResult& g) { ++g.requests; });
  Place(slot);
}

void Simulation::Place(uint32_t slot) {
  Live& l = live_[slot];
  const SimRequest& r = RequestOf(l);
  l.prompt_tokens = r.prompt_tokens + l.emitted;
  PlaceResult placed;
  if (core_ == nullptr) {
    placed.status = absl::UnavailableError("the scheduler is down");
  } else {
    PlaceRequest request;
    request.request_id = absl::StrCat("r", l.request);
    workload_.Keys(r, l.prompt_tokens, block_tokens_, request.keys);
    request.prompt_tokens = l.prompt_tokens;
    request.max_tokens = MaxTokens(l);
    request.tenant = workload_.tenants[r.tenant];
    request.slo_class = r.slo_class;
    if (!l.excluded.empty()) request.exclude_workers.push_back(l.excluded);
    const auto began = std::chrono::steady_clock::now();
    placed = core_->Place(request, At(now_));
    result_.place_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    ++result_.decisions;
  }
  if (absl::IsUnavailable(placed.status)) {
    // After a while also the worker that failed it may be tried again.
    l.excluded.clear();
    if (++l.unavailable > kUnavailableRetriesMax) return GiveUp(l);
    Push(now_ + kUnavailableRetry, EventKind::kPlace, IdOf(slot));
    return;
  }
  if (!placed.status.ok())
    return Reject(l, placed.rejection ? std::string(placed.rejection->kind) : "too_large");
  const Placement& p = *placed.placement;
  l.placed = true;
  l.decode = worker_of_.at(p.decode.worker_id);
  l.prefill = p.prefill ? worker_of_.at(p.prefill->worker_id) : l.decode;
  l.holders = p.holders;
  if (l.attempt == 0) {
    l.predicted_ttft = p.ttft_seconds;
    l.predicted_itl = p.itl_seconds;
  }
  Push(now_ + control_, EventKind::kAtDecode, IdOf(slot));
}

void Simulation::AtDecode(Live& l, uint64_t id) {
  l.decode_boot = workers_[l.decode].boot;
  if (!workers_[l.decode].up) return Fail(l, l.decode);
  QueueForSlots(l.decode, l, id);
}

void Simulation::AtPrefill(Live& l, uint64_t id) {
  l.prefill_boot = workers_[l.prefill].boot;
  if (!workers_[l.prefill].up) return Fail(l, l.prefill);
  QueueForSlots(l.prefill, l, id);
}

void Simulation::Fail(Live& l, uint32_t worker) {
  const uint32_t slot = static_cast<uint32_t>(&l - live_.data());
  const uint64_t id = IdOf(slot);
  if (l.decoding) {
    const uint32_t left = workers_[l.decode].engine->TokensLeft(id, now_);
    l.emitted = RequestOf(l).output_tokens - left;
  }
  for (const uint32_t w : {l.prefill, l.decode}) workers_[w].engine->Remove(id);
  DropLeases(l);
  ++l.generation;
  l.computed = l.handed_over = l.decoding = false;
  l.published = l.fetched = l.decode_published = l.fetching = 0;
  l.excluded = workers_[worker].id;
  ++result_.retries;
  if (++l.attempt >= o_.attempts_max) return GiveUp(l);
  Push(now_ + kRetryPause, EventKind::kPlace, IdOf(slot));
}

void Simulation::DropLeases(Live& l) {
  if (workers_[l.prefill].boot == l.prefill_boot) Release(l.prefill, l.at_prefill, LeaseKind::kSequence);
  if (workers_[l.decode].boot == l.decode_boot) Release(l.decode, l.at_decode, LeaseKind::kSequence);
  l.at_prefill.clear();
  l.at_decode.clear();
}

void Simulation::End(Live& l) {
  DropLeases(l);
  l.used = false;
  ++l.generation;
  l.holders.clear();
  free_live_.push_back(static_cast<uint32_t>(&l - live_.data()));
  ++ended_;
  result_.simulated_seconds = ToSeconds(now_);
}

void Simulation::Reject(Live& l, const std::string& kind) {
  if (core_ != nullptr && l.placed && !l.computed)
    core_->Finish(absl::StrCat("r", l.request), At(now_), {.completed = false});
  ++result_.rejections[kind];
  Groups(l, [](GroupResult& g) { ++g.rejected; });
  End(l);
}

void Simulation::GiveUp(Live& l) {
  if (core_ != nullptr && l.placed)
    core_->Finish(absl::StrCat("r", l.request), At(now_), {.completed = false});
  Groups(l, [](GroupResult& g) { ++g.failed; });
  End(l);
}

double Simulation::SloTtft(const Live& l) const {
  const ClassOptions& c = o_.scheduler.classes[static_cast<size_t>(RequestOf(l).slo_class)];
  if (c.slo_ttft > absl::ZeroDuration()) return absl::ToDoubleSeconds(c.slo_ttft);
  const bool none = BatchClass(l) || o_.scheduler.slo_ttft <= absl::ZeroDuration();
  return none ? std::numeric_limits<double>::infinity() : absl::ToDoubleSeconds(o_.scheduler.slo_ttft);
}

double Simulation::SloItl(const Live& l) const {
  const ClassOptions& c = o_.scheduler.classes[static_cast<size_t>(RequestOf(l).slo_class)];
  if (c.slo_itl > absl::ZeroDuration()) return absl::ToDoubleSeconds(c.slo_itl);
  const bool none = BatchClass(l) || o_.scheduler.slo_itl <= absl::ZeroDuration();
  return none ? std::numeric_limits<double>::infinity() : absl::ToDoubleSeconds(o_.scheduler.slo_itl);
}

void Simulation::Judge(const Live& l) {
  const SimRequest& r = RequestOf(l);
  const double ttft = ToSeconds(l.first_token - ArrivesAt(l.request));
  const double itl =
      r.output_tokens > 1 ? ToSeconds(now_ - l.first_token) / static_cast<double>(r.output_tokens - 1) : 0;
  const bool good = ttft <= SloTtft(l) && itl <= SloItl(l);
  Groups(l, [&](GroupResult& g) {
    ++g.completed;
    if (good) ++g.good;
    g.prompt_tokens += r.prompt_tokens;
    g.output_tokens += r.output_tokens;
    g.ttft.push_back(static_cast<float>(ttft));
    g.itl.Add(itl, r.output_tokens - 1);
  });
  if (l.attempt == 0) {
    result_.ttft_error.push_back(static_cast<float>(std::abs(l.predicted_ttft - ttft) / ttft));
    result_.ttft_bias.push_back(static_cast<float>((l.predicted_ttft - ttft) / ttft));
    if (r.output_tokens > 1 && itl > 0)
      result_.itl_error.push_back(static_cast<float>(std::abs(l.predicted_itl - itl) / itl));
  }
  if (core_ != nullptr) {
    core_->Finish(absl::StrCat("r", l.request), At(now_),
                  {.output_tokens = r.output_tokens,
                   .ttft_seconds = ttft,
                   .itl_seconds = itl,
                   .cached_host_tokens = (l.published - l.fetched) * block_tokens_,
                   .cached_remote_tokens = l.fetched * block_tokens_});
  }
}

void Simulation::Complete(Live& l) {
  const SimRequest& r = RequestOf(l);
  // The last token's KV is never computed.
  const uint32_t computed = r.prompt_tokens + r.output_tokens - 1;
  workload_.Keys(r, computed, block_tokens_, keys_);
  const uint32_t sealed = l.prompt_tokens / block_tokens_;
  if (keys_.size() > sealed) Publish(l.decode, r, l.at_decode, keys_, sealed);
  Judge(l);
  End(l);
}

// --- slots ---

void Simulation::QueueForSlots(uint32_t w, Live& l, uint64_t id) {
  SimWorker& worker = workers_[w];
  const bool batch = BatchClass(l);
  const bool first = worker.slot_queue[0].empty() && (!batch || worker.slot_queue[1].empty());
  if (first && TryReserve(w, l)) return Granted(w, l, id);
  const size_t limit = batch ? (profile_.max_waiting + 1) / 2 : profile_.max_waiting;
  if (worker.slots_waiting + worker.engine->waiting() >= limit) return Fail(l, w);
  worker.slot_queue[batch].push_back(id);
  ++worker.slots_waiting;
  if (w == l.prefill) worker.prompt_tokens_waiting += l.prompt_tokens;
}

void Simulation::TrySlots(uint32_t w) {
  SimWorker& worker = workers_[w];
  for (auto& queue : worker.slot_queue) {
    while (!queue.empty()) {
      const uint64_t id = queue.front();
      Live* l = Find(id);
      if (l != nullptr && !TryReserve(w, *l)) return;  // first come, first served
      queue.pop_front();
      --worker.slots_waiting;
      if (l == nullptr) continue;
      if (w == l->prefill) worker.prompt_tokens_waiting -= l->prompt_tokens;
      Granted(w, *l, id);
    }
  }
  if (worker.slots_waiting == 0) worker.prompt_tokens_waiting = 0;
}

bool Simulation::TryReserve(uint32_t w, Live& l) {
  PoolCore& pool = *workers_[w].pool;
  const SimRequest& r = RequestOf(l);
  const bool decodes = w == l.decode;
  const uint32_t total = Blocks(uint64_t{l.prompt_tokens} + (decodes ? MaxTokens(l) : 0));
  workload_.Keys(r, l.prompt_tokens, block_tokens_, keys_);
  slots_.clear();
  pool.index().FindPrefix(keys_, slots_);
  const auto hits = static_cast<uint32_t>(slots_.size());
  const auto idle = static_cast<uint32_t>(
      std::count_if(slots_.begin(), slots_.end(), [&](uint32_t s) { return pool.View(s)->leases == 0; }));
  const PoolCore::Counts counts = pool.counts();
  const uint32_t room = counts.free + counts.evictable - idle;
  uint32_t spare = 0;
  if (BatchClass(l) && counts.leased > 0) spare = pool.slots() / 4;
  if (room < total - hits + spare) return false;
  std::vector<SlotRef>& leases = decodes ? l.at_decode : l.at_prefill;
  leases.clear();
  const UseOptions use{.tenant = workload_.tenants[r.tenant]};
  pool.LeasePrefix(keys_, use, leases);
  taken_.clear();
  TP_CHECK(pool.Reserve(total - hits, use, At(now_), taken_));
  for (const PoolCore::Taken& t : taken_) leases.push_back(t.ref);
  if (decodes) l.decode_published = hits;
  if (w == l.prefill) {
    l.published = hits;
    result_.blocks_asked += keys_.size();
    result_.blocks_found += hits;
  }
  return true;
}

void Simulation::Granted(uint32_t w, Live& l, uint64_t id) {
  if (w == l.prefill) {
    StartFetch(l, id, w);
  } else {
    Push(now_ + control_, EventKind::kAtPrefill, id);
  }
}

// Publishes leases[from, keys.size()); one whose key is there already is swapped for that.
void Simulation::Publish(uint32_t w, const SimRequest& r, std::vector<SlotRef>& leases,
                         std::span<const BlockKey> keys, uint32_t from) {
  PoolCore& pool = *workers_[w].pool;
  for (uint32_t i = from; i < keys.size() && i < leases.size(); ++i) {
    BlockInfo info{.key = keys[i], .tenant = workload_.tenants[r.tenant], .position = i};
    if (i > 0) info.parent = keys[i - 1];
    info.compute_seconds =
        static_cast<float>(profile_.PrefillSeconds(block_tokens_, uint64_t{i} * block_tokens_));
    const PoolCore::Published p = pool.Publish(leases[i], LeaseKind::kSequence, std::move(info));
    if (!p.duplicate) continue;
    pool.DropLeases(std::span(&leases[i], 1), LeaseKind::kSequence);
    leases[i] = p.ref;
  }
}

void Simulation::Release(uint32_t w, std::vector<SlotRef>& leases, LeaseKind kind) {
  if (leases.empty()) return;
  workers_[w].pool->DropLeases(leases, kind);
  leases.clear();
  Touch(w);
}

// What follows from what just happened, worker by worker, until nothing does.
void Simulation::Settle() {
  for (size_t i = 0; i < touched_.size(); ++i) {
    const uint32_t w = touched_[i];
    SimWorker& worker = workers_[w];
    worker.touched = false;
    if (!worker.up) continue;
    TrySlots(w);
    begun_.clear();
    worker.engine->Kick(now_, begun_);
    for (const uint64_t id : begun_) {
      Live* l = Find(id);
      if (l != nullptr && !l->local()) StartHandoff(*l, id);
    }
    if (worker.engine->end() != worker.engine_event) {
      worker.engine_event = worker.engine->end();
      ++worker.engine_version;
      if (worker.engine_event != SimEngine::kIdle)
        Push(worker.engine_event, EventKind::kEngine, w, worker.engine_version);
    }
  }
  touched_.clear();
}

// --- transfers ---

uint64_t Simulation::NewTransfer(Transfer transfer, double bytes) {
  uint32_t slot = static_cast<uint32_t>(transfers_.size());
  if (free_transfers_.empty()) {
    transfers_.emplace_back();
  } else {
    slot = free_transfers_.back();
    free_transfers_.pop_back();
  }
  transfer.generation = transfers_[slot].generation + 1;
  transfer.from_boot = workers_[transfer.from].boot;
  transfer.to_boot = workers_[transfer.to].boot;
  transfer.bytes = bytes;
  transfer.began = now_;
  transfers_[slot] = std::move(transfer);
  const uint64_t id = uint64_t{transfers_[slot].generation} << 32 | slot;
  links_.Start(id, transfers_[slot].from, transfers_[slot].to, bytes, now_);
  return id;
}

void Simulation::FreeTransfer(uint32_t slot) {
  Transfer& t = transfers_[slot];
  if (workers_[t.from].boot == t.from_boot) Release(t.from, t.sources, LeaseKind::kTransfer);
  if (workers_[t.to].boot == t.to_boot) Release(t.to, t.targets, LeaseKind::kTransfer);
  t.sources.clear();
  t.targets.clear();
  t.keys.clear();
  ++t.generation;
  free_transfers_.push_back(slot);
}

void Simulation::StartFetch(Live& l, uint64_t id, uint32_t w) {
  const uint32_t reusable = (l.prompt_tokens - 1) / block_tokens_;
  uint32_t next = l.published;
  std::vector<std::optional<SlotRef>> leased;
  for (const PrefixHolder& h : l.holders) {
    const uint32_t end = std::min(h.end, reusable);
    if (h.begin > next || end <= next) continue;
    const auto it = worker_of_.find(h.worker.worker_id);
    if (it == worker_of_.end() || it->second == w || !workers_[it->second].up) continue;
    const uint32_t from = it->second;
    workload_.Keys(RequestOf(l), l.prompt_tokens, block_tokens_, keys_);
    const uint32_t stop = std::min<uint32_t>(end, static_cast<uint32_t>(keys_.size()));
    if (stop <= next) continue;
    leased.clear();
    workers_[from].pool->LeaseMany(std::span(keys_).subspan(next, stop - next), LeaseKind::kTransfer, leased);
    // What was evicted since the scheduler heard of it ends the run.
    Transfer t{.kind = TransferKind::kFetch, .live = id, .from = from, .to = w, .begin = next};
    bool gap = false;
    for (const auto& ref : leased) {
      if (ref && !gap) t.sources.push_back(*ref);
      if (ref && gap) workers_[from].pool->DropLeases(std::span(&*ref, 1), LeaseKind::kTransfer);
      gap = gap || !ref;
    }
    if (t.sources.empty()) continue;
    next += static_cast<uint32_t>(t.sources.size());
    ++l.fetching;
    const auto bytes = static_cast<double>(t.sources.size() * profile_.layout.block_bytes());
    NewTransfer(std::move(t), bytes);
  }
  if (l.fetching == 0) ToEngine(l, id, w);
}

void Simulation::StartHandoff(Live& l, uint64_t id) {
  const uint64_t missing = l.prompt_tokens - uint64_t{l.decode_published} * block_tokens_;
  const double bytes =
      static_cast<double>(std::max<uint64_t>(missing, 1) * profile_.layout.bytes_per_token());
  NewTransfer({.kind = TransferKind::kHandoff, .live = id, .from = l.prefill, .to = l.decode}, bytes);
}

void Simulation::Landed(uint64_t id) {
  const auto slot = static_cast<uint32_t>(id);
  Transfer& t = transfers_[slot];
  if (t.generation != id >> 32) return;
  if (workers_[t.from].boot != t.from_boot || workers_[t.to].boot != t.to_boot) return Cut(id);
  const FetchSample sample{.bytes = static_cast<uint64_t>(t.bytes), .seconds = ToSeconds(now_ - t.began)};
  workers_[t.to].fetches.push_back(sample);
  Live* l = t.kind == TransferKind::kCopy ? nullptr : Find(t.live);
  switch (t.kind) {
    case TransferKind::kFetch: {
      result_.bytes_fetched += sample.bytes;
      if (l == nullptr) break;
      std::vector<SlotRef>& leases = l->local() ? l->at_decode : l->at_prefill;
      workload_.Keys(RequestOf(*l), l->prompt_tokens, block_tokens_, keys_);
      const auto n = static_cast<uint32_t>(t.sources.size());
      Publish(t.to, RequestOf(*l), leases, std::span(keys_).first(t.begin + n), t.begin);
      // Transfers of one request end in any order, but a gap has no use.
      if (t.begin == l->published) {
        l->published += n;
        l->fetched += n;
      }
      break;
    }
    case TransferKind::kHandoff:
      result_.bytes_handed_over += sample.bytes;
      break;
    case TransferKind::kCopy:
      result_.bytes_replicated += sample.bytes;
      for (size_t i = 0; i < t.keys.size(); ++i) {
        PoolCore& to = *workers_[t.to].pool;
        const BlockInfo* info = workers_[t.from].pool->Info(t.keys[i]);
        if (info == nullptr) continue;
        const PoolCore::Published p = to.Publish(t.targets[i], LeaseKind::kTransfer, *info);
        if (!p.duplicate) continue;
        to.DropLeases(std::span(&t.targets[i], 1), LeaseKind::kTransfer);
        t.targets[i] = p.ref;
      }
      break;
  }
  const TransferKind kind = t.kind;
  const uint64_t live = t.live;
  const uint32_t to = t.to;
  FreeTransfer(slot);
  if (l == nullptr) return;
  if (kind == TransferKind::kFetch) {
    FetchEnded(*l, live, to);
  } else {
    l->handed_over = true;
    if (l->computed) HandedOver(*l, live);
  }
}

// One that does not arrive.
void Simulation::Cut(uint64_t id) {
  const auto slot = static_cast<uint32_t>(id);
  Transfer& t = transfers_[slot];
  if (t.generation != id >> 32) return;
  const TransferKind kind = t.kind;
  const uint64_t live = t.live;
  const uint32_t from = t.from, to = t.to;
  const bool there = workers_[to].up && workers_[to].boot == t.to_boot;
  FreeTransfer(slot);
  Live* l = kind == TransferKind::kCopy ? nullptr : Find(live);
  if (l == nullptr) return;
  if (kind == TransferKind::kFetch && there) return FetchEnded(*l, live, to);
  Fail(*l, there ? from : to);
}

void Simulation::FetchEnded(Live& l, uint64_t id, uint32_t w) {
  if (--l.fetching == 0) ToEngine(l, id, w);
}

void Simulation::Copy(const CopyOrder& order) {
  const auto from = worker_of_.find(order.from.worker_id), to = worker_of_.find(order.to.worker_id);
  if (from == worker_of_.end() || to == worker_of_.end()) return;
  if (!workers_[from->second].up || !workers_[to->second].up) return;
  PoolCore& source = *workers_[from->second].pool;
  PoolCore& target = *workers_[to->second].pool;
  Transfer t{.kind = TransferKind::kCopy, .from = from->second, .to = to->second};
  for (const BlockKey& key : order.keys) {
    if (target.index().Find(key) != PoolCore::kNoSlot) continue;
    if (const auto ref = source.Lease(key, LeaseKind::kTransfer)) {
      t.sources.push_back(*ref);
      t.keys.push_back(key);
    }
  }
  taken_.clear();
  const UseOptions use{.kind = LeaseKind::kTransfer};
  if (t.keys.empty() || !target.Reserve(t.keys.size(), use, At(now_), taken_)) {
    Release(from->second, t.sources, LeaseKind::kTransfer);
    return;
  }
  for (const PoolCore::Taken& taken : taken_) t.targets.push_back(taken.ref);
  const auto bytes = static_cast<double>(t.keys.size() * profile_.layout.block_bytes());
  NewTransfer(std::move(t), bytes);
}

// --- engines ---

void Simulation::ToEngine(Live& l, uint64_t id, uint32_t w) {
  const uint32_t reusable = (l.prompt_tokens - 1) / block_tokens_;
  const uint32_t cached = std::min(l.published, reusable) * block_tokens_;
  workers_[w].engine->AddPrefill(id, cached, l.prompt_tokens - cached, OwnerOf(l), now_);
  Touch(w);
}

void Simulation::EngineEnded(uint32_t w) {
  SimWorker& worker = workers_[w];
  outcome_.prefilled.clear();
  outcome_.finished.clear();
  worker.engine->End(outcome_);
  worker.engine_event = SimEngine::kIdle;
  if (worker.decodes.size() < kSamplesPerReportMax) {
    const DecodeSample sample = worker.engine->last_decode();
    if (sample.batch > 0) worker.decodes.push_back(sample);
  }
  const auto prefilled = std::exchange(outcome_.prefilled, {});
  const auto finished = std::exchange(outcome_.finished, {});
  for (const SimEngine::Prefilled& p : prefilled) Prefilled(w, p);
  for (const uint64_t id : finished) {
    if (Live* l = Find(id)) Complete(*l);
  }
  Touch(w);
}

void Simulation::Prefilled(uint32_t w, const SimEngine::Prefilled& p) {
  SimWorker& worker = workers_[w];
  worker.prefills.push_back(p.sample);
  Live* l = Find(p.id);
  if (l == nullptr) {
    worker.engine->Remove(p.id);
    return;
  }
  const SimRequest& r = RequestOf(*l);
  result_.prefilled_tokens += l->prompt_tokens;
  result_.cached_tokens += p.sample.cached_tokens;
  result_.fetched_tokens += std::min<uint64_t>(uint64_t{l->fetched} * block_tokens_, p.sample.cached_tokens);
  result_.prefill_seconds += p.sample.seconds;
  auto& service = result_.service[r.tenant];
  const auto second = static_cast<size_t>(now_ / kSimSecond);
  if (service.size() <= second) service.resize(second + 1);
  service[second] += static_cast<float>(p.sample.new_tokens) + 2 * static_cast<float>(r.output_tokens);
  workload_.Keys(r, l->prompt_tokens, block_tokens_, keys_);
  Publish(w, r, l->local() ? l->at_decode : l->at_prefill, keys_, l->published);
  if (core_ != nullptr && !core_->AdmitDecode(absl::StrCat("r", l->request), At(now_))) {
    worker.engine->Remove(p.id);
    ++result_.prefills_wasted;
    return Reject(*l, "at_decode");
  }
  l->computed = true;
  if (l->local()) {
    FirstToken(*l);
    const uint32_t left = r.output_tokens - l->emitted;
    if (left > 0) {
      l->decoding = true;
      return worker.engine->Decode(p.id, left, now_);
    }
    worker.engine->Remove(p.id);
    return Complete(*l);
  }
  worker.engine->Remove(p.id);
  if (l->handed_over) Push(now_ + FromSeconds(profile_.link_latency_seconds), EventKind::kHandedOver, p.id);
}

void Simulation::FirstToken(Live& l) {
  if (l.first_token < 0) l.first_token = now_;
  ++l.emitted;
  SimWorker& decode = workers_[l.decode];
  decode.prefilled.push_back(absl::StrCat("r", l.request));
  Report(l.decode);  // at once: bookings end with it
}

void Simulation::HandedOver(Live& l, uint64_t id) {
  const SimRequest& r = RequestOf(l);
  workload_.Keys(r, l.prompt_tokens, block_tokens_, keys_);
  Publish(l.decode, r, l.at_decode, keys_, l.decode_published);
  if (workers_[l.prefill].boot == l.prefill_boot) Release(l.prefill, l.at_prefill, LeaseKind::kSequence);
  l.at_prefill.clear();
  FirstToken(l);
  const uint32_t left = r.output_tokens - l.emitted;
  if (left == 0) return Complete(l);
  l.decoding = true;
  workers_[l.decode].engine->AddDecode(id, l.prompt_tokens, left, OwnerOf(l), now_);
  Touch(l.decode);
}

// --- reports and faults ---

void Simulation::Report(uint32_t w) {
  SimWorker& worker = workers_[w];
  if (!worker.up) return;
  if (worker.next_role && worker.told && MayChange(w)) {
    worker.role = *std::exchange(worker.next_role, std::nullopt);
    worker.told = false;
    ++result_.role_changes;
  }
  uint32_t slot = static_cast<uint32_t>(mail_.size());
  if (free_mail_.empty()) {
    mail_.emplace_back();
  } else {
    slot = free_mail_.back();
    free_mail_.pop_back();
  }
  Mail& mail = mail_[slot];
  mail.worker = w;
  mail.boot = worker.boot;
  WorkerReport& r = mail.report;
  r = WorkerReport();
  r.address.worker_id = worker.id;
  r.address.boot_id = std::to_string(worker.boot);
  r.address.grpc = worker.id;
  r.role = worker.role;
  r.next_role = worker.next_role;
  r.draining = worker.next_role.has_value();
  r.model = model_;
  r.seq = ++worker.seq;
  r.snapshot = std::exchange(worker.snapshot, false);
  PoolCore& pool = *worker.pool;
  if (r.snapshot) {
    for (uint32_t s = 0; s < pool.slots(); ++s) {
      if (const auto view = pool.View(s)) r.events.push_back({view->info->key, false, Tier::kHost});
    }
  } else {
    r.events.reserve(pool.events().size());
    for (const PoolEvent& e : pool.events())
      r.events.push_back({e.key, e.kind == PoolEventKind::kRemoved, Tier::kHost});
  }
  pool.events().clear();
  const PoolCore::Counts counts = pool.counts();
  const SimEngine& engine = *worker.engine;
  r.load = {.running = engine.running(),
            .waiting = engine.waiting() + worker.slots_waiting,
            .queued_prefill_tokens = engine.queued_prefill_tokens(),
            .running_context_tokens = engine.context_tokens(now_),
            .slots_total = pool.slots(),
            .slots_free = counts.free + counts.evictable};
  r.tiers.push_back({.tier = Tier::kHost,
                     .blocks = counts.published,
                     .bytes_used = (pool.slots() - counts.free) * profile_.layout.block_bytes(),
                     .bytes_total = pool.slots() * profile_.layout.block_bytes()});
  if (worker.decodes.size() < kSamplesPerReportMax) {
    if (const DecodeSample sample = engine.Sample(now_); sample.batch > 0) worker.decodes.push_back(sample);
  }
  r.prefills.swap(worker.prefills);
  r.decodes.swap(worker.decodes);
  r.fetches.swap(worker.fetches);
  r.prefilled.swap(worker.prefilled);
  ++result_.reports;
  SimTime delay = control_;
  if (o_.faults.report_delay_seconds > 0)
    delay += FromSeconds(o_.faults.report_delay_seconds * fault_rng_.Uniform());
  if (o_.faults.report_loss > 0 && fault_rng_.Chance(o_.faults.report_loss)) {
    // The call failed: what it carried is not repeated, the next one starts the view afresh.
    ++result_.reports_lost;
    worker.snapshot = true;
    free_mail_.push_back(slot);
    return;
  }
  Push(now_ + delay, EventKind::kReport, slot);
}

void Simulation::Deliver(uint32_t slot) {
  Mail& mail = mail_[slot];
  SimWorker& worker = workers_[mail.worker];
  const bool same = worker.up && worker.boot == mail.boot;
  if (core_ == nullptr) {
    if (same) worker.snapshot = true;
  } else {
    const bool changes = mail.report.next_role.has_value();
    const ReportResult reply = core_->Report(std::move(mail.report), At(now_));
    if (same && changes && reply.status.ok()) worker.told = true;
    if (same && (reply.resync || !reply.status.ok())) worker.snapshot = true;
  }
  free_mail_.push_back(slot);
}

void Simulation::Crash(uint32_t w) {
  SimWorker& worker = workers_[w];
  ++result_.crashes;
  worker.up = false;
  // What the client has of those that decode here: asked before the engine is gone.
  std::vector<uint64_t> lost;
  for (uint32_t slot = 0; slot < live_.size(); ++slot) {
    Live& l = live_[slot];
    if (!l.used) continue;
    const bool decodes = l.decode == w && l.decode_boot == worker.boot;
    const bool prefills = l.prefill == w && l.prefill_boot == worker.boot && !l.decoding;
    if (decodes || prefills) lost.push_back(IdOf(slot));
  }
  std::vector<uint64_t> cut;
  links_.Cut(w, now_, cut);
  for (const uint64_t id : lost) {
    if (Live* l = Find(id)) Fail(*l, w);
  }
  for (const uint64_t id : cut) Cut(id);
  for (auto& queue : worker.slot_queue) queue.clear();
  worker.slots_waiting = 0;
  worker.prompt_tokens_waiting = 0;
  worker.prefilled.clear();
  worker.decodes.clear();
  worker.fetches.clear();
  ++worker.boot;
  ++worker.engine_version;
  worker.engine_event = SimEngine::kIdle;
  Push(now_ + FromSeconds(o_.faults.worker_down_seconds), EventKind::kBoot, w);
}

void Simulation::Sample() {
  LoadSample s{.at = static_cast<float>(ToSeconds(now_))};
  uint32_t prefills = 0, decodes = 0;
  double queued = 0, step = 0;
  for (const SimWorker& w : workers_) {
    if (!w.up) continue;
    if (CanPrefill(w.role)) {
      ++prefills;
      queued += static_cast<double>(w.engine->queued_prefill_tokens() + w.prompt_tokens_waiting) *
                profile_.token_seconds;
    }
    if (CanDecode(w.role)) {
      ++decodes;
      step += w.engine->StepSeconds(now_);
      s.decoding += w.engine->decoding();
    }
    s.queued += w.engine->waiting() + w.slots_waiting;
  }
  if (prefills > 0 && result_.slo_ttft_seconds > 0)
    s.prefill_load = static_cast<float>(queued / prefills / result_.slo_ttft_seconds);
  if (decodes > 0 && result_.slo_itl_seconds > 0)
    s.decode_load = static_cast<float>(step / decodes / result_.slo_itl_seconds);
  result_.load.push_back(s);
}

// --- roles ---

void Simulation::Weigh() {
  if (core_ == nullptr) return;
  const ElasticityAdvice advice = elastic_->Tick(core_->Elasticity(At(now_)), At(now_));
  if (o_.elasticity != ElasticityMode::kAct || advice.worker.empty()) return;
  Push(now_ + control_, EventKind::kSetRole, worker_of_.at(advice.worker),
       static_cast<uint32_t>(advice.role));
  elastic_->OnOrdered(advice.worker, /*taken=*/true, At(now_));
}

bool Simulation::MayChange(uint32_t w) const {
  const bool decodes = CanDecode(workers_[w].role);
  return std::none_of(live_.begin(), live_.end(), [&](const Live& l) {
    return l.used && l.placed && (decodes ? l.decode == w : l.prefill == w && !l.decoding);
  });
}

void Simulation::Handle(const Event& e) {
  const auto live = [&] { return Find(e.subject); };
  switch (e.kind) {
    case EventKind::kPlace:
      if (live() != nullptr) Place(static_cast<uint32_t>(e.subject));
      break;
    case EventKind::kAtDecode:
      if (Live* l = live()) AtDecode(*l, e.subject);
      break;
    case EventKind::kAtPrefill:
      if (Live* l = live()) AtPrefill(*l, e.subject);
      break;
    case EventKind::kEngine: {
      const auto w = static_cast<uint32_t>(e.subject);
      if (workers_[w].up && workers_[w].engine_version == e.version) EngineEnded(w);
      break;
    }
    case EventKind::kLanded:
      Landed(e.subject);
      break;
    case EventKind::kHandedOver:
      if (Live* l = live()) HandedOver(*l, e.subject);
      break;
    case EventKind::kReport:
      Deliver(static_cast<uint32_t>(e.subject));
      break;
    case EventKind::kCrash: {
      const auto w = static_cast<uint32_t>(fault_rng_.Below(workers_.size()));
      if (workers_[w].up) Crash(w);
      Push(now_ + Exponential(o_.faults.worker_crash_every_seconds), EventKind::kCrash, 0);
      break;
    }
    case EventKind::kBoot:
      StartWorker(static_cast<uint32_t>(e.subject));
      break;
    case EventKind::kSchedulerDown:
      ++result_.scheduler_restarts;
      core_.reset();
      Push(now_ + FromSeconds(o_.faults.scheduler_down_seconds), EventKind::kSchedulerUp, 0);
      break;
    case EventKind::kSetRole: {
      SimWorker& worker = workers_[e.subject];
      if (!worker.up || worker.next_role) break;
      worker.next_role = static_cast<Role>(e.version);
      Report(static_cast<uint32_t>(e.subject));
      break;
    }
    case EventKind::kSchedulerUp:
      NewCore();
      Push(now_ + Exponential(o_.faults.scheduler_crash_every_seconds), EventKind::kSchedulerDown, 0);
      break;
  }
}

SimResult Simulation::Run(const SimProgress& progress) {
  const auto began = std::chrono::steady_clock::now();
  const SimTime tick_every =
      std::max<SimTime>(kSimSecond / 100, absl::ToInt64Nanoseconds(o_.scheduler.worker_timeout) / 4);
  next_tick_ = tick_every;
  const auto n = static_cast<uint64_t>(workers_.size());
  report_base_ = report_interval_;
  if (o_.elasticity != ElasticityMode::kOff) next_weigh_ = kWeighEvery;
  const auto report_at = [&] {
    return report_base_ + static_cast<SimTime>(next_report_ / n) * report_interval_ +
           static_cast<SimTime>(next_report_ % n) * report_interval_ / static_cast<SimTime>(n);
  };
  Settle();
  while (!Over()) {
    ++result_.events;
    if (progress && result_.events % kProgressEvery == 0)
      progress(static_cast<double>(ended_) / static_cast<double>(workload_.requests.size()));
    const SimTime at_event = events_.empty() ? kNever : events_.top().at;
    const SimTime at_link = links_.next();
    const SimTime at_arrival = next_arrival_ < workload_.requests.size() ? ArrivesAt(next_arrival_) : kNever;
    const SimTime at_report = report_at();
    now_ = std::min(
        {at_event, at_link, at_arrival, at_report, next_tick_, next_replicate_, next_sample_, next_weigh_});
    if (now_ == at_event) {
      const Event e = events_.top();
      events_.pop();
      Handle(e);
    } else if (now_ == at_link) {
      Push(now_ + FromSeconds(profile_.link_latency_seconds), EventKind::kLanded, links_.Pop());
    } else if (now_ == at_arrival) {
      Arrive(static_cast<uint32_t>(next_arrival_++));
    } else if (now_ == at_report) {
      Report(static_cast<uint32_t>(next_report_++ % n));
    } else if (now_ == next_tick_) {
      if (core_ != nullptr) core_->Tick(At(now_));
      next_tick_ += tick_every;
    } else if (now_ == next_replicate_) {
      if (core_ != nullptr && o_.replication.copies > 1) {
        for (const CopyOrder& order : core_->Replicate(At(now_))) Copy(order);
      }
      next_replicate_ += kReplicateEvery;
    } else if (now_ == next_weigh_) {
      Weigh();
      next_weigh_ += kWeighEvery;
    } else {
      Sample();
      next_sample_ = now_ + sample_every_;
    }
    Settle();
  }
  // What is still on its way lands, so that nothing that is held at the end is held for a reason.
  while (links_.running() > 0) {
    now_ = links_.next();
    Landed(links_.Pop());
  }
  while (!events_.empty()) {
    const Event e = events_.top();
    events_.pop();
    if (e.kind == EventKind::kLanded) Landed(e.subject);
  }
  for (const SimWorker& w : workers_) {
    if (w.up) result_.slots_leaked += w.pool->counts().leased;
    result_.prefill_at_end += w.role == Role::kPrefill ? 1 : 0;
    result_.decode_at_end += w.role == Role::kDecode ? 1 : 0;
  }
  if (core_ != nullptr) result_.bookings_left = core_->inflight();
  result_.wall_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  if (progress) progress(1);
  return std::move(result_);
}

}  // namespace

absl::StatusOr<SimResult> Simulate(const SimOptions& options, const Workload& workload,
                                   const WorkerProfile& profile, const SimProgress& progress) {
  if (workload.requests.empty()) return absl::InvalidArgumentError("the workload holds no request");
  Simulation simulation(options, workload, profile);
  TP_RETURN_IF_ERROR(simulation.Prepare());
  return simulation.Run(progress);
}

}  // namespace tidepool
