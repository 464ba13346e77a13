#include "tools/simulate/links.h"

#include <algorithm>

namespace tidepool {

Links::Links(size_t nodes, double bytes_per_second) : rate_(bytes_per_second), out_(nodes), in_(nodes) {}

void Links::Start(uint64_t id, uint32_t from, uint32_t to, double bytes, SimTime now) {
  uint32_t slot = static_cast<uint32_t>(flows_.size());
  if (free_.empty()) {
    flows_.emplace_back();
  } else {
    slot = free_.back();
    free_.pop_back();
  }
  Flow& f = flows_[slot];
  f = {.id = id,
       .serial = ++serials_,
       .from = from,
       .to = to,
       .left = bytes,
       .rate = 0,
       .at = now,
       .version = f.version + 1,
       .used = true};
  out_[from].push_back(slot);
  in_[to].push_back(slot);
  ++running_;
  Share(from, to, now);
}

void Links::Share(uint32_t from, uint32_t to, SimTime now) {
  for (const uint32_t slot : out_[from]) Update(slot, now);
  for (const uint32_t slot : in_[to]) {
    if (flows_[slot].from != from) Update(slot, now);
  }
}

void Links::Update(uint32_t slot, SimTime now) {
  Flow& f = flows_[slot];
  const double rate = rate_ / static_cast<double>(std::max(out_[f.from].size(), in_[f.to].size()));
  if (rate == f.rate) return;
  f.left = std::max(0.0, f.left - f.rate * ToSeconds(now - f.at));
  f.at = now;
  f.rate = rate;
  ++f.version;
  endings_.push({now + FromSeconds(f.left / rate), f.serial, slot, f.version});
}

void Links::Detach(uint32_t slot) {
  Flow& f = flows_[slot];
  std::erase(out_[f.from], slot);
  std::erase(in_[f.to], slot);
  f.used = false;
  ++f.version;
  free_.push_back(slot);
  --running_;
}

void Links::Cut(uint32_t node, SimTime now, std::vector<uint64_t>& ids) {
  std::vector<uint32_t> slots = out_[node];
  for (const uint32_t slot : in_[node]) {
    if (flows_[slot].from != node) slots.push_back(slot);
  }
  std::sort(slots.begin(), slots.end(),
            [&](uint32_t a, uint32_t b) { return flows_[a].serial < flows_[b].serial; });
  for (const uint32_t slot : slots) {
    const Flow f = flows_[slot];
    ids.push_back(f.id);
    Detach(slot);
    Share(f.from, f.to, now);
  }
}

void Links::DropStale() {
  while (!endings_.empty()) {
    const Ending& e = endings_.top();
    if (flows_[e.slot].used && flows_[e.slot].version == e.version) return;
    endings_.pop();
  }
}

SimTime Links::next() {
  DropStale();
  return endings_.empty() ? kNever : endings_.top().at;
}

uint64_t Links::Pop() {
  DropStale();
  const Ending e = endings_.top();
  endings_.pop();
  const Flow f = flows_[e.slot];
  Detach(e.slot);
  Share(f.from, f.to, e.at);
  return f.id;
}

}  // namespace tidepool
