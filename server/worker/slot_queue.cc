#include "server/worker/slot_queue.h"

#include <chrono>
#include <optional>
#include <utility>

namespace tidepool {
namespace {

constexpr std::chrono::milliseconds kTry{1};
// While nobody waits; notices of those that end are taken then at the latest.
constexpr std::chrono::seconds kIdle{1};

}  // namespace

SlotQueue::SlotQueue(const SlotCore::Options& options, MetricRegistry& metrics, const Clock* clock)
    : clock_(clock),
      waiting_gauge_(metrics.AddGauge("tidepool_worker_slot_queue_length", "Requests waiting for KV slots.")),
      rejected_(metrics.AddCounter("tidepool_worker_slot_queue_rejections_total",
                                   "Requests refused because the queue for KV slots was full.")),
      max_waiting_(options.max_waiting),
      core_(options),
      thread_([this] { Run(); }) {}

SlotQueue::~SlotQueue() {
  {
    std::lock_guard lock(notices_mu_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

absl::Status SlotQueue::Submit(Request request) {
  // Attempts run under the lock: that is what makes "never after Cancel" true, and keeps them in order.
  std::lock_guard lock(mu_);
  TakeNotices();
  const bool batch_class = request.batch_class;
  const bool full = core_.Full(batch_class);
  const uint64_t id = next_id_++;
  const std::string name = request.id;
  if (!ids_.emplace(name, id).second) {
    return absl::AlreadyExistsError("request " + name + " is here already");
  }
  core_.Push({.id = id,
              .tenant = request.tenant,
              .batch_class = batch_class,
              .priority = request.priority,
              .prompt_tokens = request.prompt_tokens,
              .preemptible = request.preempt != nullptr},
             clock_->Now());
  requests_.emplace(id, std::move(request));
  Count();
  if (core_.Next(clock_->Now()) == id && TryNext(id, /*may_preempt=*/!full)) return absl::OkStatus();
  if (full) {
    const size_t waiting = core_.waiting() - 1;
    Forget(name);
    rejected_.Add();
    return absl::ResourceExhaustedError(
        "all KV slots are taken and " + std::to_string(waiting) +
        " requests wait already (engine.max_waiting is " + std::to_string(max_waiting_) +
        (batch_class ? ", of which batches may take half" : "") + "); try again later");
  }
  Show();
  {
    std::lock_guard notices(notices_mu_);
    stirred_ = true;
  }
  wake_.notify_all();
  return absl::OkStatus();
}

bool SlotQueue::TryNext(uint64_t id, bool may_preempt) {
  const Request& request = requests_.at(id);
  const SlotGrant grant = request.attempt();
  if (grant.granted) {
    core_.Granted(id, grant.slots, clock_->Now());
    return true;
  }
  if (!may_preempt) return false;
  const auto may_be = [this](uint64_t victim) {
    const Request& r = requests_.at(victim);
    return r.may_preempt == nullptr || r.may_preempt();
  };
  for (const uint64_t victim : core_.Victims(id, grant.slots, may_be)) {
    if (requests_.at(victim).preempt()) core_.Asked(victim);
  }
  return false;
}

void SlotQueue::Forget(const std::string& name) {
  const auto it = ids_.find(name);
  if (it == ids_.end()) return;
  core_.Remove(it->second, clock_->Now());
  requests_.erase(it->second);
  ids_.erase(it);
}

void SlotQueue::Cancel(const std::string& id) {
  std::lock_guard lock(mu_);
  Forget(id);
  Show();
}

void SlotQueue::Notify(Notice notice) {
  {
    std::lock_guard lock(notices_mu_);
    notices_.push_back(std::move(notice));
    stirred_ = true;
  }
  wake_.notify_all();
}

void SlotQueue::Released(const std::string& id) { Notify({.id = id, .preempted = false}); }
void SlotQueue::Preempted(const std::string& id) { Notify({.id = id, .preempted = true}); }

void SlotQueue::TakeNotices() {
  std::vector<Notice> notices;
  {
    std::lock_guard lock(notices_mu_);
    notices.swap(notices_);
  }
  for (const Notice& notice : notices) {
    const auto it = ids_.find(notice.id);
    if (it == ids_.end()) continue;
    const Request& request = requests_.at(it->second);
    if (request.outputs) core_.Output(it->second, request.outputs());
    if (!notice.preempted) {
      Forget(notice.id);
      continue;
    }
    const double cost = request.swap_out ? request.swap_out() : 0;
    core_.Charge(it->second, cost, clock_->Now());
    core_.Preempted(it->second, clock_->Now());
  }
  if (!notices.empty()) Show();
}

void SlotQueue::Count() {
  for (const auto& [id, request] : requests_) {
    if (request.outputs) core_.Output(id, request.outputs());
  }
}

size_t SlotQueue::waiting() const {
  std::lock_guard lock(mu_);
  return core_.waiting();
}

void SlotQueue::Run() {
  bool waiting = false;
  while (true) {
    {
      std::unique_lock lock(notices_mu_);
      wake_.wait_for(lock, waiting ? std::chrono::nanoseconds(kTry) : std::chrono::nanoseconds(kIdle),
                     [&] { return stop_ || stirred_; });
      if (stop_) return;
      stirred_ = false;
    }
    std::lock_guard lock(mu_);
    TakeNotices();
    if (core_.waiting() > 0) Count();
    while (true) {
      const std::optional<uint64_t> next = core_.Next(clock_->Now());
      if (!next || !TryNext(*next, /*may_preempt=*/true)) break;
      Show();
    }
    waiting = core_.waiting() > 0;
  }
}

}  // namespace tidepool
