#include "kvstore/disk/extent_table.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "base/status.h"

namespace tidepool {

ExtentTable::ExtentTable(Id extents, std::unique_ptr<EvictionPolicy> policy)
    : capacity_(extents), policy_(std::move(policy)) {
  free_.reserve(capacity_);
  for (Id id = capacity_; id > 0; --id) free_.push_back(id - 1);  // the front of the file first
}

ExtentTable::Extent& ExtentTable::Grow(Id id) {
  if (id >= extents_.size()) extents_.resize(id + 1);
  return extents_[id];
}

void ExtentTable::Fill(Extent& e, const IndexEntry& entry) {
  e.key = entry.key;
  e.has_parent = entry.parent.has_value();
  e.parent = entry.parent.value_or(BlockKey{});
  e.stamp = entry.stamp;
  e.session = entry.session;
  e.payload_bytes = entry.payload_bytes;
  e.turn = entry.turn;
  e.position = entry.position;
  e.compute_seconds = entry.compute_seconds;
  e.stored_at = entry.stored_at;
  const auto [it, added] = tenant_ids_.try_emplace(entry.tenant, static_cast<uint32_t>(tenants_.size()));
  if (added) tenants_.push_back(entry.tenant);
  e.tenant = it->second;
  e.children = 0;
  e.linked = kNone;
}

bool ExtentTable::Restore(const IndexEntry& entry, bool foreign) {
  if (entry.extent >= capacity_) return false;
  const auto id = static_cast<Id>(entry.extent);
  Extent& e = Grow(id);
  if (e.state != State::kFree) return false;
  if (!foreign && !by_key_.try_emplace(entry.key, id).second) return false;
  Fill(e, entry);
  e.state = foreign ? State::kForeign : State::kLive;
  if (foreign) foreign_.push_back(id);
  live_count_ += !foreign;
  return true;
}

void ExtentTable::FinishRestore() {
  std::erase_if(free_, [&](Id id) { return id < extents_.size() && extents_[id].state != State::kFree; });
  std::vector<Id> by_age;
  by_age.reserve(live_count_);
  for (Id id = 0; id < size(); ++id) {
    if (live(id)) by_age.push_back(id);
  }
  std::ranges::sort(by_age, {},
                    [&](Id id) { return std::pair(extents_[id].stored_at, extents_[id].stamp.serial); });
  for (const Id id : by_age) {
    const Extent& e = extents_[id];
    policy_->OnInsert(id, {.key = e.key, .position = e.position, .compute_seconds = e.compute_seconds},
                      NextUse());
    policy_->OnRelease(std::array{id}, requests_);
  }
  // The index is in the order of keys: children may have come before their parents.
  for (const Id id : by_age) Link(id);
  for (const Id id : by_age) Offer(id);
}

std::optional<ExtentTable::Id> ExtentTable::Find(const BlockKey& key) const {
  const auto it = by_key_.find(key);
  if (it == by_key_.end()) return std::nullopt;
  return it->second;
}

IndexEntry ExtentTable::Entry(Id id) const {
  const Extent& e = extents_[id];
  IndexEntry out;
  out.key = e.key;
  out.extent = id;
  out.stamp = e.stamp;
  if (e.has_parent) out.parent = e.parent;
  out.tenant = tenants_[e.tenant];
  out.session = e.session;
  out.turn = e.turn;
  out.position = e.position;
  out.compute_seconds = e.compute_seconds;
  out.payload_bytes = e.payload_bytes;
  out.stored_at = e.stored_at;
  return out;
}

TierEntry ExtentTable::Listed(Id id) const {
  const Extent& e = extents_[id];
  return {.key = e.key,
          .parent = e.has_parent ? std::optional(e.parent) : std::nullopt,
          .tenant = tenants_[e.tenant],
          .session = e.session,
          .turn = e.turn,
          .position = e.position,
          .bytes = e.payload_bytes};
}

void ExtentTable::Link(Id id) {
  Extent& e = extents_[id];
  if (!e.has_parent) return;
  const auto parent = Find(e.parent);
  if (!parent.has_value() || *parent == id) return;
  e.linked = *parent;
  if (extents_[*parent].children++ == 0) policy_->ClearCandidate(*parent);
}

// The parent may be gone, and its extent in use for another block: only one that is still the parent counts.
void ExtentTable::Unlink(Id id) {
  Extent& e = extents_[id];
  const Id parent = std::exchange(e.linked, kNone);
  if (parent == kNone || !live(parent) || extents_[parent].key != e.parent) return;
  if (extents_[parent].children == 0) return;
  if (--extents_[parent].children == 0) Offer(parent);
}

void ExtentTable::Offer(Id id) {
  const Extent& e = extents_[id];
  if (e.state == State::kLive && e.children == 0 && e.pins == 0) {
    policy_->SetCandidate(id, EvictionBand::kNormal);
  }
}

std::optional<ExtentTable::Id> ExtentTable::Allocate(std::vector<Removed>& removed) {
  while (free_.empty() && !foreign_.empty()) {
    const Id id = foreign_.back();
    foreign_.pop_back();
    if (!foreign(id)) continue;
    removed.push_back({extents_[id].key, /*foreign=*/true});
    RemoveForeign(id);
  }
  while (free_.empty()) {
    const auto victim = policy_->Victim(EvictionPolicy::kAnyGroup);
    if (!victim.has_value()) return std::nullopt;
    if (extents_[*victim].pins > 0) {
      policy_->ClearCandidate(*victim);  // Unpin offers it again
      continue;
    }
    removed.push_back({extents_[*victim].key});
    by_key_.erase(extents_[*victim].key);
    --live_count_;
    policy_->OnErase(*victim, /*evicted=*/true);
    extents_[*victim].state = State::kFree;
    free_.push_back(*victim);
    Unlink(*victim);
  }
  const Id id = free_.back();
  free_.pop_back();
  Grow(id).state = State::kWriting;
  return id;
}

void ExtentTable::Commit(Id id, const IndexEntry& entry) {
  Extent& e = extents_[id];
  TP_CHECK(e.state == State::kWriting);
  TP_CHECK(by_key_.try_emplace(entry.key, id).second);
  Fill(e, entry);
  e.state = State::kLive;
  ++live_count_;
  policy_->OnInsert(id, {.key = e.key, .position = e.position, .compute_seconds = e.compute_seconds},
                    NextUse());
  policy_->OnRelease(std::array{id}, requests_);
  Link(id);
  Offer(id);
}

void ExtentTable::Abandon(Id id) {
  TP_CHECK(extents_[id].state == State::kWriting);
  extents_[id].state = State::kFree;
  free_.push_back(id);
}

void ExtentTable::Retire(Id id) {
  TP_CHECK(extents_[id].state == State::kWriting);
  extents_[id].state = State::kRetired;
}

void ExtentTable::RemoveForeign(Id id) {
  TP_CHECK(foreign(id));
  extents_[id].state = State::kFree;
  free_.push_back(id);
}

void ExtentTable::Pin(Id id) {
  TP_CHECK(extents_[id].pins < std::numeric_limits<uint16_t>::max());
  ++extents_[id].pins;
}

void ExtentTable::Unpin(Id id) {
  Extent& e = extents_[id];
  TP_CHECK(e.pins > 0);
  if (--e.pins > 0) return;
  if (e.state == State::kRemoved) {
    e.state = State::kFree;
    free_.push_back(id);
  } else {
    Offer(id);
  }
}

void ExtentTable::Touch(Id id) {
  policy_->OnUse(std::array{id}, NextUse());
  policy_->OnRelease(std::array{id}, requests_);
  Offer(id);  // a policy may take OnUse as the end of being a candidate
}

void ExtentTable::Remove(Id id) {
  Extent& e = extents_[id];
  TP_CHECK(e.state == State::kLive);
  by_key_.erase(e.key);
  --live_count_;
  policy_->OnErase(id, /*evicted=*/false);
  if (e.pins > 0) {
    e.state = State::kRemoved;
  } else {
    e.state = State::kFree;
    free_.push_back(id);
  }
  Unlink(id);
}

}  // namespace tidepool
