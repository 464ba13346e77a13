#include "kvstore/pool_core.h"

#include <algorithm>
#include <tuple>

#include "base/status.h"

namespace tidepool {

namespace {
// Tenants are authenticated names, so there are few. Whoever comes beyond shares one account, whose slots are
// wiped at every reassignment.
constexpr size_t kMaxTenants = 1 << 20;
// Requests whose ends are remembered, at least; a large pool remembers one per slot.
constexpr size_t kMinRemembered = 1 << 14;
}  // namespace

PoolCore::PoolCore(Options o)
    : slots_(o.slots),
      infos_(o.slots),
      roots_(o.slots),
      index_(o.slots),
      policy_(std::move(o.policy)),
      slot_bytes_(o.slot_bytes),
      quotas_(o.tenant_quota_bytes > 0 || !o.tenant_quotas.empty()),
      default_quota_(QuotaSlots(o.tenant_quota_bytes)),
      quota_by_name_(std::move(o.tenant_quotas)),
      max_hard_(static_cast<uint32_t>(o.hard_pin_share * o.slots)),
      max_pins_(o.max_pins),
      ends_(std::max<size_t>(kMinRemembered, o.slots)) {
  TP_CHECK(policy_ != nullptr && o.slots > 0 && o.slot_bytes > 0);
  free_.reserve(o.slots);
  for (uint32_t i = o.slots; i-- > 0;) free_.push_back(i);
}

PoolCore::Slot& PoolCore::Get(SlotRef ref) {
  TP_CHECK(ref.slot < slots_.size());
  Slot& s = slots_[ref.slot];
  TP_CHECK(s.generation == ref.generation && s.leases > 0);
  return s;
}

// --- tenants ---

uint32_t PoolCore::TenantId(std::string_view name) {
  if (const auto it = tenant_ids_.find(name); it != tenant_ids_.end()) return it->second;
  if (tenants_.size() >= kMaxTenants) return kMaxTenants - 1;
  const auto id = static_cast<uint32_t>(tenants_.size());
  tenant_ids_.emplace(name, id);
  tenants_.push_back({std::string(name), 0, QuotaOf(std::string(name))});
  return id;
}

uint64_t PoolCore::QuotaOf(const std::string& tenant) const {
  const auto it = quota_by_name_.find(tenant);
  return it == quota_by_name_.end() ? default_quota_ : QuotaSlots(it->second);
}

uint64_t PoolCore::QuotaSlots(uint64_t bytes) const {
  return bytes == 0 ? 0 : std::max<uint64_t>(1, bytes / slot_bytes_);
}

bool PoolCore::SetQuotas(uint64_t tenant_quota_bytes, std::map<std::string, uint64_t> tenant_quotas) {
  const bool first = !quotas_ && (tenant_quota_bytes > 0 || !tenant_quotas.empty());
  // Once ranked by tenant, always: without quotas that costs little and changes nothing.
  quotas_ = quotas_ || first;
  default_quota_ = QuotaSlots(tenant_quota_bytes);
  quota_by_name_ = std::move(tenant_quotas);
  for (Tenant& tenant : tenants_) tenant.quota = QuotaOf(tenant.name);
  return first;
}

size_t PoolCore::TrimTenants(size_t max) {
  size_t evicted = 0;
  for (uint32_t i = 0; i < tenants_.size(); ++i) {
    const Tenant& t = tenants_[i];
    while (evicted < max && t.quota > 0 && t.used > t.quota && EvictOne(i)) ++evicted;
  }
  tally_.evicted_quota += evicted;
  return evicted;
}

void PoolCore::Charge(uint32_t i, uint32_t tenant) {
  Discharge(i);
  slots_[i].tenant = tenant;
  slots_[i].charged = true;
  ++tenants_[tenant].used;
}

void PoolCore::Discharge(uint32_t i) {
  if (slots_[i].charged) --tenants_[slots_[i].tenant].used;
  slots_[i].charged = false;
}

// --- leases ---

void PoolCore::Lease(uint32_t i, LeaseKind kind) {
  Slot& s = slots_[i];
  if (s.leases++ == 0 && s.published()) {
    --idle_;
    if (s.hard == 0) --reclaimable_;
  }
  ++leases_[static_cast<size_t>(kind)];
}

void PoolCore::AddLease(SlotRef ref, LeaseKind kind) {
  Get(ref);
  Lease(ref.slot, kind);
}

void PoolCore::DropLeases(std::span<const SlotRef> refs, LeaseKind kind) {
  scratch_.clear();
  for (const SlotRef& ref : refs) {
    Slot& s = Get(ref);
    --leases_[static_cast<size_t>(kind)];
    if (--s.leases > 0 || s.quarantined) continue;
    if (s.published()) {
      ++idle_;
      if (s.hard == 0) ++reclaimable_;
      scratch_.push_back(ref.slot);
    } else {
      Recycle(ref.slot);
    }
  }
  if (scratch_.empty()) return;
  // Copying a block to another tier is nobody's use of it.
  if (kind != LeaseKind::kTierIo) policy_->OnRelease(scratch_, requests_);
  for (const uint32_t i : scratch_) Refresh(i);
  if (quotas_) {
    for (const SlotRef& ref : refs) TrimTenant(slots_[ref.slot].tenant);
  }
}

void PoolCore::Refresh(uint32_t i) {
  const Slot& s = slots_[i];
  if (IsVictim(s)) policy_->SetCandidate(i, s.soft > 0 ? EvictionBand::kLate : EvictionBand::kNormal);
}

void PoolCore::Recycle(uint32_t i) {
  Discharge(i);
  ++slots_[i].generation;
  free_.push_back(i);
}

bool PoolCore::Reserve(size_t n, const UseOptions& use, absl::Time now, std::vector<Taken>& out) {
  Expire(now);
  if (free_.size() + reclaimable_ < n) return false;
  const uint32_t tenant = TenantId(use.tenant);
  if (const uint64_t quota = tenants_[tenant].quota; quota > 0) {
    while (tenants_[tenant].used + n > quota && EvictOne(tenant)) ++tally_.evicted_quota;
  }
  while (free_.size() < n && EvictOne(EvictionPolicy::kAnyGroup)) ++tally_.evicted_capacity;
  if (free_.size() < n) EvictOrphaning(n - free_.size());
  TP_CHECK(free_.size() >= n);
  for (size_t k = 0; k < n; ++k) {
    const uint32_t i = free_.back();
    free_.pop_back();
    Slot& s = slots_[i];
    const bool zero = s.dirty && (s.tenant != tenant || tenant == kMaxTenants - 1);
    s.dirty = true;
    s.parent_publication = clears_;
    Charge(i, tenant);
    Lease(i, use.kind);
    out.push_back({RefOf(i), zero});
  }
  return true;
}

bool PoolCore::IsSessionEnd(const Slot& s, uint32_t position) const {
  return s.end_of != 0 && position > 0 && s.children <= 1;
}

uint64_t PoolCore::LastTurn(std::span<const BlockKey> keys, std::span<const uint32_t> hits,
                            uint64_t session) {
  if (session != 0) {
    if (const uint64_t last = ends_.NextTurn(session, requests_)) return last;
  }
  for (size_t i = hits.size(); i-- > 0;) {
    if (IsSessionEnd(slots_[hits[i]], static_cast<uint32_t>(i))) return slots_[hits[i]].end_of;
  }
  if (ends_.empty()) return 0;
  for (size_t i = keys.size(); i-- > std::max<size_t>(hits.size(), 1);) {
    if (const uint64_t last = ends_.EndOf(keys[i])) return last;
  }
  return 0;
}

void PoolCore::LeasePrefix(std::span<const BlockKey> keys, const UseOptions& use, std::vector<SlotRef>& out) {
  ++requests_;
  scratch_.clear();
  index_.FindPrefix(keys, scratch_);
  const uint64_t last_turn = LastTurn(keys, scratch_, use.session);
  const bool extends = last_turn != 0;
  if (extends) ++tally_.session_turns;
  uint32_t parent = kNoSlot;
  for (const uint32_t i : scratch_) {
    // Neighbours in a prefix are parent and child: learnt here where the publisher did not say so.
    if (parent != kNoSlot) LinkParent(i, parent);
    parent = i;
    Lease(i, use.kind);
    slots_[i].request = requests_;
    slots_[i].extends = extends;
    out.push_back(RefOf(i));
  }
  // The chain of this request ends here until it publishes more.
  if (parent != kNoSlot && slots_[parent].end_of == 0) slots_[parent].end_of = requests_;
  if (scratch_.size() < keys.size()) ends_.Expect(keys[scratch_.size()], {requests_, extends});
  policy_->OnUse(scratch_, {requests_, extends, extends ? requests_ - last_turn : 0});
}

std::optional<SlotRef> PoolCore::Lease(const BlockKey& key, LeaseKind kind) {
  const uint32_t i = index_.Find(key);
  if (i == kNoSlot) return std::nullopt;
  Lease(i, kind);
  policy_->OnUse(std::span(&i, 1), {requests_, slots_[i].extends});
  return RefOf(i);
}

void PoolCore::LeaseMany(std::span<const BlockKey> keys, LeaseKind kind,
                         std::vector<std::optional<SlotRef>>& out) {
  scratch_.resize(keys.size());
  index_.FindMany(keys, scratch_.data());
  for (const uint32_t i : scratch_) {
    if (i == kNoSlot) {
      out.emplace_back();
    } else {
      Lease(i, kind);
      out.emplace_back(RefOf(i));
    }
  }
}

const BlockInfo* PoolCore::Info(const BlockKey& key) const {
  const uint32_t i = index_.Find(key);
  return i == kNoSlot ? nullptr : &infos_[i];
}

// --- publications ---

uint32_t PoolCore::ParentOf(const Slot& s) const {
  return s.parent != kNoSlot && slots_[s.parent].publication == s.parent_publication ? s.parent : kNoSlot;
}

void PoolCore::LinkParent(uint32_t child, uint32_t parent) {
  Slot& c = slots_[child];
  if (child == parent || ParentOf(c) != kNoSlot) return;
  c.parent = parent;
  c.parent_publication = slots_[parent].publication;
  ++slots_[parent].children;
}

PoolCore::Published PoolCore::Publish(SlotRef ref, LeaseKind kind, BlockInfo info) {
  Slot& s = Get(ref);
  if (s.published()) {
    TP_CHECK(infos_[ref.slot].key == info.key);  // a block's content and name never change
    return {ref, false};
  }
  TP_CHECK(!s.quarantined);
  const uint32_t parent = info.parent ? index_.Find(*info.parent) : kNoSlot;
  if (const uint32_t other = index_.Find(info.key); other != kNoSlot) {
    if (parent != kNoSlot) LinkParent(other, parent);
    Lease(other, kind);
    return {RefOf(other), true};
  }
  const uint32_t i = ref.slot;
  index_.Insert(info.key, i);
  s.publication = ++publications_;
  s.children = 0;
  s.parent = kNoSlot;
  // Which request made it: the last that missed this block, or went through its parent, whichever is later.
  SessionEnds::Maker maker{requests_, false};
  const SessionEnds::Maker* missed = ends_.Expected(info.key);
  if (parent != kNoSlot) maker = {slots_[parent].request, slots_[parent].extends};
  if (missed != nullptr && (parent == kNoSlot || missed->request >= maker.request)) maker = *missed;
  s.request = maker.request;
  s.extends = maker.extends || (info.session != 0 && info.turn > 0);
  s.end_of = s.request;
  roots_[i].reset();
  if (info.position == 0) roots_[i] = info.parent;
  if (parent != kNoSlot) {
    LinkParent(i, parent);
    roots_[i] = roots_[parent];
    // The chain goes on: its end has moved here.
    if (slots_[parent].end_of == s.request) slots_[parent].end_of = 0;
  }
  Charge(i, TenantId(info.tenant));
  infos_[i] = std::move(info);
  policy_->OnInsert(i,
                    {.key = infos_[i].key,
                     .position = infos_[i].position,
                     .compute_seconds = infos_[i].compute_seconds,
                     .group = GroupOf(s)},
                    UseOf(s));
  Emit(PoolEventKind::kStored, infos_[i].key);
  if (watches_ > 0) {
    // Not more of them than slots: the same slot may come by many times.
    if (fresh_.size() >= slots_.size()) std::erase_if(fresh_, [&](const Ref& r) { return !IsLive(r); });
    fresh_.push_back({i, s.publication});
  }
  if (const uint64_t session = infos_[i].session; session != 0) {
    sessions_[session].push_back({i, s.publication});
    if (const auto pin = pin_of_session_.find(session); pin != pin_of_session_.end()) {
      if (!PinSlot(i, pins_.at(pin->second))) ++tally_.pins_refused;
    }
  }
  return {ref, false};
}

// --- clears ---

void PoolCore::Remember(Cleared cleared) {
  ++clears_;
  cleared_.push_back(std::move(cleared));
  if (cleared_.size() > kClearsMax) cleared_.pop_front();
}

void PoolCore::NoteCleared(const BlockFilter& filter) { Remember({.filter = filter, .keys = std::nullopt}); }

void PoolCore::NoteCleared(std::span<const BlockKey> keys) {
  // Too many to remember: everything, which costs misses only.
  constexpr size_t kKeysMax = 4096;
  Cleared cleared;
  if (keys.size() <= kKeysMax) cleared.keys.emplace(keys.begin(), keys.end());
  Remember(std::move(cleared));
}

bool PoolCore::Meets(const Cleared& cleared, const BlockInfo& info) const {
  if (cleared.keys) return cleared.keys->contains(info.key);
  const BlockFilter& filter = cleared.filter;
  if (filter.tenant && info.tenant != *filter.tenant) return false;
  if (filter.session && info.session != *filter.session) return false;
  if (!filter.root) return true;
  // Of a chain whose beginning is gone the root is not known: it may be the one that was cleared.
  if (info.position == 0) return !info.parent || info.parent == filter.root;
  const uint32_t parent = info.parent ? index_.Find(*info.parent) : kNoSlot;
  return parent == kNoSlot || !roots_[parent] || roots_[parent] == filter.root;
}

bool PoolCore::ClearedSince(SlotRef ref, const BlockInfo& info) const {
  const Slot& s = slots_[ref.slot];
  if (s.published() || s.parent_publication == clears_) return false;
  const uint64_t later = clears_ - s.parent_publication;
  return later > cleared_.size() ||
         std::any_of(cleared_.end() - static_cast<std::ptrdiff_t>(later), cleared_.end(),
                     [&](const Cleared& c) { return Meets(c, info); });
}

void PoolCore::Unpublish(uint32_t i, bool evicted) {
  Slot& s = slots_[i];
  const uint32_t parent = ParentOf(s);
  if (s.end_of != 0 && infos_[i].position > 0) ends_.Remember(infos_[i].key, s.end_of);
  if (const uint64_t session = infos_[i].session; session != 0) {
    const auto it = sessions_.find(session);
    // A chain goes from its tail, so it is one of the last.
    auto& blocks = it->second;
    const auto here =
        std::find_if(blocks.rbegin(), blocks.rend(), [&](const Ref& r) { return r.slot == i && IsLive(r); });
    blocks.erase(std::next(here).base());
    if (blocks.empty()) sessions_.erase(it);
  }
  if (s.leases == 0) {
    --idle_;
    if (s.hard == 0) --reclaimable_;
  }
  if (s.hard > 0) --hard_pinned_;
  if (s.hard == 0 && s.soft > 0) --soft_pinned_;
  s.hard = s.soft = 0;  // pin records find the publication changed
  index_.Erase(i);
  policy_->OnErase(i, evicted);
  s.publication = 0;
  s.children = 0;  // so do the children that remain
  s.parent = kNoSlot;
  s.parent_publication = 0;  // whoever still holds it holds what every clear may have meant
  s.end_of = 0;
  infos_[i].tokens = {};
  if (parent != kNoSlot) {
    --slots_[parent].children;
    Refresh(parent);
  }
}

void PoolCore::Evict(uint32_t i) {
  Emit(PoolEventKind::kRemoved, infos_[i].key);
  Unpublish(i, true);
  Recycle(i);
}

bool PoolCore::EvictOne(uint32_t group) {
  while (const auto victim = policy_->Victim(group)) {
    const Slot& s = slots_[*victim];
    if (IsVictim(s)) {
      Evict(*victim);
      return true;
    }
    // Leased, pinned or a parent by now: it comes back when that ends (Refresh).
    policy_->ClearCandidate(*victim);
  }
  return false;
}

void PoolCore::EvictOrphaning(size_t n) {
  std::vector<uint32_t> parents;
  for (uint32_t i = 0; i < slots_.size(); ++i) {
    if (Reclaimable(slots_[i])) parents.push_back(i);
  }
  const auto order = [&](uint32_t i) {
    return std::tuple(slots_[i].soft > 0, slots_[i].request, ~infos_[i].position, i);
  };
  std::sort(parents.begin(), parents.end(), [&](uint32_t a, uint32_t b) { return order(a) < order(b); });
  TP_CHECK(parents.size() >= n);
  for (size_t k = 0; k < n; ++k) Evict(parents[k]);
  tally_.evicted_capacity += n;
  tally_.evicted_orphan += n;
}

void PoolCore::TrimTenant(uint32_t tenant) {
  const Tenant& t = tenants_[tenant];
  while (t.quota > 0 && t.used > t.quota && EvictOne(tenant)) ++tally_.evicted_quota;
}

void PoolCore::Quarantine(SlotRef ref, LeaseKind kind) {
  Slot& s = Get(ref);
  if (!s.quarantined) {
    if (s.published()) {
      Emit(PoolEventKind::kRemoved, infos_[ref.slot].key);
      Unpublish(ref.slot, false);
      ++tally_.removed_quarantine;
    }
    s.quarantined = true;
    Discharge(ref.slot);
    ++quarantined_;
  }
  DropLeases(std::span(&ref, 1), kind);
}

PoolCore::Removed PoolCore::Erase(uint32_t slot, bool pinned, bool quiet) {
  Slot& s = slots_[slot];
  TP_CHECK(s.published());
  if (s.hard > 0 && !pinned) return {.pinned = 1};
  if (!quiet) Emit(PoolEventKind::kRemoved, infos_[slot].key);
  Unpublish(slot, false);
  ++tally_.removed_erase;
  if (s.leases > 0) return {.blocks = 1, .leased = 1};
  Recycle(slot);
  return {.blocks = 1};
}

std::optional<PoolCore::SlotView> PoolCore::View(uint32_t slot) const {
  const Slot& s = slots_[slot];
  if (!s.published()) return std::nullopt;
  return SlotView{&infos_[slot], s.leases, s.hard > 0, s.soft > 0};
}

bool PoolCore::Matches(uint32_t slot, const BlockFilter& filter) const {
  if (!slots_[slot].published()) return false;
  const BlockInfo& info = infos_[slot];
  return (!filter.tenant || info.tenant == *filter.tenant) &&
         (!filter.session || info.session == *filter.session) &&
         (!filter.root || roots_[slot] == filter.root);
}

// --- pins ---

bool PoolCore::PinSlot(uint32_t i, PinRecord& record) {
  Slot& s = slots_[i];
  if (record.kind == PinKind::kHard) {
    if (s.hard == 0) {
      if (hard_pinned_ >= max_hard_) return false;
      ++hard_pinned_;
      if (s.soft > 0) --soft_pinned_;
      if (s.leases == 0) --reclaimable_;
    }
    ++s.hard;
  } else {
    if (s.soft++ == 0 && s.hard == 0) ++soft_pinned_;
  }
  record.blocks.push_back({i, s.publication});
  Refresh(i);  // into the late band, if it may be evicted at all
  return true;
}

absl::StatusOr<uint64_t> PoolCore::AddPin(PinRecord record, const std::vector<uint32_t>& slots) {
  if (pins_.size() >= max_pins_)
    return absl::ResourceExhaustedError(
        "pin: " + std::to_string(pins_.size()) +
        " pins are in force, that is the limit; end some, or wait for their ttl");
  if (record.kind == PinKind::kHard) {
    const auto more = static_cast<uint64_t>(
        std::count_if(slots.begin(), slots.end(), [&](uint32_t i) { return slots_[i].hard == 0; }));
    if (hard_pinned_ + more > max_hard_)
      return absl::ResourceExhaustedError(
          "pin: " + std::to_string(more) + " blocks more than the " + std::to_string(hard_pinned_) +
          " pinned hard exceed the " + std::to_string(max_hard_) + " that kv.hard_pin_percent of " +
          std::to_string(slots_.size()) + " slots allows; pin softly, or unpin others");
  }
  // The new one first: what both pins hold does not come loose in between.
  for (const uint32_t i : slots) PinSlot(i, record);
  const uint64_t id = next_pin_++;
  if (record.key) {
    if (const auto old = pin_of_key_.find(*record.key); old != pin_of_key_.end()) EndPin(old->second);
  } else {
    if (const auto old = pin_of_session_.find(record.session); old != pin_of_session_.end())
      EndPin(old->second);
  }
  (record.key ? pin_of_key_[*record.key] : pin_of_session_[record.session]) = id;
  expiries_.emplace(record.expires, id);
  const uint64_t blocks = record.blocks.size();
  pins_.emplace(id, std::move(record));
  return blocks;
}

void PoolCore::EndPin(uint64_t id) {
  const auto it = pins_.find(id);
  const PinRecord& record = it->second;
  for (const Ref& r : record.blocks) {
    if (!IsLive(r)) continue;
    Slot& s = slots_[r.slot];
    if (record.kind == PinKind::kHard) {
      if (--s.hard == 0) {
        --hard_pinned_;
        if (s.soft > 0) ++soft_pinned_;
        if (s.leases == 0) ++reclaimable_;
      }
    } else {
      if (--s.soft == 0 && s.hard == 0) --soft_pinned_;
    }
    Refresh(r.slot);
  }
  if (record.key) {
    pin_of_key_.erase(*record.key);
  } else if (!record.swapped) {
    pin_of_session_.erase(record.session);
  }
  pins_.erase(it);
}

uint64_t PoolCore::SwapOut(std::span<const SlotRef> refs) {
  // Beyond the limit they are ordinary entries: the request may have to compute more.
  if (pins_.size() >= max_pins_) return 0;
  PinRecord record{.kind = PinKind::kSoft, .expires = absl::InfiniteFuture(), .key = {}, .swapped = true};
  for (const SlotRef& ref : refs) {
    if (Get(ref).published()) PinSlot(ref.slot, record);
  }
  if (record.blocks.empty()) return 0;
  leases_[static_cast<size_t>(LeaseKind::kSwapped)] += record.blocks.size();
  const uint64_t id = next_pin_++;
  pins_.emplace(id, std::move(record));
  return id;
}

void PoolCore::SwapIn(uint64_t id) {
  const auto it = pins_.find(id);
  if (it == pins_.end()) return;
  TP_CHECK(it->second.swapped);
  leases_[static_cast<size_t>(LeaseKind::kSwapped)] -= it->second.blocks.size();
  EndPin(id);
}

absl::StatusOr<uint64_t> PoolCore::Pin(const BlockKey& key, PinKind kind, absl::Time expires,
                                       absl::Time now) {
  Expire(now);
  uint32_t i = index_.Find(key);
  if (i == kNoSlot) return absl::NotFoundError("pin: block " + key.ToHex() + " is not on the host tier");
  std::vector<uint32_t> chain;
  // Parents that a caller made up may go in a circle: no chain is longer than the pool.
  for (; i != kNoSlot && chain.size() < slots_.size(); i = ParentOf(slots_[i])) chain.push_back(i);
  return AddPin({.kind = kind, .expires = expires, .key = key}, chain);
}

absl::StatusOr<uint64_t> PoolCore::PinSession(uint64_t session, PinKind kind, absl::Time expires,
                                              absl::Time now) {
  Expire(now);
  std::vector<uint32_t> blocks;
  std::vector<bool> seen(slots_.size());
  if (const auto it = sessions_.find(session); it != sessions_.end()) {
    for (const Ref& r : it->second) {
      for (uint32_t i = r.slot; i != kNoSlot && !seen[i]; i = ParentOf(slots_[i])) {
        seen[i] = true;
        blocks.push_back(i);
      }
    }
  }
  return AddPin({.kind = kind, .expires = expires, .session = session}, blocks);
}

bool PoolCore::Unpin(const BlockKey& key, absl::Time now) {
  Expire(now);
  const auto it = pin_of_key_.find(key);
  if (it == pin_of_key_.end()) return false;
  EndPin(it->second);
  return true;
}

bool PoolCore::UnpinSession(uint64_t session, absl::Time now) {
  Expire(now);
  const auto it = pin_of_session_.find(session);
  if (it == pin_of_session_.end()) return false;
  EndPin(it->second);
  return true;
}

void PoolCore::Expire(absl::Time now) {
  while (!expiries_.empty() && expiries_.top().first <= now) {
    const uint64_t id = expiries_.top().second;
    expiries_.pop();
    if (!pins_.contains(id)) continue;
    EndPin(id);
    ++tally_.pins_expired;
  }
}

// --- the whole ---

void PoolCore::SetPolicy(std::unique_ptr<EvictionPolicy> policy) {
  policy_ = std::move(policy);
  std::vector<uint32_t> published;
  for (uint32_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].published()) published.push_back(i);
  }
  // A policy that orders by arrival sees them in the order of their last use.
  std::sort(published.begin(), published.end(),
            [&](uint32_t a, uint32_t b) { return slots_[a].request < slots_[b].request; });
  for (const uint32_t i : published) {
    const Slot& s = slots_[i];
    policy_->OnInsert(i,
                      {.key = infos_[i].key,
                       .position = infos_[i].position,
                       .compute_seconds = infos_[i].compute_seconds,
                       .group = GroupOf(s)},
                      UseOf(s));
    Refresh(i);
  }
}

PoolCore::Counts PoolCore::counts() const {
  const auto free = static_cast<uint32_t>(free_.size());
  return {.free = free,
          .evictable = idle_,
          .leased = slots() - free - idle_ - quarantined_,
          .quarantined = quarantined_,
          .hard_pinned = hard_pinned_,
          .soft_pinned = soft_pinned_,
          .published = index_.size(),
          .pins = pins_.size(),
          .leases = leases_};
}

}  // namespace tidepool
