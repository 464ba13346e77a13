#include "server/gateway/batches_service.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/small_file.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr int kPoolThreads = 2;
constexpr size_t kPoolQueueMax = 256;
// Batches under way at once, one of a tenant: the gate bounds their lines, and gives each its share. Each
// plans so many units of its prompts together that all plans stay below 256 MiB.
constexpr size_t kWorkersMax = 16;
constexpr size_t kWindowUnits = size_t{2} << 20;
// Beside them: batches that only have to be brought to their end, which takes no model.
constexpr size_t kEndersMax = 4;
// Of one tenant, ended ones included; more where the configuration allows more unfinished ones.
constexpr uint64_t kBatchesKept = 1000;
constexpr size_t kMessageBytesMax = 512;  // of an error in a record
constexpr size_t kErrorsMax = 50;
constexpr uint64_t kRecordBytesMax = 1 << 20;
constexpr absl::Duration kLoopEvery = absl::Milliseconds(200);
constexpr absl::Duration kOpenEvery = absl::Seconds(1);
constexpr absl::Duration kTryLater = absl::Seconds(10);
constexpr absl::Duration kSweepEvery = absl::Minutes(1);
constexpr std::string_view kPrefix = "batch_", kSuffix = ".json";

bool IsOff(const std::string& dir) { return dir.empty() || dir == "off"; }

// The first bytes of a message, whole characters.
void Clip(std::string& message) {
  if (message.size() <= kMessageBytesMax) return;
  size_t end = kMessageBytesMax;
  while (end > 0 && (message[end] & 0xC0) == 0x80) --end;
  message.resize(end);
}

// When nothing more was to happen to it.
int64_t EndedAt(const BatchRecord& r) {
  return std::max({r.created_at, r.completed_at, r.failed_at, r.expired_at, r.cancelled_at});
}

absl::Status NoSuchBatch(std::string_view id) {
  return absl::NotFoundError(absl::StrCat("No batch found with id '", std::string(id.substr(0, 64)), "'."));
}

AdmissionCore::Options AdmissionOptions(const GatewayConfig& config) {
  AdmissionCore::Options options;
  options.inflight_max = config.batch_max_inflight;
  return options;
}

}  // namespace

BatchesService::BatchesService(Dependencies deps)
    : deps_(std::move(deps)),
      gate_(AdmissionOptions(*deps_.config), deps_.load, *deps_.clock),
      pool_(kPoolThreads, kPoolQueueMax + deps_.config->max_connections),
      completed_(deps_.metrics->AddCounter("tidepool_batch_lines_total", "Lines of batches that have ended",
                                           {{"result", "completed"}})),
      failed_(deps_.metrics->AddCounter("tidepool_batch_lines_total", "Lines of batches that have ended",
                                        {{"result", "failed"}})),
      expired_(deps_.metrics->AddCounter("tidepool_batch_lines_total", "Lines of batches that have ended",
                                         {{"result", "expired"}})),
      retries_(deps_.metrics->AddCounter("tidepool_batch_retries_total",
                                         "Lines sent again after a refusal or failure")),
      given_back_(deps_.metrics->AddCounter("tidepool_batch_given_back_total",
                                            "Lines stopped for online requests, to run again")),
      prompt_bytes_(
          deps_.metrics->AddCounter("tidepool_batch_prompt_bytes_total", "Prompts of the lines planned")),
      shared_bytes_(deps_.metrics->AddCounter("tidepool_batch_prompt_shared_bytes_total",
                                              "Of them, what an earlier line of the plan computes")),
      inflight_(deps_.metrics->AddGauge("tidepool_batch_inflight", "Lines that run")),
      bytes_(deps_.metrics->AddGauge("tidepool_batch_stored_bytes",
                                     "Files of all tenants, uploads under way included")),
      unfinished_(deps_.metrics->AddGauge("tidepool_batch_unfinished", "Batches that have not ended")) {
  if (IsOff(deps_.config->batch_dir)) {
    why_not_ =
        "files and batches are off on this server; its operator turns them on by setting gateway.batch_dir "
        "to a "
        "directory";
  } else {
    why_not_ = "files and batches are not ready yet; try again";
  }
}

BatchesService::~BatchesService() { Stop(); }

void BatchesService::Start() {
  if (!IsOff(deps_.config->batch_dir)) thread_ = std::thread([this] { Loop(); });
}

void BatchesService::Stop() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
    why_not_ = "the gateway is shutting down; try again";
    open_ = false;
    for (auto& [tenant, entries] : batches_) {
      for (auto& [id, entry] : entries) {
        if (entry.run != nullptr) entry.run->Stop(BatchRun::StopKind::kPause);
      }
    }
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
  for (const auto& worker : workers_) worker->thread.join();
  workers_.clear();
  pool_.Stop();
}

bool BatchesService::Stopping() const {
  std::lock_guard lock(mu_);
  return stop_;
}

std::string BatchesService::WhyNot(bool& ever) const {
  ever = !IsOff(deps_.config->batch_dir);
  if (open_) return "";
  std::lock_guard lock(mu_);
  return why_not_;
}

bool BatchesService::Submit(std::function<void()> work) {
  if (submitted_.fetch_add(1) < kPoolQueueMax && pool_.TrySubmit([this, work = std::move(work)] {
        --submitted_;
        work();
      })) {
    return true;
  }
  --submitted_;
  return false;
}

void BatchesService::Replace(const TenantTable& tenants) {
  std::set<std::string> names;
  for (const ApiKeyConfig& key : tenants.keys) names.insert(key.tenant);
  if (tenants.keys.empty()) names.insert("default");  // as Authenticator
  std::lock_guard lock(mu_);
  tenants_ = std::move(names);
}

bool BatchesService::Serves(const std::string& tenant) const {
  return !tenants_ || tenants_->contains(tenant);
}

int64_t BatchesService::Now() const { return absl::ToUnixSeconds(absl::Now()); }

void BatchesService::Loop() {
  while (!Stopping()) {
    if (!open_) Open();
    if (open_) {
      Reap();
      StartNext();
      Sweep();
      Publish();
    }
    std::unique_lock lock(mu_);
    wake_.wait_for(lock, absl::ToChronoNanoseconds(kLoopEvery), [&] { return stop_; });
  }
}

void BatchesService::Open() {
  const absl::Time now = deps_.clock->Now();
  if (now < next_open_) return;
  next_open_ = now + kOpenEvery;
  const GatewayConfig& config = *deps_.config;
  auto files = FilesStore::Open(
      config.batch_dir, {config.batch_max_file_bytes, config.batch_max_tenant_bytes, config.batch_max_files});
  if (!files.ok()) {
    const std::string why =
        absl::IsFailedPrecondition(files.status())
            ? "the directory of files and batches is not this server's to use; its log says why"
            : "the directory of files and batches cannot be read; the server's log says why";
    std::lock_guard lock(mu_);
    if (std::exchange(why_not_, why) != why) {
      spdlog::warn("no files and batches for now: {}", std::string(files.status().message()));
    }
    return;
  }
  files_ = *std::move(files);
  LoadBatches();
  open_ = true;
}

void BatchesService::LoadBatches() {
  std::set<std::string> pending;
  for (const std::string& tenant : files_->Tenants()) {
    const auto dir = files_->TenantDirectory(tenant);
    if (!dir.ok()) continue;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(*dir, error)) {
      const std::string name = entry.path().filename().string();
      if (name.starts_with(kPrefix) && name.ends_with(kSuffix))
        LoadBatch(tenant, entry.path().string(), pending);
    }
  }
  files_->RemoveOrphans(pending);
}

void BatchesService::LoadBatch(const std::string& tenant, const std::string& path,
                               std::set<std::string>& pending) {
  absl::StatusOr<BatchRecord> record;
  if (const auto text = ReadSmallFile(path, kRecordBytesMax); text.ok()) {
    record = ParseBatch(*text);
  } else {
    record = text.status();
  }
  if (record.ok() && !path.ends_with(absl::StrCat("/", record->id, std::string(kSuffix)))) {
    record = absl::DataLossError("names another batch");
  }
  if (!record.ok()) {
    spdlog::error("{}: {}", path, std::string(record.status().message()));
    return;
  }
  if (!IsTerminal(record->status)) {
    spdlog::info("{}: going on ({})", record->id, BatchStatusName(record->status));
    if (const auto status = files_->Pin(tenant, record->input_file_id); !status.ok()) {
      spdlog::error("{}: {}", record->id, std::string(status.message()));
    }
    if (!record->output_id.empty()) pending.insert(files_->PendingPath(tenant, record->output_id));
    if (!record->error_id.empty()) pending.insert(files_->PendingPath(tenant, record->error_id));
  }
  std::lock_guard lock(mu_);
  const std::string id = record->id;
  batches_[tenant][id].record = *std::move(record);
}

void BatchesService::Reap() {
  std::erase_if(workers_, [&](const std::unique_ptr<Worker>& worker) {
    if (!worker->done) return false;
    worker->thread.join();
    std::lock_guard lock(mu_);
    batches_[worker->tenant][worker->id].running = false;
    return true;
  });
}

void BatchesService::StartNext() {
  std::lock_guard lock(mu_);
  const absl::Time now = deps_.clock->Now();
  const int64_t unix_now = Now();
  const auto waits = [&](const Entry& entry) {
    return !entry.running && !IsTerminal(entry.record.status) && now >= entry.not_before;
  };
  // Cancelled and expired ones end now, whoever runs.
  for (auto& [name, entries] : batches_) {
    for (auto& [id, entry] : entries) {
      if (stop_ || workers_.size() >= kWorkersMax + kEndersMax) break;
      const bool over =
          entry.record.status == BatchStatus::kCancelling || unix_now >= entry.record.expires_at;
      if (over && waits(entry)) StartWorker(name, entry);
    }
  }
  while (workers_.size() < kWorkersMax && !stop_) {
    const std::string* tenant = nullptr;
    Entry* next = nullptr;
    for (auto& [name, entries] : batches_) {
      if (!Serves(name) || std::ranges::any_of(entries, [](const auto& e) { return e.second.running; })) {
        continue;
      }
      if (next != nullptr && turns_[name] > turns_[*tenant]) continue;
      Entry* oldest = nullptr;
      for (auto& [id, entry] : entries) {
        if (waits(entry) &&
            (oldest == nullptr || std::tie(entry.record.created_ns, id) <
                                      std::tie(oldest->record.created_ns, oldest->record.id))) {
          oldest = &entry;
        }
      }
      if (oldest == nullptr) continue;
      if (next != nullptr && turns_[name] == turns_[*tenant] &&
          oldest->record.created_ns >= next->record.created_ns) {
        continue;
      }
      next = oldest;
      tenant = &name;
    }
    if (next == nullptr) return;
    turns_[*tenant] = ++turn_;
    StartWorker(*tenant, *next);
  }
}

void BatchesService::StartWorker(const std::string& tenant, Entry& entry) {
  entry.running = true;
  auto worker = std::make_unique<Worker>();
  worker->tenant = tenant;
  worker->id = entry.record.id;
  worker->thread = std::thread([this, w = worker.get()] {
    Execute(w->tenant, w->id);
    w->done = true;
    wake_.notify_all();
  });
  workers_.push_back(std::move(worker));
}

void BatchesService::Sweep() {
  const absl::Time now = deps_.clock->Now();
  if (now < next_sweep_) return;
  next_sweep_ = now + kSweepEvery;
  files_->Sweep(absl::Now());
  // Records of batches live as long as files do.
  const int64_t before = Now() - absl::ToInt64Seconds(file_ttl());
  std::lock_guard lock(mu_);
  for (auto& [tenant, entries] : batches_) {
    for (auto it = entries.begin(); it != entries.end();) {
      const BatchRecord& record = it->second.record;
      if (IsTerminal(record.status) && !it->second.running && EndedAt(record) < before) {
        ::unlink(PathOf(tenant, record.id).c_str());
        it = entries.erase(it);
      } else {
        ++it;
      }
    }
  }
}

void BatchesService::Publish() {
  inflight_.Set(static_cast<double>(gate_.running()));
  bytes_.Set(static_cast<double>(files_->bytes()));
  std::lock_guard lock(mu_);
  size_t unfinished = 0;
  for (const auto& [tenant, entries] : batches_) {
    unfinished += static_cast<size_t>(
        std::ranges::count_if(entries, [](const auto& e) { return !IsTerminal(e.second.record.status); }));
  }
  unfinished_.Set(static_cast<double>(unfinished));
}

std::string BatchesService::PathOf(const std::string& tenant, const std::string& id) const {
  // Beside the tenant's files.
  const std::string path = files_->PendingPath(tenant, id);
  return absl::StrCat(path.substr(0, path.rfind('/') + 1), id, std::string(kSuffix));
}

absl::Status BatchesService::Persist(const std::string& tenant, const BatchRecord& record) {
  return WriteFileAtomically(PathOf(tenant, record.id), SerialiseBatch(record));
}

BatchRecord BatchesService::RecordOf(const std::string& tenant, const std::string& id) const {
  std::lock_guard lock(mu_);
  return batches_.find(tenant)->second.find(id)->second.record;
}

BatchRecord BatchesService::Change(const std::string& tenant, const std::string& id,
                                   const std::function<void(BatchRecord&)>& change) {
  std::lock_guard lock(mu_);
  BatchRecord& record = batches_.find(tenant)->second.find(id)->second.record;
  Apply(tenant, record, change);
  return record;
}

void BatchesService::Apply(const std::string& tenant, BatchRecord& record,
                           const std::function<void(BatchRecord&)>& change) {
  const BatchStatus before = record.status;
  change(record);
  if (const absl::Status status = Persist(tenant, record); !status.ok()) {
    spdlog::error("{}: {}", record.id, std::string(status.message()));
  }
  if (record.status != before) spdlog::info("{}: {}", record.id, BatchStatusName(record.status));
}

absl::Status BatchesService::MakeRoom(const std::string& tenant, Entries& entries) {
  const uint64_t kept = std::max<uint64_t>(kBatchesKept, deps_.config->batch_max_batches);
  while (entries.size() >= kept) {
    auto oldest = entries.end();
    for (auto it = entries.begin(); it != entries.end(); ++it) {
      const Entry& entry = it->second;
      if (!IsTerminal(entry.record.status) || entry.running) continue;
      if (oldest == entries.end() || EndedAt(entry.record) < EndedAt(oldest->second.record)) oldest = it;
    }
    if (oldest == entries.end()) {
      return absl::AbortedError(
          absl::StrCat("there are ", entries.size(), " batches, and no more than ", kept, " are kept; wait"));
    }
    ::unlink(PathOf(tenant, oldest->first).c_str());
    entries.erase(oldest);
  }
  return absl::OkStatus();
}

absl::StatusOr<BatchRecord> BatchesService::Create(const std::string& tenant, NewBatch batch) {
  TP_ASSIGN_OR_RETURN(const StoredFile input, files_->Get(tenant, batch.input_file_id));
  if (input.purpose != "batch") {
    return absl::InvalidArgumentError("input_file_id: the file's purpose must be batch");
  }
  TP_RETURN_IF_ERROR(files_->TenantDirectory(tenant).status());
  const uint64_t stored = files_->BytesOf(tenant), bytes_max = deps_.config->batch_max_tenant_bytes;
  if (stored >= bytes_max) {
    return absl::FailedPreconditionError(absl::StrCat("all files together are ", stored,
                                                      " bytes, and no more than ", bytes_max,
                                                      " may be: there is no room for results; delete some"));
  }
  BatchRecord record;
  record.id = absl::StrCat(std::string(kPrefix), RandomHexId());
  record.endpoint = std::move(batch.endpoint);
  record.input_file_id = std::move(batch.input_file_id);
  record.metadata = std::move(batch.metadata);
  record.output_ttl_seconds = batch.output_ttl_seconds;
  record.created_ns = absl::ToUnixNanos(absl::Now());
  record.created_at = record.created_ns / 1'000'000'000;
  record.expires_at = record.created_at + absl::ToInt64Seconds(deps_.completion_window);
  {
    std::lock_guard lock(mu_);
    Entries& entries = batches_[tenant];
    const auto unfinished =
        std::ranges::count_if(entries, [](const auto& e) { return !IsTerminal(e.second.record.status); });
    if (static_cast<uint64_t>(unfinished) >= deps_.config->batch_max_batches) {
      return absl::AbortedError(absl::StrCat(unfinished, " batches are unfinished, and no more than ",
                                             deps_.config->batch_max_batches,
                                             " may be; wait for one, or cancel one"));
    }
    TP_RETURN_IF_ERROR(MakeRoom(tenant, entries));
    TP_RETURN_IF_ERROR(files_->Pin(tenant, record.input_file_id));
    if (const absl::Status status = Persist(tenant, record); !status.ok()) {
      files_->Unpin(tenant, record.input_file_id);
      return status;
    }
    entries[record.id].record = record;
  }
  wake_.notify_all();
  return record;
}

absl::StatusOr<BatchRecord> BatchesService::Get(const std::string& tenant, const std::string& id) const {
  std::lock_guard lock(mu_);
  const auto entries = batches_.find(tenant);
  if (entries == batches_.end()) return NoSuchBatch(id);
  const auto it = entries->second.find(id);
  if (it == entries->second.end()) return NoSuchBatch(id);
  return it->second.record;
}

std::vector<BatchRecord> BatchesService::List(const std::string& tenant) const {
  std::vector<BatchRecord> out;
  {
    std::lock_guard lock(mu_);
    const auto entries = batches_.find(tenant);
    if (entries == batches_.end()) return out;
    for (const auto& [id, entry] : entries->second) out.push_back(entry.record);
  }
  std::ranges::sort(out, [](const BatchRecord& a, const BatchRecord& b) {
    return std::tie(a.created_ns, a.id) > std::tie(b.created_ns, b.id);
  });
  return out;
}

absl::StatusOr<BatchRecord> BatchesService::Cancel(const std::string& tenant, const std::string& id) {
  BatchRecord after;
  {
    std::lock_guard lock(mu_);
    const auto entries = batches_.find(tenant);
    if (entries == batches_.end()) return NoSuchBatch(id);
    const auto it = entries->second.find(id);
    if (it == entries->second.end()) return NoSuchBatch(id);
    Entry& entry = it->second;
    const BatchStatus now = entry.record.status;
    if (now == BatchStatus::kCancelling) return entry.record;
    if (IsTerminal(now) || now == BatchStatus::kFinalizing) {
      return absl::FailedPreconditionError(
          absl::StrCat("a batch that is ", std::string(BatchStatusName(now)), " cannot be cancelled"));
    }
    Apply(tenant, entry.record, [&](BatchRecord& record) {
      record.status = BatchStatus::kCancelling;
      record.cancelling_at = Now();
    });
    if (entry.run != nullptr) entry.run->Stop(BatchRun::StopKind::kCancel);
    after = entry.record;
  }
  wake_.notify_all();
  return after;
}

absl::StatusOr<InputIndex> BatchesService::Validate(const std::string& tenant, const BatchRecord& record,
                                                    std::vector<BatchError>& errors) {
  TP_ASSIGN_OR_RETURN(const std::string path, files_->PathOf(tenant, record.input_file_id));
  InputIndex::Options options;
  options.lines_max = deps_.config->batch_max_lines;
  options.line_bytes_max = deps_.config->max_body_bytes;
  options.progress = [this](uint64_t) { return !Stopping(); };
  options.on_line = [&](const InputLine& place, const BatchLine& line) {
    if (line.error) {
      errors.push_back(*line.error);
    } else if (line.url != record.endpoint) {
      errors.push_back({"mismatched_url",
                        absl::StrCat("url: must be the batch's endpoint, ", record.endpoint), "url",
                        place.number});
    }
    return errors.size() < kErrorsMax;
  };
  auto index = InputIndex::Build(path, options);
  if (absl::IsInvalidArgument(index.status())) {
    // The only one that is the client's: paths are not for it.
    errors.push_back({"too_many_lines",
                      absl::StrCat("the file has more than ", options.lines_max, " lines; split it"),
                      "input_file_id", 0});
  }
  TP_RETURN_IF_ERROR(index.status());
  if (index->lines().empty() && errors.empty()) {
    errors.push_back({"empty_file", "the file holds no requests", "input_file_id", 0});
  }
  for (const auto& [number, first] : index->Duplicates(kErrorsMax)) {
    if (errors.size() >= kErrorsMax) break;
    errors.push_back({"duplicate_custom_id", absl::StrCat("custom_id: is line ", first, "'s already"),
                      "custom_id", number});
  }
  return index;
}

void BatchesService::Execute(const std::string& tenant, const std::string& id) {
  BatchRecord record = RecordOf(tenant, id);
  if (record.status == BatchStatus::kCancelling) return ConcludeAsFound(tenant, id, BatchStatus::kCancelled);
  std::vector<BatchError> errors;
  auto index = Validate(tenant, record, errors);
  if (Stopping()) return;
  if (!index.ok() && errors.empty()) {
    spdlog::error("{}: {}", id, std::string(index.status().message()));
    errors.push_back(
        {absl::IsNotFound(index.status()) ? "file_not_found" : "storage_error",
         absl::IsNotFound(index.status()) ? "the input file is gone" : "the input file cannot be read",
         "input_file_id", 0});
  }
  if (!errors.empty()) {
    for (BatchError& error : errors) Clip(error.message);
    Change(tenant, id, [&](BatchRecord& r) { r.errors = errors; });
    return ConcludeAsFound(tenant, id, BatchStatus::kFailed);
  }
  record = Change(tenant, id, [&](BatchRecord& r) {
    r.total = index->lines().size();
    if (r.status != BatchStatus::kValidating) return;
    r.status = BatchStatus::kInProgress;
    r.in_progress_at = Now();
    r.output_id = FilesStore::NewId();
    r.error_id = FilesStore::NewId();
  });
  if (record.status == BatchStatus::kCancelling) return ConcludeAsFound(tenant, id, BatchStatus::kCancelled);
  const auto end = RunLines(tenant, record, *index);
  if (absl::IsOutOfRange(end.status())) {
    Change(tenant, id, [&](BatchRecord& r) {
      r.errors = {{"storage_limit_reached", std::string(end.status().message()), "", 0}};
    });
    return Conclude(tenant, id, BatchStatus::kFailed);
  }
  if (!end.ok()) {
    // A full disk may have room again; files that are not what they were stay that way.
    if (!absl::IsDataLoss(end.status()) && !absl::IsInvalidArgument(end.status())) {
      return TryLater(tenant, id, end.status());
    }
    spdlog::error("{}: {}", id, std::string(end.status().message()));
    Change(tenant, id, [&](BatchRecord& r) {
      r.errors = {{"storage_error", "the batch's files are damaged", "", 0}};
    });
    return ConcludeAsFound(tenant, id, BatchStatus::kFailed);
  }
  switch (*end) {
    case BatchRun::End::kPaused:
      return;  // goes on after the restart
    case BatchRun::End::kComplete:
      Change(tenant, id, [&](BatchRecord& r) {
        if (r.status == BatchStatus::kCancelling) return;  // too late, and still what was asked for
        r.status = BatchStatus::kFinalizing;
        r.finalizing_at = Now();
      });
      return Conclude(tenant, id,
                      RecordOf(tenant, id).status == BatchStatus::kCancelling ? BatchStatus::kCancelled
                                                                              : BatchStatus::kCompleted);
    case BatchRun::End::kCancelled:
      return Conclude(tenant, id, BatchStatus::kCancelled);
    case BatchRun::End::kExpired:
      // Every line had its answer in time where only a restart came between.
      return Conclude(
          tenant, id,
          record.status == BatchStatus::kFinalizing ? BatchStatus::kCompleted : BatchStatus::kExpired);
  }
}

void BatchesService::Count(const BatchCounts& now, BatchCounts& before) {
  completed_.Add(now.completed - before.completed);
  expired_.Add(now.expired - before.expired);
  failed_.Add((now.failed - now.expired) - (before.failed - before.expired));
  retries_.Add(now.retries - before.retries);
  given_back_.Add(now.given_back - before.given_back);
  prompt_bytes_.Add((now.prompt_units - before.prompt_units) * kPathUnitBytes);
  shared_bytes_.Add((now.prompt_units_shared - before.prompt_units_shared) * kPathUnitBytes);
  before = now;
}

absl::StatusOr<BatchRun::End> BatchesService::RunLines(const std::string& tenant, const BatchRecord& record,
                                                       const InputIndex& index) {
  BatchRun::Options options;
  TP_ASSIGN_OR_RETURN(const auto answers,
                      OpenOutput(files_->PendingPath(tenant, record.output_id), index, options.done));
  TP_ASSIGN_OR_RETURN(const auto failures,
                      OpenOutput(files_->PendingPath(tenant, record.error_id), index, options.done));
  const auto transport = deps_.transport(tenant);
  BatchCounts counted;
  counted.completed = options.done.completed;
  counted.failed = options.done.failed;
  options.index = &index;
  options.answers = answers.get();
  options.failures = failures.get();
  options.transport = transport.get();
  options.gate = &gate_;
  options.clock = deps_.clock;
  options.retry.patience = absl::InfiniteDuration();  // the completion window ends it
  options.lookahead = std::max<size_t>(256, size_t{4} * deps_.config->batch_max_inflight);
  options.window_units = kWindowUnits;
  const uint64_t bytes_max = deps_.config->batch_max_tenant_bytes;
  bool full = false;
  BatchRun* running = nullptr;
  options.on_tick = [&](const BatchCounts& counts) {
    Count(counts, counted);
    const bool over = files_->BytesOf(tenant) + answers->bytes() + failures->bytes() > bytes_max;
    std::lock_guard lock(mu_);
    if (running != nullptr && over) {
      full = true;
      running->Stop(BatchRun::StopKind::kCancel);
    }
    if (running != nullptr && !Serves(tenant)) running->Stop(BatchRun::StopKind::kPause);
    BatchRecord& r = batches_.find(tenant)->second.find(record.id)->second.record;
    r.completed = counts.completed;
    r.failed = counts.failed;
    if (running != nullptr && Now() >= r.expires_at) running->Stop(BatchRun::StopKind::kExpire);
  };
  BatchRun run(std::move(options));
  running = &run;
  {
    std::lock_guard lock(mu_);
    Entry& entry = batches_.find(tenant)->second.find(record.id)->second;
    entry.run = &run;
    // Asked before there was a run to tell.
    if (stop_) run.Stop(BatchRun::StopKind::kPause);
    if (entry.record.status == BatchStatus::kCancelling) run.Stop(BatchRun::StopKind::kCancel);
    if (Now() >= record.expires_at) run.Stop(BatchRun::StopKind::kExpire);
  }
  const auto end = run.Run();
  const BatchCounts last = run.counts();
  std::lock_guard lock(mu_);
  Entry& entry = batches_.find(tenant)->second.find(record.id)->second;
  entry.run = nullptr;
  entry.record.completed = last.completed;
  entry.record.failed = last.failed;
  if (full && end.ok() && *end == BatchRun::End::kCancelled &&
      entry.record.status != BatchStatus::kCancelling) {
    return absl::OutOfRangeError(absl::StrCat("the results so far and all other files are more than ",
                                              bytes_max,
                                              " bytes; delete some, and run the other lines again"));
  }
  return end;
}

void BatchesService::TryLater(const std::string& tenant, const std::string& id, const absl::Status& why) {
  spdlog::error("{}: {}; going on in {}", id, std::string(why.message()), absl::FormatDuration(kTryLater));
  std::lock_guard lock(mu_);
  batches_.find(tenant)->second.find(id)->second.not_before = deps_.clock->Now() + kTryLater;
}

void BatchesService::ConcludeAsFound(const std::string& tenant, const std::string& id, BatchStatus status) {
  const BatchRecord record = RecordOf(tenant, id);
  for (const std::string& file_id : {record.output_id, record.error_id}) {
    if (file_id.empty()) continue;
    const std::string path = files_->PendingPath(tenant, file_id);
    if (::access(path.c_str(), F_OK) != 0 && errno == ENOENT) continue;
    const auto log = OutputLog::Open(
        path, [](const DoneLine&, const FileLine&) -> absl::Status { return absl::OkStatus(); });
    if (log.ok()) continue;
    if (!absl::IsInvalidArgument(log.status())) return TryLater(tenant, id, log.status());
    // Damaged, and stays so: its owner may still make something of it.
    spdlog::error("{}: {}", id, std::string(log.status().message()));
  }
  Conclude(tenant, id, status);
}

void BatchesService::Conclude(const std::string& tenant, const std::string& id, BatchStatus status) {
  const BatchRecord record = RecordOf(tenant, id);
  const absl::Duration ttl =
      record.output_ttl_seconds > 0 ? absl::Seconds(record.output_ttl_seconds) : file_ttl();
  absl::Status adopted;
  const auto adopt = [&](const std::string& file_id, const char* name) {
    if (file_id.empty()) return false;
    const std::string path = files_->PendingPath(tenant, file_id);
    std::error_code error;
    const auto bytes = std::filesystem::file_size(path, error);
    if (error == std::errc::no_such_file_or_directory) return false;
    if (error) {
      adopted = absl::UnavailableError(absl::StrCat(path, ": ", error.message()));
      return false;
    }
    if (bytes == 0) {
      ::unlink(path.c_str());
      return false;
    }
    const auto file = files_->Adopt(tenant, file_id, absl::StrCat(id, name), ttl);
    if (!file.ok()) adopted = file.status();
    return file.ok();
  };
  const bool output = adopt(record.output_id, "_output.jsonl"),
             error = adopt(record.error_id, "_error.jsonl");
  if (!adopted.ok()) return TryLater(tenant, id, adopted);
  // Whoever sees that it has ended may delete its input.
  std::lock_guard lock(mu_);
  Apply(tenant, batches_.find(tenant)->second.find(id)->second.record, [&](BatchRecord& r) {
    r.output_shown = output;
    r.error_shown = error;
    r.status = status;
    (status == BatchStatus::kCompleted   ? r.completed_at
     : status == BatchStatus::kFailed    ? r.failed_at
     : status == BatchStatus::kCancelled ? r.cancelled_at
                                         : r.expired_at) = Now();
  });
  files_->Unpin(tenant, record.input_file_id);
}

}  // namespace tidepool
