#include "server/worker/reporter.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <utility>

#include "base/log.h"
#include "server/rpc/kv_convert.h"

namespace tidepool {
namespace {

constexpr absl::Duration kReportTimeout = absl::Seconds(2);
constexpr absl::Duration kLeaveTimeout = absl::Milliseconds(500);
// Nudges closer together than this are sent as one report.
constexpr absl::Duration kMinInterval = absl::Milliseconds(5);
// Events a report carries; more follow in the next.
constexpr size_t kMaxEventsPerReport = 20'000;
constexpr size_t kPageEntries = 1024;
// Blocks of a snapshot that one report carries: with the events beside them (some 40 bytes each) it fits a
// message. The rest follows in the next reports.
constexpr int kMaxListedPerReport = 100'000;
// Requests whose news a report that failed leaves to the next ones. The scheduler forgets the others in time.
constexpr size_t kMaxUntold = 10'000;

// `untold` goes before what came since.
void PutBack(std::vector<std::string> untold, std::vector<std::string>& to) {
  untold.insert(untold.end(), std::make_move_iterator(to.begin()), std::make_move_iterator(to.end()));
  if (untold.size() > kMaxUntold) untold.erase(untold.begin(), untold.end() - kMaxUntold);
  to = std::move(untold);
}

}  // namespace

Reporter::Reporter(Options options, ChannelCache& channels, MetricRegistry& metrics)
    : options_(std::move(options)),
      channels_(channels),
      failures_(metrics.AddCounter("tidepool_worker_report_failures_total",
                                   "Reports to the scheduler that failed or were refused.")),
      status_(absl::UnavailableError("not yet registered with a scheduler")) {}

void Reporter::Start(v1::WorkerAddress self) {
  *options_.base.mutable_address() = std::move(self);
  thread_ = std::thread([this] { Run(); });
}

Reporter::~Reporter() { Stop(); }

void Reporter::Stop() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Reporter::Leave() {
  Stop();
  if (!status().ok()) return;  // it knows nothing of us
  v1::WorkerReport report = options_.base;
  if (const auto last = told()) report.set_role(last->role);
  report.set_seq(++seq_);
  report.set_draining(true);
  report.set_snapshot(true);
  AddTiers(report);
  v1::ReportReply reply;
  const absl::Status sent = Send(report, kLeaveTimeout, reply);
  if (!sent.ok()) spdlog::debug("the scheduler was not told: {}", std::string(sent.message()));
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

void Reporter::Ended(const std::string& request_id) {
  std::lock_guard lock(mu_);
  ended_.push_back(request_id);
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

std::optional<Reporter::Told> Reporter::told() const {
  std::lock_guard lock(mu_);
  return last_told_;
}

void Reporter::Run() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    nudged_ = false;
    lock.unlock();
    const SchedulerLocator::Place before = told_;
    const absl::Status sent = SendOne();
    lock.lock();
    const bool changed = sent.ok() != status_.ok() || sent.code() != status_.code();
    if (changed || (sent.ok() && before != told_)) {
      if (sent.ok()) {
        spdlog::info("registered with the scheduler at {}", told_.address);
      } else {
        spdlog::warn("scheduler at {} does not accept reports: {}", told_.address,
                     std::string(sent.message()));
      }
    }
    status_ = sent;
    if (changed && options_.on_status) {
      lock.unlock();
      options_.on_status(sent);
      lock.lock();
    }
    wake_.wait_for(lock, absl::ToChronoNanoseconds(kMinInterval), [&] { return stop_; });
    wake_.wait_for(lock, absl::ToChronoNanoseconds(options_.interval), [&] { return stop_ || nudged_; });
  }
}

void Reporter::AddEvents(v1::WorkerReport& report) {
  const auto add = [&](const BlockKey& key, Tier tier, bool removed) {
    v1::BlockEvent* e = report.add_events();
    e->set_key(key.bytes.data(), key.bytes.size());
    e->set_tier(ToProto(tier));
    e->set_removed(removed);
  };
  // What is here, page by page over as many reports as it takes. A page goes before the events that came
  // until then: each tells of a change since the snapshot began, in order, so that the last word on a block
  // is its present state.
  const auto list = [&] {
    while (host_cursor_ && report.events_size() < kMaxListedPerReport) {
      const BlockPool::Page page = options_.pool->List(*host_cursor_, kPageEntries);
      for (const BlockPool::Entry& entry : page.entries) add(entry.info.key, Tier::kHost, false);
      host_cursor_ = page.next;
    }
    while (!host_cursor_ && disk_cursor_ && report.events_size() < kMaxListedPerReport) {
      const BlockTier::Page page = options_.disk->List(*disk_cursor_, kPageEntries);
      for (const TierEntry& entry : page.entries) add(entry.key, Tier::kDisk, false);
      disk_cursor_ = page.next;
    }
  };
  EventLog& log = options_.pool->events();
  if (!snapshot_next_) {
    list();
    EventLog::Page page = log.Read(next_event_, kMaxEventsPerReport);
    // A tier that lost everything is told by what is left.
    const bool cleared = std::any_of(page.events.begin(), page.events.end(),
                                     [](const PoolEvent& e) { return e.kind == PoolEventKind::kCleared; });
    if (!page.lost && !cleared) {
      for (const PoolEvent& e : page.events) {
        if (e.kind == PoolEventKind::kMoved) add(e.key, e.from, /*removed=*/true);
        add(e.key, e.tier, e.kind == PoolEventKind::kRemoved);
      }
      next_event_ = page.next;
      return;
    }
    report.clear_events();
  }
  // Noted first: what changes during the listing comes again as events.
  next_event_ = log.next();
  report.set_snapshot(true);
  host_cursor_ = 0;
  disk_cursor_.reset();
  if (options_.disk != nullptr) disk_cursor_ = 0;
  list();
}

void Reporter::AddTiers(v1::WorkerReport& report) const {
  const BlockPool::Stats slots = options_.pool->stats();
  const uint64_t block_bytes = options_.pool->layout().block_bytes();
  report.set_slots_total(slots.slots);
  report.set_slots_free(slots.free + slots.evictable - std::min(slots.evictable, slots.hard_pinned));
  v1::TierLoad* host = report.add_tiers();
  host->set_tier(v1::KV_TIER_HOST);
  host->set_blocks(slots.published);
  host->set_bytes_used((slots.slots - slots.free) * block_bytes);
  host->set_bytes_total(slots.slots * block_bytes);
  host->set_healthy(true);
  if (options_.disk == nullptr) return;
  const TierStats stats = options_.disk->stats();
  v1::TierLoad* disk = report.add_tiers();
  disk->set_tier(v1::KV_TIER_DISK);
  disk->set_blocks(stats.blocks);
  disk->set_bytes_used(stats.bytes);
  disk->set_bytes_total(stats.capacity_bytes);
  disk->set_healthy(stats.health.state == TierState::kOn);
}

absl::Status Reporter::SendOne() {
  const SchedulerLocator::Place scheduler = options_.scheduler->Get();
  // A new one, or one that leads again, knows nothing.
  if (scheduler != told_) snapshot_next_ = true;
  told_ = scheduler;
  v1::WorkerReport report = options_.base;
  std::vector<std::string> prefilled, ended;
  {
    std::lock_guard lock(mu_);
    report.set_draining(draining_);
    prefilled.swap(prefilled_);
    ended.swap(ended_);
  }
  report.set_seq(++seq_);
  AddEvents(report);
  AddTiers(report);
  for (const std::string& id : prefilled) report.add_prefilled(id);
  for (const std::string& id : ended) report.add_ended(id);
  options_.fill(report);

  v1::ReportReply reply;
  const absl::Status status = Send(report, kReportTimeout, reply);
  // The blocks that a failed report carried are not repeated: the next one starts the view afresh.
  snapshot_next_ = !status.ok() || reply.resync();
  if (!snapshot_next_ && (host_cursor_ || disk_cursor_)) Nudge();  // there is more to tell
  if (!status.ok()) {
    failures_.Add();
    std::lock_guard lock(mu_);
    PutBack(std::move(prefilled), prefilled_);
    PutBack(std::move(ended), ended_);
  } else {
    std::lock_guard lock(mu_);
    last_told_ = {report.role(), report.next_role(), report.draining()};
  }
  return status;
}

absl::Status Reporter::Send(const v1::WorkerReport& report, absl::Duration timeout, v1::ReportReply& reply) {
  if (told_.address.empty()) return absl::UnavailableError("no scheduler is known to lead");
  grpc::ClientContext context;
  SetTimeout(context, timeout);
  AddClusterToken(context, options_.cluster_token);
  AddSchedulerTerm(context, told_.term);
  return FromGrpc(v1::Scheduler::NewStub(channels_.Get(told_.address))->Report(&context, report, &reply));
}

}  // namespace tidepool
