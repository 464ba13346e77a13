#include "server/batch/batch_run.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status.h"

namespace tidepool {
namespace {

// Answers on their way to a slow disk; beyond, nothing starts.
constexpr size_t kBacklogBytesMax = size_t{64} << 20;
// How often a run that waits for room asks again: online traffic comes and goes unannounced.
constexpr absl::Duration kPoll = absl::Milliseconds(50);
constexpr absl::Duration kGivenBackPause = absl::Milliseconds(500);
// A transport that does not end cancelled calls is left behind.
constexpr absl::Duration kDropTimeout = absl::Seconds(30);
constexpr size_t kStopCheckLines = 256;

BatchError FailureOf(const absl::Status& status) {
  const auto code = [&]() -> const char* {
    switch (status.code()) {
      case absl::StatusCode::kUnavailable:
        return "connection_failed";
      case absl::StatusCode::kDeadlineExceeded:
        return "request_timeout";
      case absl::StatusCode::kResourceExhausted:
        return "response_too_large";
      case absl::StatusCode::kDataLoss:
        return "bad_response";
      default:
        return "request_failed";
    }
  };
  return {code(), std::string(status.message()), "", 0};
}

}  // namespace

absl::StatusOr<std::unique_ptr<OutputLog>> OpenOutput(const std::string& path, const InputIndex& index,
                                                      DoneLines& done, std::vector<InputLine>* where) {
  done.done.resize(index.lines().size());
  if (where != nullptr) where->resize(index.lines().size());
  return OutputLog::Open(path, [&](const DoneLine& line, const FileLine& place) -> absl::Status {
    const int64_t at = index.Find(KeyOf(line.custom_id, line.line));
    const auto refuse = [&](const char* what) {
      return absl::InvalidArgumentError(absl::StrCat(
          path, ": line ", place.number, " answers a request that ", what, "; the file is not this batch's"));
    };
    if (at < 0) return refuse("the input does not have");
    const auto i = static_cast<size_t>(at);
    if (done.done[i]) return refuse("has an answer already");
    done.done[i] = true;
    ++(line.ok ? done.completed : done.failed);
    if (where != nullptr) {
      (*where)[i] = {place.offset, static_cast<uint32_t>(place.bytes), static_cast<uint32_t>(place.number)};
    }
    return absl::OkStatus();
  });
}

BatchRun::BatchRun(Options options)
    : options_(std::move(options)),
      core_({options_.lookahead, options_.gate_max}),
      done_(options_.done.done),
      id_(options_.gate->Join()),
      rng_(absl::ToUnixNanos(options_.clock->Now())),
      next_tick_(options_.clock->Now()) {
  done_.resize(options_.index->lines().size());
  counts_.lines = options_.index->lines().size();
  counts_.completed = options_.done.completed;
  counts_.failed = options_.done.failed;
  begun_with_ = counts_.left();
  published_ = counts_;
}

BatchRun::~BatchRun() { options_.gate->Leave(id_); }

void BatchRun::Stop(StopKind kind) {
  {
    std::lock_guard lock(inbox_->mu);
    if (!inbox_->stop) inbox_->stop = kind;
  }
  inbox_->wake.notify_all();
}

std::optional<BatchRun::StopKind> BatchRun::stop() const {
  std::lock_guard lock(inbox_->mu);
  return inbox_->stop;
}

BatchCounts BatchRun::counts() const {
  std::lock_guard lock(counts_mu_);
  return published_;
}

void BatchRun::Publish() {
  counts_.running = running_.size();
  {
    std::lock_guard lock(counts_mu_);
    published_ = counts_;
  }
  const absl::Time now = options_.clock->Now();
  if (!options_.on_tick || now < next_tick_) return;
  next_tick_ = now + options_.tick;
  options_.on_tick(counts_);
}

absl::Status BatchRun::FileStatus() const {
  TP_RETURN_IF_ERROR(options_.answers->status());
  return options_.failures->status();
}

absl::StatusOr<BatchRun::End> BatchRun::Run() {
  absl::Status status = Loop();
  DropRunning();
  const auto stopped = stop();
  // Found complete at its start it may have expired before a crash: then the caller knows.
  const bool answered_all = begun_with_ > 0 && counts_.left() == 0;
  if (status.ok() && stopped == StopKind::kExpire) status = ExpireRest();
  if (status.ok()) status = options_.answers->Flush();
  if (status.ok()) status = options_.failures->Flush();
  next_tick_ = absl::InfinitePast();  // the last word
  Publish();
  TP_RETURN_IF_ERROR(status);
  if (answered_all || (counts_.left() == 0 && stopped != StopKind::kExpire)) return End::kComplete;
  if (!stopped) return absl::InternalError("a batch ended with lines that were never run");
  return *stopped == StopKind::kPause    ? End::kPaused
         : *stopped == StopKind::kCancel ? End::kCancelled
                                         : End::kExpired;
}

absl::Status BatchRun::Loop() {
  while (counts_.left() > 0 && !stop()) {
    TP_RETURN_IF_ERROR(FileStatus());
    Yield();
    TP_RETURN_IF_ERROR(StartLines());
    Publish();
    WaitForEvents();
  }
  return absl::OkStatus();
}

absl::Status BatchRun::StartLines() {
  BatchGate& gate = *options_.gate;
  for (;;) {
    if (core_.waiting() < options_.lookahead) TP_RETURN_IF_ERROR(FillWindow());
    gate.SetHungry(id_, core_.waiting() > 0);
    if (stop() || core_.waiting() == 0) return absl::OkStatus();
    if (options_.answers->backlog_bytes() > kBacklogBytesMax) return absl::OkStatus();
    if (!gate.TryStart(id_)) return absl::OkStatus();
    const absl::Time now = options_.clock->Now();
    const auto line = core_.Next(now);
    if (!line) {
      gate.Ended(id_, now, nullptr);
      gate.SetHungry(id_, false);  // what waits, waits for lines of its own
      return absl::OkStatus();
    }
    TP_RETURN_IF_ERROR(Send(*line));
  }
}

absl::Status BatchRun::Send(uint32_t line) {
  const absl::Time now = options_.clock->Now();
  auto read = options_.index->Read(line);
  if (!read.ok() || read->error) {  // planned lines had no error: the file changed
    options_.gate->Ended(id_, now, nullptr);
    core_.Finished(line);
    return read.ok() ? absl::DataLossError("the input changed while the batch ran") : read.status();
  }
  Running& running = running_[line];
  running = {read->custom_id, now, false, nullptr};
  BatchTransport::Callbacks callbacks;
  const auto report = [inbox = inbox_](Event event) {
    {
      std::lock_guard lock(inbox->mu);
      inbox->events.push_back(std::move(event));
    }
    inbox->wake.notify_all();
  };
  callbacks.ahead = [report, line] { report({line, std::nullopt}); };
  callbacks.done = [report, line](BatchReply reply) { report({line, std::move(reply)}); };
  running.call = options_.transport->Send({read->url, DumpJson(read->body)}, std::move(callbacks));
  return absl::OkStatus();
}

absl::Status BatchRun::FillWindow() {
  const auto& lines = options_.index->lines();
  std::vector<PromptPath> paths;
  std::vector<uint32_t> numbers;
  size_t units = 0;
  for (; next_line_ < lines.size() && paths.size() < options_.window_lines && units < options_.window_units;
       ++next_line_) {
    if (next_line_ % kStopCheckLines == 0 && stop()) return absl::OkStatus();
    if (done_[next_line_]) continue;
    TP_ASSIGN_OR_RETURN(const BatchLine line, options_.index->Read(next_line_));
    if (line.error) {
      ++counts_.failed;
      done_[next_line_] = true;
      Write(false, FormatFailure(line.custom_id, *line.error));
      continue;
    }
    numbers.push_back(static_cast<uint32_t>(next_line_));
    paths.push_back(PathOf(line.url, line.body));
    units += paths.back().units.size();
  }
  if (paths.empty()) return absl::OkStatus();
  const PrefixPlan plan = options_.by_prefix ? PlanPrefixes(paths) : PlanInOrder(paths);
  counts_.prompt_units += plan.units;
  counts_.prompt_units_shared += plan.units - plan.units_computed;
  std::vector<DispatchCore::Line> order;
  order.reserve(plan.order.size());
  for (const PlannedPrompt& prompt : plan.order) order.push_back({numbers[prompt.item], prompt.after});
  core_.Add(order);
  spdlog::debug("planned {} lines in {} groups: {} of {} units of prompt are shared", plan.order.size(),
                plan.groups, plan.units - plan.units_computed, plan.units);
  return absl::OkStatus();
}

void BatchRun::Yield() {
  size_t count = options_.gate->GiveBack(id_);
  if (count == 0) return;
  // The youngest first: they lose least.
  std::vector<Running*> running;
  for (auto& [line, one] : running_) {
    if (!one.giving_back) running.push_back(&one);
  }
  std::ranges::sort(running, std::greater(), &Running::started);
  running.resize(std::min(running.size(), count));
  for (Running* one : running) {
    one->giving_back = true;
    one->call->Cancel();
  }
}

void BatchRun::WaitForEvents() {
  const absl::Time now = options_.clock->Now();
  // Room, the time to retry and that to wait no longer for a prefix come without an event of ours.
  const absl::Time wake = now + (core_.waiting() > 0 ? std::min(kPoll, options_.tick) : options_.tick);
  std::vector<Event> events;
  {
    std::unique_lock lock(inbox_->mu);
    const auto ready = [&] { return !inbox_->events.empty() || inbox_->stop.has_value(); };
    inbox_->wake.wait_for(lock, absl::ToChronoNanoseconds(std::max(wake - now, absl::Milliseconds(1))),
                          ready);
    events.swap(inbox_->events);
  }
  for (Event& event : events) Handle(std::move(event));
}

void BatchRun::Handle(Event event) {
  if (!event.reply) return core_.Ahead(event.line);
  const auto it = running_.find(event.line);
  TP_CHECK(it != running_.end());
  const Running running = std::move(it->second);
  running_.erase(it);
  BatchReply& reply = *event.reply;
  const absl::Time now = options_.clock->Now();
  if (absl::IsCancelled(reply.status)) {
    options_.gate->Ended(id_, running.started, nullptr);
    if (running.giving_back) ++counts_.given_back;
    return core_.Again(event.line, now + kGivenBackPause);
  }
  options_.gate->Ended(id_, running.started, &reply);
  const auto at = RetryAt(reply, options_.retry, rng_.Uniform(), now, retries_[event.line]);
  if (at) {
    ++counts_.retries;
    return core_.Again(event.line, *at);
  }
  Answered(event.line, running, std::move(reply));
}

void BatchRun::Answered(uint32_t line, const Running& running, BatchReply reply) {
  const bool ok = reply.status.ok() && reply.http_status / 100 == 2;
  ++(ok ? counts_.completed : counts_.failed);
  core_.Finished(line);
  done_[line] = true;
  retries_.erase(line);
  Write(ok, reply.status.ok()
                ? FormatAnswer(running.custom_id, reply.http_status, reply.request_id, reply.body)
                : FormatFailure(running.custom_id, FailureOf(reply.status)));
}

void BatchRun::Write(bool ok, std::string text) {
  (ok ? options_.answers : options_.failures)->Append(std::move(text));
}

void BatchRun::DropRunning() {
  for (auto& [line, running] : running_) running.call->Cancel();
  const absl::Time deadline = options_.clock->Now() + kDropTimeout;
  while (!running_.empty() && options_.clock->Now() < deadline) {
    std::vector<Event> events;
    {
      std::unique_lock lock(inbox_->mu);
      inbox_->wake.wait_for(lock, absl::ToChronoNanoseconds(kPoll), [&] { return !inbox_->events.empty(); });
      events.swap(inbox_->events);
    }
    for (Event& event : events) {
      if (!event.reply) continue;
      const auto it = running_.find(event.line);
      if (it == running_.end()) continue;
      const Running running = std::move(it->second);
      running_.erase(it);
      options_.gate->Ended(id_, running.started, nullptr);
      // An answer that came meanwhile counts.
      if (event.reply->status.ok() && event.reply->http_status / 100 == 2) {
        Answered(event.line, running, *std::move(event.reply));
      }
    }
  }
  if (!running_.empty()) spdlog::error("{} lines of a batch did not end when cancelled", running_.size());
  running_.clear();
}

absl::Status BatchRun::ExpireRest() {
  for (size_t i = 0; i < done_.size(); ++i) {
    if (done_[i]) continue;
    TP_ASSIGN_OR_RETURN(const BatchLine line, options_.index->Read(i));
    BatchError error{"batch_expired", "the batch's completion window ended before this request was run", "",
                     0};
    if (line.custom_id.empty()) error.line = options_.index->lines()[i].number;
    Write(false, FormatFailure(line.custom_id, error));
    done_[i] = true;
    ++counts_.failed;
    ++counts_.expired;
    // Memory stays bounded, however many they are.
    if (options_.failures->backlog_bytes() > kBacklogBytesMax) TP_RETURN_IF_ERROR(options_.failures->Flush());
  }
  return absl::OkStatus();
}

}  // namespace tidepool
