#include "kvstore/disk/extent_table.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "base/status.h"

namespace tidepool {
namespace {

// Sizes of records are this many parts of a full one at most, and a full one is this many of the smallest.
constexpr uint32_t kSteps = 32, kLeastParts = 4;
// Where so many victims left no run that is long enough, neighbours of the longest one go: each makes it
// longer.
constexpr int kVictimsBeforeNeighbours = 4;

}  // namespace

ExtentTable::Id ExtentTable::MaxRecords(uint64_t pages, uint32_t record_pages) {
  const uint64_t least = std::max<uint64_t>(1, record_pages / kLeastParts);
  return static_cast<Id>(std::min<uint64_t>(pages / least, std::numeric_limits<Id>::max() - 1));
}

ExtentTable::ExtentTable(uint64_t pages, uint32_t record_pages, std::unique_ptr<EvictionPolicy> policy)
    : pages_(pages),
      record_pages_(record_pages),
      step_pages_((record_pages + kSteps - 1) / kSteps),
      least_pages_(std::max<uint32_t>(1, record_pages / kLeastParts)),
      ids_max_(MaxRecords(pages, record_pages)),
      policy_(std::move(policy)),
      runs_(pages) {}

uint32_t ExtentTable::SizeOf(uint64_t record_bytes) const {
  const uint64_t pages = (record_bytes + kDiskPageBytes - 1) / kDiskPageBytes;
  const uint64_t stepped = (pages + step_pages_ - 1) / step_pages_ * step_pages_;
  return static_cast<uint32_t>(std::clamp<uint64_t>(stepped, least_pages_, record_pages_));
}

ExtentTable::Id ExtentTable::Make(uint64_t page, uint32_t pages) {
  Id id;
  if (free_ids_.empty()) {
    id = static_cast<Id>(extents_.size());
    extents_.emplace_back();
  } else {
    id = free_ids_.back();
    free_ids_.pop_back();
    extents_[id] = Extent{};
  }
  extents_[id].page = page;
  extents_[id].pages = pages;
  by_page_[page] = id;
  return id;
}

void ExtentTable::Free(Id id) {
  Extent& e = extents_[id];
  by_page_.erase(e.page);
  runs_.Give(e.page, e.pages);
  e.state = State::kFree;
  free_ids_.push_back(id);
  if (const Id stale = std::exchange(e.stale, kNone); stale != kNone) Free(stale);
}

void ExtentTable::Fill(Extent& e, const IndexEntry& entry) {
  e.key = entry.key;
  e.has_parent = entry.parent.has_value();
  e.parent = entry.parent.value_or(BlockKey{});
  e.stamp = entry.stamp;
  e.session = entry.session;
  e.payload_bytes = entry.payload_bytes;
  e.stored_bytes = entry.stored_bytes;
  e.encoding = entry.encoding;
  e.version = static_cast<uint8_t>(entry.version);
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

bool ExtentTable::Restore(const IndexEntry& entry, uint64_t record_bytes, bool foreign) {
  if (record_bytes > uint64_t{record_pages_} * kDiskPageBytes || entry.place >= pages_ || !HasId())
    return false;
  // Before there were sizes a place was a record's number.
  const uint64_t page = entry.version == 1 ? entry.place * record_pages_ : entry.place;
  const uint32_t pages = SizeOf(record_bytes);
  if (!foreign && by_key_.contains(entry.key)) return false;
  if (!runs_.TakeAt(page, pages)) return false;
  const Id id = Make(page, pages);
  Extent& e = extents_[id];
  Fill(e, entry);
  e.state = foreign ? State::kForeign : State::kLive;
  if (foreign) {
    foreign_.push_back(id);
    return true;
  }
  by_key_[entry.key] = id;
  ++live_count_;
  live_pages_ += pages;
  return true;
}

void ExtentTable::FinishRestore() {
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
  out.version = e.version;
  out.key = e.key;
  out.place = e.version == 1 ? e.page / record_pages_ : e.page;
  out.stamp = e.stamp;
  if (e.has_parent) out.parent = e.parent;
  out.tenant = tenants_[e.tenant];
  out.session = e.session;
  out.turn = e.turn;
  out.position = e.position;
  out.compute_seconds = e.compute_seconds;
  out.payload_bytes = e.payload_bytes;
  out.encoding = e.encoding;
  out.stored_bytes = e.stored_bytes;
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

std::optional<ExtentTable::Id> ExtentTable::PolicyVictim() {
  while (const auto victim = policy_->Victim(EvictionPolicy::kAnyGroup)) {
    if (extents_[*victim].pins == 0) return victim;
    policy_->ClearCandidate(*victim);  // Unpin offers it again
  }
  return std::nullopt;
}

std::optional<ExtentTable::Id> ExtentTable::Neighbour() const {
  const PageRuns::Run run = runs_.Longest();
  std::optional<Id> found;
  const auto look = [&](Id id) {
    const Extent& e = extents_[id];
    if (e.state != State::kLive || e.pins > 0) return;
    // One that others come after only where there is no choice.
    if (!found.has_value() || e.children < extents_[*found].children) found = id;
  };
  const auto after = by_page_.lower_bound(run.page + run.pages);
  if (after != by_page_.end()) look(after->second);
  if (after != by_page_.begin()) look(std::prev(after)->second);
  return found;
}

void ExtentTable::Leave(Id id) {
  Extent& e = extents_[id];
  by_key_.erase(e.key);
  --live_count_;
  live_pages_ -= e.pages;
}

void ExtentTable::Evict(Id id, std::vector<Removed>& removed) {
  removed.push_back({extents_[id].key});
  Leave(id);
  policy_->OnErase(id, /*evicted=*/true);
  extents_[id].state = State::kRemoved;  // no parent of anybody any more
  Unlink(id);
  Free(id);
}

std::optional<ExtentTable::Id> ExtentTable::Allocate(uint64_t record_bytes, std::vector<Removed>& removed) {
  const uint32_t pages = SizeOf(record_bytes);
  for (int victims = 0;; ++victims) {
    if (const auto page = HasId() ? runs_.Take(pages) : std::nullopt) {
      const Id id = Make(*page, pages);
      extents_[id].state = State::kWriting;
      return id;
    }
    while (!foreign_.empty() && !foreign(foreign_.back())) foreign_.pop_back();
    if (!foreign_.empty()) {
      const Id id = foreign_.back();
      removed.push_back({extents_[id].key, /*foreign=*/true});
      RemoveForeign(id);
      continue;
    }
    auto victim = victims < kVictimsBeforeNeighbours ? std::nullopt : Neighbour();
    if (!victim.has_value()) victim = PolicyVictim();
    if (!victim.has_value()) return std::nullopt;
    Evict(*victim, removed);
  }
}

std::optional<BlockKey> ExtentTable::NextVictim(uint64_t record_bytes) {
  if (HasId() && runs_.Longest().pages >= SizeOf(record_bytes)) return std::nullopt;
  while (!foreign_.empty() && !foreign(foreign_.back())) foreign_.pop_back();
  if (!foreign_.empty()) return std::nullopt;
  const auto victim = PolicyVictim();
  if (!victim.has_value()) return std::nullopt;
  return extents_[*victim].key;
}

void ExtentTable::Commit(Id id, const IndexEntry& entry) {
  Extent& e = extents_[id];
  TP_CHECK(e.state == State::kWriting);
  TP_CHECK(by_key_.try_emplace(entry.key, id).second);
  Fill(e, entry);
  e.state = State::kLive;
  ++live_count_;
  live_pages_ += e.pages;
  policy_->OnInsert(id, {.key = e.key, .position = e.position, .compute_seconds = e.compute_seconds},
                    NextUse());
  policy_->OnRelease(std::array{id}, requests_);
  Link(id);
  Offer(id);
}

void ExtentTable::Relocate(Id id, Id fresh, const IndexEntry& entry) {
  Extent &e = extents_[id], &f = extents_[fresh];
  TP_CHECK(e.state == State::kLive && f.state == State::kWriting && e.stale == kNone);
  live_pages_ += f.pages;
  live_pages_ -= e.pages;
  std::swap(e.page, f.page);
  std::swap(e.pages, f.pages);
  by_page_[e.page] = id;
  by_page_[f.page] = fresh;
  e.stamp = entry.stamp;
  e.version = static_cast<uint8_t>(entry.version);
  e.encoding = entry.encoding;
  e.stored_bytes = entry.stored_bytes;
  if (e.pins == 0) return Free(fresh);
  f.state = State::kStale;
  e.stale = fresh;
}

void ExtentTable::Abandon(Id id) {
  TP_CHECK(extents_[id].state == State::kWriting);
  Free(id);
}

void ExtentTable::Retire(Id id) {
  TP_CHECK(extents_[id].state == State::kWriting);
  extents_[id].state = State::kRetired;
}

void ExtentTable::RemoveForeign(Id id) {
  TP_CHECK(foreign(id));
  Free(id);
}

void ExtentTable::Pin(Id id) {
  TP_CHECK(extents_[id].pins < std::numeric_limits<uint16_t>::max());
  ++extents_[id].pins;
}

void ExtentTable::Unpin(Id id) {
  Extent& e = extents_[id];
  TP_CHECK(e.pins > 0);
  if (--e.pins > 0) return;
  if (e.state == State::kRemoved) return Free(id);
  if (const Id stale = std::exchange(e.stale, kNone); stale != kNone) Free(stale);
  Offer(id);
}

void ExtentTable::Touch(Id id) {
  policy_->OnUse(std::array{id}, NextUse());
  policy_->OnRelease(std::array{id}, requests_);
  Offer(id);  // a policy may take OnUse as the end of being a candidate
}

void ExtentTable::Remove(Id id) {
  Extent& e = extents_[id];
  TP_CHECK(e.state == State::kLive);
  Leave(id);
  policy_->OnErase(id, /*evicted=*/false);
  e.state = State::kRemoved;
  Unlink(id);
  if (extents_[id].pins == 0) Free(id);
}

}  // namespace tidepool
