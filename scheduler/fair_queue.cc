#include "scheduler/fair_queue.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "base/status.h"

namespace tidepool {

namespace {

// How often idle tenants are looked for: a scan of all.
constexpr absl::Duration kForgetInterval = absl::Minutes(1);

constexpr std::array<std::string_view, kQueueOrders> kOrders = {"fcfs", "longest-prefix", "vtc", "dlpm"};

}  // namespace

std::string_view QueueOrderName(FairQueue::Order order) { return kOrders[static_cast<size_t>(order)]; }

std::optional<FairQueue::Order> ParseQueueOrder(std::string_view name) {
  const auto it = std::find(kOrders.begin(), kOrders.end(), name);
  if (it == kOrders.end()) return std::nullopt;
  return static_cast<FairQueue::Order>(it - kOrders.begin());
}

FairQueue::Tenant& FairQueue::Known(const std::string& name, absl::Time now) {
  Forget(now);
  auto it = tenants_.find(name);
  if (it == tenants_.end()) it = tenants_.emplace(name, Tenant{.deficit = options_.quantum}).first;
  it->second.used = now;
  return it->second;
}

void FairQueue::Forget(absl::Time now) {
  if (now - forgot_at_ < kForgetInterval) return;
  forgot_at_ = now;
  std::erase_if(tenants_, [&](const auto& entry) {
    const Tenant& t = entry.second;
    return t.waiting == 0 && t.running == 0 && now - t.used > options_.idle;
  });
}

absl::Status FairQueue::Push(Item item, absl::Time now) {
  if (waiting_.size() >= options_.max_waiting)
    return absl::ResourceExhaustedError("the queue is full: " + std::to_string(options_.max_waiting) +
                                        " requests wait already");
  Tenant& tenant = Known(item.tenant, now);
  if (tenant.waiting >= options_.max_waiting_per_tenant)
    return absl::ResourceExhaustedError(
        "the tenant's part of the queue is full: " + std::to_string(options_.max_waiting_per_tenant) +
        " of its requests wait already");
  if (tenant.waiting + tenant.running == 0) {
    // What was not used while away is no claim on the others now.
    double least = std::numeric_limits<double>::infinity();
    for (const auto& [name, other] : tenants_) {
      if (other.waiting + other.running > 0) least = std::min(least, other.counter);
    }
    if (least != std::numeric_limits<double>::infinity()) tenant.counter = std::max(tenant.counter, least);
  }
  ++tenant.waiting;
  item.cached_tokens = std::min(item.cached_tokens, item.prompt_tokens);
  arrival_of_[item.id] = next_arrival_;
  waiting_.emplace(next_arrival_++, Waiting{std::move(item), now, &tenant});
  return absl::OkStatus();
}

void FairQueue::SetCached(uint64_t id, uint32_t tokens) {
  const auto it = arrival_of_.find(id);
  if (it == arrival_of_.end()) return;
  Item& item = waiting_.at(it->second).item;
  item.cached_tokens = std::min(tokens, item.prompt_tokens);
}

FairQueue::Level FairQueue::LevelOf(const Waiting& w, absl::Time now, bool& aged) const {
  const int slo_class = static_cast<int>(w.item.slo_class);
  aged = options_.aging > absl::ZeroDuration() && now - w.arrived >= options_.aging;
  if (!aged) return {slo_class, w.item.priority};
  if (w.item.slo_class == SloClass::kBatch && !options_.batch_rises)
    return {slo_class, std::numeric_limits<int64_t>::max()};
  const auto risen = static_cast<int64_t>(absl::FDivDuration(now - w.arrived, options_.aging));
  return {static_cast<int>(std::max<int64_t>(0, slo_class - risen)), std::numeric_limits<int64_t>::max()};
}

bool FairQueue::MayBegin(const Waiting& w) const {
  const Tenant& t = *w.tenant;
  const bool batch = w.item.slo_class == SloClass::kBatch;
  return (batch ? t.running_batch : t.running - t.running_batch) < options_.max_running_per_tenant;
}

bool FairQueue::Before(const Waiting& a, const Waiting& b) const {
  if (a.item.preempted || b.item.preempted) return a.item.preempted && !b.item.preempted;
  switch (options_.order) {
    case Order::kFcfs:
      break;
    case Order::kVtc:
      if (a.tenant->counter != b.tenant->counter) return a.tenant->counter < b.tenant->counter;
      // A tenant that comes back is lifted to be equal: it need not wait for one more of a long queue.
      return a.tenant->waiting < b.tenant->waiting;
    case Order::kLongestPrefix:
      return a.item.cached_tokens > b.item.cached_tokens;
    case Order::kDlpm:
      if (a.item.cached_tokens != b.item.cached_tokens) return a.item.cached_tokens > b.item.cached_tokens;
      // Inside the credit any order is fair: who asks for little waits little.
      return a.tenant->waiting < b.tenant->waiting;
  }
  return false;  // the earlier one stays before
}

const FairQueue::Item* FairQueue::Peek(absl::Time now) {
  bool aged = false;
  std::optional<Level> level;
  for (const auto& [arrival, w] : waiting_) {
    if (!MayBegin(w)) continue;
    const Level here = LevelOf(w, now, aged);
    if (!level || here < *level) level = here;
  }
  if (!level) return nullptr;
  // The best with credit; where nobody has any, they are given some, once.
  for (bool refilled = false;; refilled = true) {
    const Waiting* best = nullptr;
    double nearest = -std::numeric_limits<double>::infinity();  // to credit, in quanta
    for (const auto& [arrival, w] : waiting_) {
      if (!MayBegin(w)) continue;
      const Level here = LevelOf(w, now, aged);
      if (aged ? here.slo_class != level->slo_class : here != *level) continue;
      if (options_.order == Order::kDlpm && w.tenant->deficit <= 0 && !w.item.preempted) {
        nearest = std::max(nearest, w.tenant->deficit / (options_.quantum * w.tenant->weight));
        continue;
      }
      if (best == nullptr || Before(w, *best)) best = &w;
    }
    if (best != nullptr) return &best->item;
    if (refilled) return nullptr;
    // As many quanta as the one that lacks least needs.
    const double quanta = std::floor(-nearest) + 1;
    for (auto& [name, tenant] : tenants_) {
      const double quantum = options_.quantum * tenant.weight;
      // Who was away, or waits elsewhere, saves up one quantum and no more.
      tenant.deficit = std::max(tenant.deficit, std::min(tenant.deficit + quanta * quantum, quantum));
    }
  }
}

void FairQueue::Begin(uint64_t id, absl::Time now) {
  const auto arrival = arrival_of_.find(id);
  TP_CHECK(arrival != arrival_of_.end());
  const auto it = waiting_.find(arrival->second);
  const Item& item = it->second.item;
  Tenant& tenant = *it->second.tenant;
  const bool by_work = options_.order == Order::kDlpm;
  // VTC charges what was asked for, DLPM what it costs.
  Give(tenant, options_.prompt_weight * (item.prompt_tokens - (by_work ? item.cached_tokens : 0)));
  tenant.used = now;
  --tenant.waiting;
  ++tenant.running;
  const bool batch = item.slo_class == SloClass::kBatch;
  if (batch) ++tenant.running_batch;
  running_[id] = {.tenant = &tenant, .batch = batch};
  arrival_of_.erase(arrival);
  waiting_.erase(it);
}

std::optional<uint64_t> FairQueue::Pop(absl::Time now) {
  const Item* const item = Peek(now);
  if (item == nullptr) return std::nullopt;
  const uint64_t id = item->id;
  Begin(id, now);
  return id;
}

void FairQueue::Give(Tenant& tenant, double tokens) {
  tenant.counter += tokens / tenant.weight;
  tenant.deficit -= tokens;
  tenant.service += tokens;
}

void FairQueue::OnOutput(uint64_t id, uint32_t total) {
  const auto it = running_.find(id);
  if (it == running_.end() || total <= it->second.output_tokens) return;
  Give(*it->second.tenant, options_.output_weight * (total - it->second.output_tokens));
  it->second.output_tokens = total;
}

void FairQueue::Remove(uint64_t id, absl::Time now, uint32_t uncomputed) {
  if (const auto it = arrival_of_.find(id); it != arrival_of_.end()) {
    const auto waiting = waiting_.find(it->second);
    --waiting->second.tenant->waiting;
    waiting->second.tenant->used = now;
    waiting_.erase(waiting);
    arrival_of_.erase(it);
    return;
  }
  const auto it = running_.find(id);
  if (it == running_.end()) return;
  Tenant& tenant = *it->second.tenant;
  Give(tenant, -options_.prompt_weight * uncomputed);
  --tenant.running;
  if (it->second.batch) --tenant.running_batch;
  tenant.used = now;
  running_.erase(it);
}

void FairQueue::Charge(const std::string& tenant, double tokens, absl::Time now) {
  Give(Known(tenant, now), tokens);
}

void FairQueue::SetWeight(const std::string& tenant, double weight, absl::Time now) {
  Known(tenant, now).weight = weight;
}

double FairQueue::service(const std::string& tenant) const {
  const auto it = tenants_.find(tenant);
  return it == tenants_.end() ? 0 : it->second.service;
}

}  // namespace tidepool
