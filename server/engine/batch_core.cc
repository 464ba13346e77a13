#include "server/engine/batch_core.h"

#include <algorithm>
#include <limits>

#include "base/status.h"

namespace tidepool {

BatchCore::BatchCore(const Options& options) : options_(options) {
  TP_CHECK(options_.max_batch >= 1 && options_.max_step_tokens >= options_.max_batch);
  plan_.reserve(options_.max_batch);
}

void BatchCore::Add(uint64_t id, uint32_t context, uint32_t pending, bool prefilled, int32_t priority,
                    bool batch_class) {
  TP_CHECK(pending >= 1 && (!prefilled || pending == 1));
  Sequence s;
  s.rank = {.batch_class = batch_class, .minus_priority = -int64_t{priority}, .arrival = next_arrival_++};
  s.context = context;
  s.pending = pending;
  s.decoding = prefilled;
  TP_CHECK(sequences_.emplace(id, s).second);
  if (batch_class) ++batch_class_;
  prefills_.emplace(s.rank, id);
  if (!prefilled) queued_prefill_ += pending;
}

void BatchCore::Continue(uint64_t id) {
  auto it = sequences_.find(id);
  TP_CHECK(it != sequences_.end());
  Sequence& s = it->second;
  TP_CHECK(s.running && s.pending == 0);
  s.pending = 1;
  s.decoding = true;
  decodes_.try_emplace(s.rank, id);  // there already, but for the first time: nothing is allocated per token
}

void BatchCore::Remove(uint64_t id) {
  auto it = sequences_.find(id);
  if (it == sequences_.end()) return;
  const Sequence& s = it->second;
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
  --running_batch_class_;
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

void BatchCore::TakePrefills(bool batch_class, uint32_t& budget) {
  for (auto it = Begin(prefills_, batch_class); it != End(prefills_, batch_class) && budget > 0;) {
    Sequence& s = sequences_.at(it->second);
    if (!s.running && !(batch_class ? running_ < options_.max_batch : MakePlace())) {
      // No place for a new one; one that has begun may still be further down.
      ++it;
      continue;
    }
    const uint32_t tokens = std::min(budget, s.pending);
    Take(it->second, s, tokens);
    budget -= tokens;
    it = s.pending == 0 ? prefills_.erase(it) : std::next(it);
  }
}

const std::vector<PlanItem>& BatchCore::Step() {
  plan_.clear();
  uint32_t budget = options_.max_step_tokens;
  for (const bool batch_class : {false, true}) {
    TakeDecodes(batch_class, budget);
    TakePrefills(batch_class, budget);
  }
  return plan_;
}

}  // namespace tidepool
