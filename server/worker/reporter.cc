#include "server/worker/reporter.h"

#include <algorithm>

#include "base/log.h"

namespace tidepool {
namespace {

constexpr absl::Duration kReportTimeout = absl::Seconds(2);
// Nudges closer together than this are sent as one report.
constexpr absl::Duration kMinInterval = absl::Milliseconds(5);
// Events a report carries; more follow in the next.
constexpr size_t kMaxEventsPerReport = 20'000;

}  // namespace

Reporter::Reporter(Options options, ChannelCache& channels, MetricRegistry& metrics)
    : options_(std::move(options)),
      channels_(channels),
      failures_(metrics.AddCounter("tidepool_worker_report_failures_total",
                                   "Reports to the scheduler that failed or were refused.")),
      status_(absl::UnavailableError("not yet registered with the scheduler at " + options_.scheduler)) {}

void Reporter::Start(v1::WorkerAddress self) {
  *options_.base.mutable_address() = std::move(self);
  thread_ = std::thread([this] { Run(); });
}

Reporter::~Reporter() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Reporter::Nudge() {
  std::lock_guard lock(mu_);
  nudged_ = true;
  wake_.notify_all();
}

void Reporter::Prefilled(const std::string& request_id) {
  std::lock_guard lock(mu_);
  prefilled_.push_back(request_id);
  nudged_ = true;
  wake_.notify_all();
}

void Reporter::SetDraining() {
  std::lock_guard lock(mu_);
  draining_ = true;
  nudged_ = true;
  wake_.notify_all();
}

absl::Status Reporter::status() const {
  std::lock_guard lock(mu_);
  return status_;
}

void Reporter::Run() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    nudged_ = false;
    lock.unlock();
    const absl::Status sent = SendOne();
    lock.lock();
    if (sent.ok() != status_.ok() || sent.code() != status_.code()) {
      if (sent.ok()) {
        spdlog::info("registered with the scheduler at {}", options_.scheduler);
      } else {
        spdlog::warn("scheduler at {} does not accept reports: {}", options_.scheduler,
                     std::string(sent.message()));
      }
    }
    status_ = sent;
    wake_.wait_for(lock, absl::ToChronoNanoseconds(kMinInterval), [&] { return stop_; });
    wake_.wait_for(lock, absl::ToChronoNanoseconds(options_.interval), [&] { return stop_ || nudged_; });
  }
}

absl::Status Reporter::SendOne() {
  v1::WorkerReport report = options_.base;
  std::vector<std::string> prefilled;
  {
    std::lock_guard lock(mu_);
    report.set_draining(draining_);
    prefilled.swap(prefilled_);
  }
  report.set_seq(++seq_);
  BlockPool::Events events;
  if (!snapshot_next_) {
    events = options_.pool->DrainEvents(kMaxEventsPerReport);
    snapshot_next_ = events.lost;
  }
  if (snapshot_next_) {
    report.set_snapshot(true);
    for (const BlockKey& key : options_.pool->Snapshot()) {
      report.add_events()->set_key(key.bytes.data(), key.bytes.size());
    }
  } else {
    for (const BlockPoolEvent& event : events.events) {
      v1::BlockEvent* e = report.add_events();
      e->set_key(event.key.bytes.data(), event.key.bytes.size());
      e->set_removed(event.removed);
    }
  }
  for (const std::string& id : prefilled) report.add_prefilled(id);
  options_.fill(report);

  grpc::ClientContext context;
  SetTimeout(context, kReportTimeout);
  AddClusterToken(context, options_.cluster_token);
  v1::ReportReply reply;
  const absl::Status status =
      FromGrpc(v1::Scheduler::NewStub(channels_.Get(options_.scheduler))->Report(&context, report, &reply));
  // What a failed report carried is not repeated: the next one starts the view afresh.
  snapshot_next_ = !status.ok() || reply.resync();
  if (!status.ok()) failures_.Add();
  return status;
}

}  // namespace tidepool
