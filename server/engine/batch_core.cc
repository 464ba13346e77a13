#include "server/engine/batch_core.h"

#include <algorithm>

#include "base/status.h"

namespace tidepool {

BatchCore::BatchCore(const Options& options) : options_(options) {
  TP_CHECK(options_.max_batch >= 1 && options_.max_step_tokens >= options_.max_batch);
  plan_.reserve(options_.max_batch);
}

void BatchCore::Add(uint64_t id, uint32_t context, uint32_t pending, bool prefilled, int32_t priority) {
  TP_CHECK(pending >= 1 && (!prefilled || pending == 1));
  Sequence s;
  s.rank = {.minus_priority = -int64_t{priority}, .arrival = next_arrival_++};
  s.context = context;
  s.pending = pending;
  s.decoding = prefilled;
  TP_CHECK(sequences_.emplace(id, s).second);
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
    running_context_ -= s.context;
  }
  sequences_.erase(it);
}

void BatchCore::Take(uint64_t id, Sequence& s, uint32_t tokens) {
  if (!s.running) {
    s.running = true;
    ++running_;
    running_context_ += s.context;
  }
  s.pending -= tokens;
  s.context += tokens;
  running_context_ += tokens;
  if (!s.decoding) queued_prefill_ -= tokens;
  plan_.push_back({.id = id, .tokens = tokens, .decode = s.decoding, .last = s.pending == 0});
}

const std::vector<PlanItem>& BatchCore::Step() {
  plan_.clear();
  uint32_t budget = options_.max_step_tokens;
  for (const auto& [rank, id] : decodes_) {
    Sequence& s = sequences_.at(id);
    if (s.pending == 0) continue;
    Take(id, s, 1);
    --budget;
  }

  for (auto it = prefills_.begin(); it != prefills_.end() && budget > 0;) {
    Sequence& s = sequences_.at(it->second);
    if (!s.running && running_ >= options_.max_batch) {
      // No place for a new one; one that has begun may still be further down.
      ++it;
      continue;
    }
    const uint32_t tokens = std::min(budget, s.pending);
    Take(it->second, s, tokens);
    budget -= tokens;
    it = s.pending == 0 ? prefills_.erase(it) : std::next(it);
  }
  return plan_;
}

}  // namespace tidepool
