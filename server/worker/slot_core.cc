#include "server/worker/slot_core.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "base/status.h"

namespace tidepool {
namespace {

// As the engine's queue: who is served here begins there.
FairQueue::Options QueueOptions(const SlotCore::Options& o) {
  FairQueue::Options q;
  q.order = o.order;
  q.output_weight = 2;  // what VTC's authors take
  q.aging = o.aging;
  q.batch_rises = false;
  q.max_waiting = q.max_waiting_per_tenant = q.max_running_per_tenant = std::numeric_limits<size_t>::max();
  return q;
}

}  // namespace

SlotCore::SlotCore(const Options& options) : options_(options), queue_(QueueOptions(options)) {}

bool SlotCore::Full(bool batch_class) const {
  return batch_class ? waiting() >= (options_.max_waiting + 1) / 2 : waiting_online_ >= options_.max_waiting;
}

void SlotCore::Enqueue(const Entry& entry, absl::Time now) {
  const Request& r = entry.request;
  // All online requests are of one class: who has waited for long is not above those who came later.
  TP_CHECK(queue_
               .Push({.id = r.id,
                      .tenant = r.tenant,
                      .slo_class = r.batch_class ? SloClass::kBatch : SloClass::kInteractive,
                      .priority = r.priority,
                      // A prompt is charged once.
                      .prompt_tokens = entry.preempted > 0 ? 0 : r.prompt_tokens,
                      .preempted = entry.preempted > 0},
                     now)
               .ok());
  if (!r.batch_class) ++waiting_online_;
}

void SlotCore::Push(const Request& request, absl::Time now) {
  const auto [it, added] = entries_.try_emplace(request.id, Entry{.request = request});
  TP_CHECK(added);
  Enqueue(it->second, now);
}

std::optional<uint64_t> SlotCore::Next(absl::Time now) {
  const FairQueue::Item* const next = queue_.Peek(now);
  if (next == nullptr) return std::nullopt;
  return next->id;
}

void SlotCore::Granted(uint64_t id, size_t slots, absl::Time now) {
  Entry& entry = entries_.at(id);
  TP_CHECK(!entry.running);
  queue_.Begin(id, now);
  if (!entry.request.batch_class) --waiting_online_;
  entry.running = true;
  entry.slots = slots;
  entry.granted = ++grants_;
  entry.counted = entry.outputs;
}

void SlotCore::Output(uint64_t id, uint32_t total) {
  const auto it = entries_.find(id);
  if (it == entries_.end() || !it->second.running || total <= it->second.outputs) return;
  it->second.outputs = total;
  queue_.OnOutput(id, total - it->second.counted);
}

void SlotCore::Charge(uint64_t id, double tokens, absl::Time now) {
  const auto it = entries_.find(id);
  if (it != entries_.end()) queue_.Charge(it->second.request.tenant, tokens, now);
}

void SlotCore::Remove(uint64_t id, absl::Time now) {
  const auto it = entries_.find(id);
  if (it == entries_.end()) return;
  const Entry& entry = it->second;
  if (!entry.running && !entry.request.batch_class) --waiting_online_;
  if (entry.asked) --asked_;
  queue_.Remove(id, now);
  entries_.erase(it);
}

uint32_t SlotCore::Progress(uint32_t preempted) {
  return preempted == 0 ? 0 : kProgress << std::min(preempted - 1, 20u);
}

bool SlotCore::Below(const Request& a, const Request& b) {
  return std::tuple(a.batch_class, a.priority) > std::tuple(b.batch_class, b.priority);
}

std::vector<uint64_t> SlotCore::Victims(uint64_t waiter, size_t missing,
                                        const std::function<bool(uint64_t)>& may_be) {
  std::vector<uint64_t> out;
  if (!options_.preempt || asked_ > 0) return out;
  const Request& wants = entries_.at(waiter).request;
  std::vector<const Entry*> candidates;
  for (const auto& [id, entry] : entries_) {
    if (!entry.running || !entry.request.preemptible || !Below(entry.request, wants)) continue;
    if (entry.outputs - entry.counted < Progress(entry.preempted)) continue;
    if (may_be && !may_be(id)) continue;
    candidates.push_back(&entry);
  }
  const auto order = [](const Entry* e) {
    return std::tuple(!e->request.batch_class, -int64_t{e->request.priority}, e->preempted, ~e->granted);
  };
  std::sort(candidates.begin(), candidates.end(),
            [&](const Entry* a, const Entry* b) { return order(a) < order(b); });
  size_t freed = 0;
  for (const Entry* e : candidates) {
    if (freed >= missing) break;
    freed += e->slots;
    out.push_back(e->request.id);
  }
  if (freed < missing) out.clear();
  return out;
}

void SlotCore::Asked(uint64_t id) {
  Entry& entry = entries_.at(id);
  if (!std::exchange(entry.asked, true)) ++asked_;
}

bool SlotCore::Preempted(uint64_t id, absl::Time now) {
  const auto it = entries_.find(id);
  if (it == entries_.end() || !it->second.running) return false;
  Entry& entry = it->second;
  if (std::exchange(entry.asked, false)) --asked_;
  queue_.Remove(id, now);
  entry.running = false;
  entry.slots = 0;
  ++entry.preempted;
  Enqueue(entry, now);
  return true;
}

}  // namespace tidepool
