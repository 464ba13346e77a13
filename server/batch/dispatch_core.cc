#include "server/batch/dispatch_core.h"

#include <algorithm>
#include <utility>

#include "base/status.h"

namespace tidepool {

void DispatchCore::Add(std::span<const Line> lines) {
  const Entry base = head_ + entries_.size();
  for (const Line& line : lines) {
    Slot slot;
    slot.line = line.line;
    if (line.after >= 0) slot.after = base + static_cast<Entry>(line.after);
    entries_.push_back(slot);
  }
  waiting_ += lines.size();
}

absl::Time DispatchCore::GateOpens(const Slot& slot) const {
  if (!slot.after) return absl::InfinitePast();
  const Slot* leader = At(*slot.after);
  if (leader == nullptr || leader->open) return absl::InfinitePast();
  return leader->state == State::kRunning ? leader->started + options_.gate_max : absl::InfiniteFuture();
}

uint32_t DispatchCore::Start(Entry entry, absl::Time now) {
  Slot& slot = *At(entry);
  slot.state = State::kRunning;
  slot.started = now;
  const bool fresh = running_.emplace(slot.line, entry).second;
  TP_CHECK(fresh);
  return slot.line;
}

std::optional<uint32_t> DispatchCore::Next(absl::Time now) {
  if (!again_.empty() && again_.begin()->first <= now) {
    const Entry entry = again_.begin()->second;
    again_.erase(again_.begin());
    return Start(entry, now);
  }
  Entry at = std::max(first_waiting_, head_);
  const Entry end = head_ + entries_.size();
  while (at < end && At(at)->state != State::kWaiting) ++at;
  first_waiting_ = at;
  size_t seen = 0;
  for (; at < end && seen < options_.lookahead; ++at) {
    const Slot& slot = *At(at);
    if (slot.state != State::kWaiting) continue;
    ++seen;
    if (GateOpens(slot) > now) continue;
    --waiting_;
    return Start(at, now);
  }
  return std::nullopt;
}

void DispatchCore::Ahead(uint32_t line) {
  const auto it = running_.find(line);
  if (it != running_.end()) At(it->second)->open = true;
}

void DispatchCore::Finished(uint32_t line) {
  const auto it = running_.find(line);
  TP_CHECK(it != running_.end());
  Slot& slot = *At(it->second);
  slot.state = State::kDone;
  slot.open = true;
  running_.erase(it);
  Trim();
}

void DispatchCore::Again(uint32_t line, absl::Time at) {
  const auto it = running_.find(line);
  TP_CHECK(it != running_.end());
  const Entry entry = it->second;
  running_.erase(it);
  // Not kWaiting: the scan for new lines must not find it.
  At(entry)->state = State::kRunning;
  At(entry)->started = at;
  again_.emplace(at, entry);
}

void DispatchCore::Clear() {
  for (Slot& slot : entries_) {
    if (slot.state != State::kWaiting) continue;
    slot.state = State::kDone;
    slot.open = true;
  }
  for (const auto& [at, entry] : again_) {
    At(entry)->state = State::kDone;
    At(entry)->open = true;
  }
  again_.clear();
  waiting_ = 0;
  Trim();
}

void DispatchCore::Trim() {
  while (!entries_.empty() && entries_.front().state == State::kDone) {
    entries_.pop_front();
    ++head_;
  }
}

}  // namespace tidepool
