#include "server/engine/batch_core.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "base/status.h"

namespace tidepool {

namespace {

// A token of an answer takes a place in a step of its own; what VTC's authors take.
constexpr double kOutputWeight = 2;

// Online sequences are of the first class, so that who has waited for long is not above those who came later:
// among them, the queue's order decides.
constexpr SloClass kOnline = SloClass::kInteractive;

FairQueue::Options QueueOptions(const BatchCore::Options& o) {
  FairQueue::Options q;
  q.order = o.order;
  q.output_weight = kOutputWeight;
  q.aging = o.aging;
  q.batch_rises = false;
  q.max_waiting = q.max_waiting_per_tenant = std::numeric_limits<size_t>::max();
  q.max_running_per_tenant =
      o.max_running_per_tenant == 0 ? std::numeric_limits<size_t>::max() : o.max_running_per_tenant;
  return q;
}

}  // namespace

BatchCore::BatchCore(const Options& options) : options_(options), queue_(QueueOptions(options)) {
  TP_CHECK(options_.max_batch >= 1 && options_.max_step_tokens >= options_.max_batch);
  plan_.reserve(options_.max_batch);
}

void BatchCore::Add(const NewSequence& n, absl::Time now) {
  TP_CHECK(n.pending >= 1 && (!n.prefilled || n.pending == 1));
  now_ = now;
  Sequence s;
  s.rank = {.batch_class = n.batch_class, .minus_priority = -int64_t{n.priority}, .begun = 0};
  s.context = n.context;
  s.pending = n.pending;
  s.decoding = n.prefilled;
  TP_CHECK(sequences_.emplace(n.id, s).second);
  if (n.batch_class) ++batch_class_;
  if (!n.prefilled) queued_prefill_ += n.pending;
  FairQueue::Item item{.id = n.id, .tenant = std::string(n.tenant)};
  item.slo_class = n.batch_class ? SloClass::kBatch : kOnline;
  item.priority =
      static_cast<int32_t>(std::min<int64_t>(s.rank.minus_priority, std::numeric_limits<int32_t>::max()));
  item.prompt_tokens = n.resumed ? n.fresh : n.prefilled ? n.pending : n.context + n.pending;
  item.cached_tokens = n.resumed || n.prefilled ? 0 : n.context;
  item.preempted = n.resumed;
  sequences_.at(n.id).charged = item.prompt_tokens;
  TP_CHECK(queue_.Push(std::move(item), now).ok());
  if (!n.batch_class) ++waiting_ranks_[s.rank.minus_priority];
}

void BatchCore::Continue(uint64_t id) {
  auto it = sequences_.find(id);
  TP_CHECK(it != sequences_.end());
  Sequence& s = it->second;
  TP_CHECK(s.running && s.pending == 0);
  s.pending = 1;
  s.decoding = true;
  queue_.OnOutput(id, ++s.outputs);
  decodes_.try_emplace(s.rank, id);  // there already, but for the first time: nothing is allocated per token
}

void BatchCore::CountOutput(uint64_t id, uint32_t tokens) {
  auto it = sequences_.find(id);
  TP_CHECK(it != sequences_.end());
  queue_.OnOutput(id, it->second.outputs += tokens);
}

void BatchCore::Remove(uint64_t id) {
  auto it = sequences_.find(id);
  if (it == sequences_.end()) return;
  const Sequence& s = it->second;
  queue_.Remove(id, now_, s.decoding ? 0 : std::min(s.pending, s.charged));
  if (s.rank.begun == 0) WaitsNoMore(s);
  prefills_.erase(s.rank);
  decodes_.erase(s.rank);
  if (!s.decoding) queued_prefill_ -= s.pending;
  if (s.running) {
    --running_;
    if (s.rank.batch_class) --running_batch_class_;
    running_context_ -= s.context;
  }
  if (s.rank.batch_class) --batch_class_;
  sequences_.erase(it);
}

void BatchCore::WaitsNoMore(const Sequence& s) {
  if (s.rank.batch_class) return;
  const auto it = waiting_ranks_.find(s.rank.minus_priority);
  if (--it->second == 0) waiting_ranks_.erase(it);
}

void BatchCore::Take(uint64_t id, Sequence& s, uint32_t tokens) {
  if (!s.running) {
    s.running = true;
    ++running_;
    if (s.rank.batch_class) ++running_batch_class_;
    running_context_ += s.context;
  }
  s.pending -= tokens;
  s.context += tokens;
  running_context_ += tokens;
  if (!s.decoding) queued_prefill_ -= tokens;
  plan_.push_back({.id = id, .tokens = tokens, .decode = s.decoding, .last = s.pending == 0});
}

BatchCore::Ranked::iterator BatchCore::Begin(Ranked& ranked, bool batch_class) {
  return batch_class ? ranked.lower_bound({true, std::numeric_limits<int64_t>::min(), 0}) : ranked.begin();
}

BatchCore::Ranked::iterator BatchCore::End(Ranked& ranked, bool batch_class) {
  return batch_class ? ranked.end() : Begin(ranked, true);
}

void BatchCore::TakeDecodes(bool batch_class, uint32_t& budget) {
  for (auto it = Begin(decodes_, batch_class); it != End(decodes_, batch_class) && budget > 0; ++it) {
    Sequence& s = sequences_.at(it->second);
    if (s.pending == 0) continue;
    Take(it->second, s, 1);
    --budget;
  }
}

void BatchCore::Suspend(Sequence& s) {
  s.running = false;
  --running_;
  if (s.rank.batch_class) --running_batch_class_;
  running_context_ -= s.context;
}

bool BatchCore::MakePlace() {
  if (running_ < options_.max_batch) return true;
  if (running_batch_class_ == 0) return false;
  // Those that have not given a token yet first: nobody reads along.
  for (auto it = prefills_.end(); it != Begin(prefills_, true);) {
    Sequence& s = sequences_.at((--it)->second);
    if (!s.running) continue;
    Suspend(s);
    return true;
  }
  for (auto it = decodes_.end(); it != Begin(decodes_, true);) {
    const auto [rank, id] = *--it;
    Sequence& s = sequences_.at(id);
    if (s.pending == 0) continue;  // its token is being drawn: not now
    Suspend(s);
    decodes_.erase(it);
    prefills_.emplace(rank, id);
    return true;
  }
  return false;
}

void BatchCore::YieldPlace() {
  if (!options_.yield_places || running_ < options_.max_batch || running_batch_class_ > 0) return;
  if (waiting_ranks_.empty()) return;
  const int64_t best = waiting_ranks_.begin()->first;
  // The last in rank that can be stopped, of those that answer and those that do not yet.
  Ranked* from = nullptr;
  Ranked::iterator last;
  for (Ranked* ranked : {&prefills_, &decodes_}) {
    for (auto it = End(*ranked, false); it != Begin(*ranked, false);) {
      --it;
      if (it->first.minus_priority <= best) break;
      const Sequence& s = sequences_.at(it->second);
      if (!s.running || s.pending == 0 || s.yielded != absl::InfiniteFuture()) continue;
      if (from == nullptr || last->first < it->first) {
        from = ranked;
        last = it;
      }
      break;
    }
  }
  if (from == nullptr) return;
  // It looks at all that wait: not where that could change nothing.
  const FairQueue::Item* const next = queue_.Peek(now_);
  if (next == nullptr || next->slo_class == SloClass::kBatch) return;
  if (last->first.minus_priority <= sequences_.at(next->id).rank.minus_priority) return;
  const auto [rank, id] = *last;
  Sequence& s = sequences_.at(id);
  Suspend(s);
  s.yielded = now_;
  if (from == &prefills_) return;
  decodes_.erase(last);
  prefills_.emplace(rank, id);
}

bool BatchCore::Overdue() const {
  if (!options_.yield_places || options_.aging <= absl::ZeroDuration()) return false;
  for (auto it = prefills_.begin(); it != prefills_.end() && !it->first.batch_class; ++it) {
    const Sequence& s = sequences_.at(it->second);
    if (!s.running && now_ - s.yielded >= options_.aging) return true;
  }
  return false;
}

bool BatchCore::IsOf(Ranked::iterator it, bool batch_class) const {
  return it != prefills_.end() && it->first.batch_class == batch_class;
}

const FairQueue::Item* BatchCore::NextToBegin(bool batch_class, Ranked::iterator begun) {
  if (queue_.waiting() == 0) return nullptr;
  // It looks at all that wait: not where there is no place.
  if (running_ >= options_.max_batch && (batch_class || running_batch_class_ == 0)) return nullptr;
  const FairQueue::Item* const next = queue_.Peek(now_);
  if (next == nullptr || (next->slo_class == SloClass::kBatch) != batch_class) return nullptr;
  if (Overdue()) return nullptr;
  if (IsOf(begun, batch_class) && sequences_.at(next->id).rank.minus_priority >= begun->first.minus_priority)
    return nullptr;
  return next;
}

void BatchCore::TakePrefills(bool batch_class, uint32_t& budget) {
  auto it = Begin(prefills_, batch_class);
  bool places = true;  // for new ones
  while (budget > 0) {
    // Who has lost its place, and finds none, waits on; one that has a place may still be further down.
    while (IsOf(it, batch_class) && running_ >= options_.max_batch && !sequences_.at(it->second).running)
      ++it;
    if (const FairQueue::Item* next = places ? NextToBegin(batch_class, it) : nullptr; next != nullptr) {
      const uint64_t id = next->id;
      if (!batch_class && !MakePlace()) {
        places = false;
        continue;
      }
      queue_.Begin(id, now_);
      Sequence& s = sequences_.at(id);
      WaitsNoMore(s);
      s.rank.begun = ++begun_;
      const uint32_t tokens = std::min(budget, s.pending);
      Take(id, s, tokens);
      budget -= tokens;
      if (s.pending > 0) prefills_.emplace(s.rank, id);
      continue;
    }
    if (!IsOf(it, batch_class)) return;
    Sequence& s = sequences_.at(it->second);
    const uint32_t tokens = std::min(budget, s.pending);
    Take(it->second, s, tokens);
    budget -= tokens;
    it = s.pending == 0 ? prefills_.erase(it) : std::next(it);
  }
}

const std::vector<PlanItem>& BatchCore::Step(absl::Time now) {
  now_ = now;
  plan_.clear();
  uint32_t budget = options_.max_step_tokens;
  if (!Overdue()) YieldPlace();
  for (const bool batch_class : {false, true}) {
    TakeDecodes(batch_class, budget);
    TakePrefills(batch_class, budget);
  }
  return plan_;
}

}  // namespace tidepool
