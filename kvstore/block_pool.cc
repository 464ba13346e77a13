#include "kvstore/block_pool.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "base/log.h"
#include "base/status.h"
#include "kvstore/arena.h"
#include "kvstore/huge_pages.h"
#include "kvstore/policy/tuner.h"
#include "kvstore/pool_core.h"
#include "kvstore/probe.h"

namespace tidepool {

namespace {
// Slots that a listing or a removal by filter looks at, and blocks that a removal removes, before it lets
// others in.
constexpr uint32_t kStep = 4096;
constexpr uint32_t kRemoveStep = 256;
constexpr uint32_t kMaxSlots = 1u << 31;
// About as long as a step. A lock that is taken again at once is never seen free by who waits for it: without
// a pause others waited 40 to 90 ms while a million blocks were cleared.
constexpr std::chrono::microseconds kBetweenSteps{20};
void LetOthersIn() { std::this_thread::sleep_for(kBetweenSteps); }
// What a tuned pool begins with.
const char* const kFirstPolicy = "turn-aware";
}  // namespace

struct BlockPool::State {
  State(const Options& o, SlotArena a, PoolCore::Options c)
      : options(o),
        arena(std::move(a)),
        log(o.events ? o.events : std::make_shared<EventLog>(o.max_events, &EventsLost(*o.metrics))),
        core(std::move(c)),
        probe(*o.metrics, TierName(Tier::kHost)) {}

  const Options options;
  SlotArena arena;
  const std::shared_ptr<EventLog> log;

  std::mutex tuner_mu;  // taken before mu
  std::unique_ptr<PolicyTuner> tuner;

  mutable std::mutex mu;  // guards everything below
  PoolCore core;
  PoolCore::Tally exported;
  PoolProbe probe;

  std::optional<HugePageMaker> huge_pages;  // set before others see the pool; ends before the arena

  absl::Time Now() const { return options.clock->Now(); }

  // The request goes to the ghosts, too; they may find that another policy does better.
  void Tune(std::span<const BlockKey> keys, uint64_t session) {
    if (tuner == nullptr) return;
    std::lock_guard lock(tuner_mu);
    const std::optional<std::string> better = tuner->OnRequest(keys, session);
    if (!better) return;
    absl::StatusOr<std::unique_ptr<EvictionPolicy>> policy =
        CreatePolicy({.name = *better, .capacity = options.slots});
    TP_CHECK(policy.ok());  // the tuner knows the names
    spdlog::info("block pool: eviction policy {} from now on, it did better on a sample", *better);
    probe.policy_switches.Add();
    std::lock_guard core_lock(mu);
    core.SetPolicy(std::move(*policy));
  }

  // Ends every change: what happened goes to the log, in the order in which it happened, and to the metrics.
  void Settle() {
    if (!core.events().empty()) {
      log->Append(core.events());
      core.events().clear();
    }
    const PoolCore::Tally& now = core.tally();
    const auto add = [&](Counter& counter, uint64_t PoolCore::Tally::*field) {
      if (now.*field != exported.*field) counter.Add(now.*field - exported.*field);
    };
    add(probe.evicted_capacity, &PoolCore::Tally::evicted_capacity);
    add(probe.evicted_quota, &PoolCore::Tally::evicted_quota);
    add(probe.evicted_quarantine, &PoolCore::Tally::removed_quarantine);
    add(probe.erased, &PoolCore::Tally::removed_erase);
    add(probe.session_turns, &PoolCore::Tally::session_turns);
    add(probe.pins_expired, &PoolCore::Tally::pins_expired);
    add(probe.pins_refused, &PoolCore::Tally::pins_refused);
    exported = now;

    const PoolCore::Counts c = core.counts();
    const auto total = static_cast<double>(core.slots());
    probe.usage.Set((c.leased + c.quarantined) / total);
    probe.bytes.Set(static_cast<double>(c.leased + c.evictable) *
                    static_cast<double>(options.layout.block_bytes()));
    probe.objects.Set(static_cast<double>(c.published));
    probe.quarantined.Set(c.quarantined);
    probe.pinned_hard.Set(c.hard_pinned);
    probe.pinned_soft.Set(c.soft_pinned);
    for (size_t k = 0; k < kLeaseKinds; ++k) probe.leases[k]->Set(static_cast<double>(c.leases[k]));
  }
};

// --- BlockLease ---

BlockLease& BlockLease::operator=(BlockLease&& other) noexcept {
  if (this != &other) {
    BlockLease dropped(std::move(*this));
    owner_ = std::exchange(other.owner_, nullptr);
    generation_ = other.generation_;
    slot_ = other.slot_;
    kind_ = other.kind_;
  }
  return *this;
}

std::span<std::byte> BlockLease::data() const {
  TP_CHECK(owner_ != nullptr);
  return owner_->SlotBytes(slot_);
}

void BlockLease::Drop() {
  const SlotRef slot = ref();
  owner_->DropLeases(std::span(&slot, 1), kind_);
}

BlockLease BlockLease::Clone(LeaseKind kind) const {
  TP_CHECK(owner_ != nullptr);
  const SlotRef slot = ref();
  owner_->AddLeases(std::span(&slot, 1), kind);
  return BlockLease(owner_, slot, kind);
}

std::vector<BlockLease> BlockLease::CloneAll(std::span<const BlockLease> leases, LeaseKind kind) {
  std::vector<BlockLease> out;
  std::vector<SlotRef> refs;
  out.reserve(leases.size());
  refs.reserve(leases.size());
  for (size_t at = 0; at < leases.size();) {
    BlockPool* const owner = leases[at].owner_;
    refs.clear();
    for (; at < leases.size() && leases[at].owner_ == owner; ++at) {
      refs.push_back(leases[at].ref());
      out.push_back(BlockLease(owner, refs.back(), kind));
    }
    if (owner != nullptr) owner->AddLeases(refs, kind);
  }
  return out;
}

void BlockLease::DropAll(std::vector<BlockLease> leases) {
  std::vector<SlotRef> refs;
  refs.reserve(leases.size());
  for (size_t at = 0; at < leases.size();) {
    BlockPool* const owner = leases[at].owner_;
    const LeaseKind kind = leases[at].kind_;
    refs.clear();
    for (; at < leases.size() && leases[at].owner_ == owner && leases[at].kind_ == kind; ++at) {
      refs.push_back(leases[at].ref());
      leases[at].owner_ = nullptr;
    }
    if (owner != nullptr) owner->DropLeases(refs, kind);
  }
}

// --- BlockPool ---

absl::StatusOr<std::unique_ptr<BlockPool>> BlockPool::Create(const Options& options) {
  const BlockLayout& l = options.layout;
  if (l.layers == 0 || l.kv_heads == 0 || l.head_dim == 0 || l.block_tokens == 0)
    return absl::InvalidArgumentError("block pool: layout '" + l.ToString() +
                                      "' has a zero in it; every dimension must be at least 1");
  if (options.slots == 0)
    return absl::InvalidArgumentError("block pool: no slots: kv.host_bytes must hold at least one block of " +
                                      std::to_string(l.block_bytes()) + " bytes");
  if (options.slots > kMaxSlots)
    return absl::InvalidArgumentError("block pool: " + std::to_string(options.slots) +
                                      " slots are more than the " + std::to_string(kMaxSlots) +
                                      " that can be indexed; lower kv.host_bytes");
  if (!(options.hard_pin_share >= 0 && options.hard_pin_share <= 1))
    return absl::InvalidArgumentError("block pool: kv.hard_pin_percent must be between 0 and 100");
  TP_CHECK(options.metrics != nullptr && options.clock != nullptr);
  // The arena first: a size that cannot be had is refused before anything is allocated by the slot.
  TP_ASSIGN_OR_RETURN(SlotArena arena, SlotArena::Map(l.block_bytes(), options.slots, options.memory));
  const bool tuned = options.policy == "auto";
  TP_ASSIGN_OR_RETURN(std::unique_ptr<EvictionPolicy> policy,
                      CreatePolicy({.name = tuned ? kFirstPolicy : options.policy,
                                    .capacity = options.slots,
                                    .next_use = options.next_use,
                                    .turn_bonus = options.turn_bonus}));
  PoolCore::Options core{.slots = options.slots,
                         .slot_bytes = l.block_bytes(),
                         .policy = std::move(policy),
                         .tenant_quota_bytes = options.tenant_quota_bytes,
                         .tenant_quotas = options.tenant_quotas,
                         .hard_pin_share = options.hard_pin_share};
  auto state = std::make_unique<State>(options, std::move(arena), std::move(core));
  if (const std::span<std::byte> memory = state->arena.for_huge_pages(); !memory.empty()) {
    state->huge_pages.emplace(memory, *options.metrics);
  } else {
    HugePageProbe(*options.metrics).bytes.Set(static_cast<double>(state->arena.reserved_huge_bytes()));
  }
  if (tuned)
    state->tuner =
        std::make_unique<PolicyTuner>(PolicyTuner::Options{.slots = options.slots, .policy = kFirstPolicy});
  return std::unique_ptr<BlockPool>(new BlockPool(std::move(state)));
}

BlockPool::BlockPool(std::unique_ptr<State> state) : state_(std::move(state)) {}

BlockPool::~BlockPool() {
  std::lock_guard lock(state_->mu);
  const PoolCore::Counts counts = state_->core.counts();
  const uint64_t leases = std::accumulate(counts.leases.begin(), counts.leases.end(), uint64_t{0});
  TP_CHECK(leases == 0);
  if (counts.quarantined > 0) {
    spdlog::warn("block pool: {} quarantined slots: the arena stays mapped", counts.quarantined);
    state_->arena.Abandon();
  }
}

const BlockLayout& BlockPool::layout() const { return state_->options.layout; }

const SlotArena& BlockPool::arena() const { return state_->arena; }
std::span<std::byte> BlockPool::SlotBytes(uint32_t slot) const { return state_->arena.slot(slot); }

void BlockPool::AddLeases(std::span<const SlotRef> refs, LeaseKind kind) {
  std::lock_guard lock(state_->mu);
  for (const SlotRef& ref : refs) state_->core.AddLease(ref, kind);
  state_->Settle();
}

void BlockPool::DropLeases(std::span<const SlotRef> refs, LeaseKind kind) {
  std::lock_guard lock(state_->mu);
  state_->core.DropLeases(refs, kind);
  state_->Settle();
}

absl::StatusOr<std::vector<BlockLease>> BlockPool::Reserve(size_t n, const UseOptions& use) {
  State& st = *state_;
  std::vector<PoolCore::Taken> taken;
  taken.reserve(std::min<size_t>(n, st.core.slots()));
  {
    std::lock_guard lock(st.mu);
    const bool fits = st.core.Reserve(n, use, st.Now(), taken);
    (fits ? st.probe.reserve_ok : st.probe.reserve_full).Add();
    st.Settle();
    if (!fits) {
      const PoolCore::Counts c = st.core.counts();
      return absl::ResourceExhaustedError(
          "block pool: no room for " + std::to_string(n) + " blocks: " + std::to_string(c.leased) + " of " +
          std::to_string(st.core.slots()) + " leased, " + std::to_string(c.hard_pinned) + " pinned, " +
          std::to_string(c.quarantined) + " quarantined");
    }
  }
  if (st.huge_pages) {
    uint32_t slots = 0;
    for (const PoolCore::Taken& t : taken) slots = std::max(slots, t.ref.slot + 1);
    st.huge_pages->OnUsed(slots * st.arena.stride());
  }
  std::vector<BlockLease> out;
  out.reserve(n);
  for (const PoolCore::Taken& t : taken) {
    if (t.zero) {
      // Nobody else can see the slot yet, so the lock is not needed.
      const std::span<std::byte> bytes = st.arena.slot(t.ref.slot);
      std::memset(bytes.data(), 0, bytes.size());
      st.probe.zeroed.Add();
    }
    out.push_back(BlockLease(this, t.ref, use.kind));
  }
  return out;
}

std::vector<BlockLease> BlockPool::LeasePrefix(std::span<const BlockKey> keys, const UseOptions& use) {
  State& st = *state_;
  std::vector<SlotRef> refs;
  refs.reserve(keys.size());
  {
    std::lock_guard lock(st.mu);
    st.core.LeasePrefix(keys, use, refs);
    st.probe.lookup_hit.Add(refs.size());
    if (refs.size() < keys.size()) st.probe.lookup_miss.Add();
    st.Settle();
  }
  st.Tune(keys, use.session);
  std::vector<BlockLease> out;
  out.reserve(refs.size());
  for (const SlotRef& ref : refs) out.push_back(BlockLease(this, ref, use.kind));
  return out;
}

std::optional<BlockLease> BlockPool::Lease(const BlockKey& key, LeaseKind kind) {
  State& st = *state_;
  std::lock_guard lock(st.mu);
  const std::optional<SlotRef> ref = st.core.Lease(key, kind);
  (ref ? st.probe.lookup_hit : st.probe.lookup_miss).Add();
  st.Settle();
  if (!ref) return std::nullopt;
  return BlockLease(this, *ref, kind);
}

std::vector<BlockLease> BlockPool::LeaseMany(std::span<const BlockKey> keys, LeaseKind kind) {
  State& st = *state_;
  std::vector<std::optional<SlotRef>> refs;
  refs.reserve(keys.size());
  {
    std::lock_guard lock(st.mu);
    st.core.LeaseMany(keys, kind, refs);
    st.Settle();
  }
  std::vector<BlockLease> out;
  out.reserve(refs.size());
  for (const auto& ref : refs) {
    if (ref) {
      out.push_back(BlockLease(this, *ref, kind));
    } else {
      out.emplace_back();
    }
  }
  return out;
}

size_t BlockPool::MatchPrefix(std::span<const BlockKey> keys) const {
  std::vector<uint32_t> slots;
  slots.reserve(keys.size());
  std::lock_guard lock(state_->mu);
  return state_->core.index().FindPrefix(keys, slots);
}

std::vector<bool> BlockPool::Contains(std::span<const BlockKey> keys) const {
  std::vector<uint32_t> slots(keys.size());
  {
    std::lock_guard lock(state_->mu);
    state_->core.index().FindMany(keys, slots.data());
  }
  std::vector<bool> out(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) out[i] = slots[i] != PoolCore::kNoSlot;
  return out;
}

BlockLease BlockPool::Publish(BlockLease lease, BlockInfo info) {
  TP_CHECK(lease.owner_ == this);
  BlockLease given_up;  // after the lock is
  std::lock_guard lock(state_->mu);
  return PublishLocked(std::move(lease), std::move(info), given_up);
}

bool BlockPool::PublishLoaded(BlockLease& lease, BlockInfo info) {
  TP_CHECK(lease.owner_ == this);
  State& st = *state_;
  BlockLease given_up;  // after the lock is
  std::lock_guard lock(st.mu);
  if (st.core.index().Find(info.key) == PoolCore::kNoSlot && st.core.ClearedSince(lease.ref(), info)) {
    st.probe.publish_cleared.Add();
    return false;
  }
  lease = PublishLocked(std::move(lease), std::move(info), given_up);
  return true;
}

// Holds mu. `given_up`: the slot of a duplicate.
BlockLease BlockPool::PublishLocked(BlockLease lease, BlockInfo info, BlockLease& given_up) {
  State& st = *state_;
  const PoolCore::Published published = st.core.Publish(lease.ref(), lease.kind_, std::move(info));
  (published.duplicate ? st.probe.publish_duplicate : st.probe.publish_ok).Add();
  st.Settle();
  if (!published.duplicate) return lease;
  given_up = std::move(lease);
  return BlockLease(this, published.ref, given_up.kind_);
}

std::optional<BlockInfo> BlockPool::Info(const BlockKey& key) const {
  std::lock_guard lock(state_->mu);
  const BlockInfo* info = state_->core.Info(key);
  if (info == nullptr) return std::nullopt;
  return *info;
}

SwappedBlocks BlockPool::SwapOut(std::vector<BlockLease> leases) {
  std::vector<SlotRef> refs;
  refs.reserve(leases.size());
  for (const BlockLease& lease : leases) {
    if (lease.owner_ == this) refs.push_back(lease.ref());
  }
  SwappedBlocks out;
  {
    std::lock_guard lock(state_->mu);
    const uint64_t id = state_->core.SwapOut(refs);
    if (id != 0) out = SwappedBlocks(this, id);
    state_->Settle();
  }
  BlockLease::DropAll(std::move(leases));
  return out;
}

void BlockPool::SwapIn(uint64_t id) {
  std::lock_guard lock(state_->mu);
  state_->core.SwapIn(id);
  state_->Settle();
}

SwappedBlocks& SwappedBlocks::operator=(SwappedBlocks&& other) noexcept {
  if (this != &other) {
    Drop();
    pool_ = std::exchange(other.pool_, nullptr);
    id_ = other.id_;
  }
  return *this;
}

void SwappedBlocks::Drop() {
  if (pool_ != nullptr) std::exchange(pool_, nullptr)->SwapIn(id_);
}

void BlockPool::Quarantine(BlockLease lease) {
  TP_CHECK(lease.owner_ == this);
  State& st = *state_;
  std::lock_guard lock(st.mu);
  const uint32_t before = st.core.counts().quarantined;
  st.core.Quarantine(lease.ref(), lease.kind_);
  lease.owner_ = nullptr;
  const uint32_t after = st.core.counts().quarantined;
  if (after > before) {
    spdlog::warn("block pool: slot {} generation {} quarantined, {} in all", lease.slot_, lease.generation_,
                 after);
  }
  st.Settle();
}

BlockPool::Page BlockPool::List(uint64_t cursor, size_t max, const BlockFilter& filter) const {
  const State& st = *state_;
  Page page;
  const uint64_t slots = st.core.slots();
  while (cursor < slots && page.entries.size() < max) {
    std::lock_guard lock(st.mu);
    const uint64_t end = std::min<uint64_t>(slots, cursor + kStep);
    for (; cursor < end && page.entries.size() < max; ++cursor) {
      const auto slot = static_cast<uint32_t>(cursor);
      if (!st.core.Matches(slot, filter)) continue;
      const auto view = st.core.View(slot);
      page.entries.push_back({*view->info, view->leases, view->hard_pinned, view->soft_pinned});
    }
  }
  if (cursor < slots) page.next = cursor;
  return page;
}

BlockPool::Removed BlockPool::Erase(std::span<const BlockKey> keys, bool pinned,
                                    std::optional<Tier> moved_to) {
  State& st = *state_;
  Removed out;
  for (bool first = true; !keys.empty(); first = false) {
    const size_t n = std::min<size_t>(keys.size(), kRemoveStep);
    {
      std::lock_guard lock(st.mu);
      if (first && !moved_to) st.core.NoteCleared(keys);
      for (const BlockKey& key : keys.first(n)) {
        const uint32_t slot = st.core.index().Find(key);
        if (slot == PoolCore::kNoSlot) continue;
        const PoolCore::Removed r = st.core.Erase(slot, pinned, moved_to.has_value());
        if (moved_to && r.blocks > 0)
          st.core.events().push_back(
              {.kind = PoolEventKind::kMoved, .tier = *moved_to, .from = Tier::kHost, .key = key});
        out.blocks += r.blocks;
        out.leased += r.leased;
        out.pinned += r.pinned;
      }
      st.Settle();
    }
    keys = keys.subspan(n);
    if (!keys.empty()) LetOthersIn();
  }
  out.bytes = out.blocks * layout().block_bytes();
  return out;
}

BlockPool::Removed BlockPool::Clear(const BlockFilter& filter, bool pinned) {
  State& st = *state_;
  Removed out;
  const uint32_t slots = st.core.slots();
  // Where nothing stays, one event stands for all. What is published meanwhile, behind the pass, or pinned in
  // front of it, is announced again after it.
  bool whole = false;
  std::vector<uint32_t> stay;
  for (uint32_t at = 0; at < slots;) {
    {
      std::lock_guard lock(st.mu);
      if (at == 0) {
        st.core.NoteCleared(filter);
        whole = filter.all() && (pinned || st.core.counts().hard_pinned == 0);
        if (whole) st.core.BeginWatch();
      }
      const uint32_t end = std::min(slots, at + std::min(kStep, slots - at));
      for (uint64_t removed = 0; at < end && removed < kRemoveStep; ++at) {
        if (!st.core.Matches(at, filter)) continue;
        const PoolCore::Removed r = st.core.Erase(at, pinned, whole);
        removed += r.blocks;
        out.blocks += r.blocks;
        out.leased += r.leased;
        out.pinned += r.pinned;
        if (whole && r.pinned > 0) stay.push_back(at);
      }
      if (at == slots && whole) {
        std::vector<PoolEvent>& events = st.core.events();
        events.push_back({.kind = PoolEventKind::kCleared});
        for (const uint32_t i : stay) {
          if (const auto view = st.core.View(i)) events.push_back({.key = view->info->key});
        }
        st.core.ForEachFresh([&](const BlockKey& key) { events.push_back({.key = key}); });
        st.core.EndWatch();
      }
      st.Settle();
    }
    if (at < slots) LetOthersIn();
  }
  out.bytes = out.blocks * layout().block_bytes();
  return out;
}

absl::StatusOr<BlockPool::Pinned> BlockPool::Pin(const BlockKey& key, PinKind kind, absl::Duration ttl) {
  if (ttl <= absl::ZeroDuration()) return absl::InvalidArgumentError("pin: ttl must be above 0");
  State& st = *state_;
  std::lock_guard lock(st.mu);
  const absl::Time now = st.Now();
  const absl::StatusOr<uint64_t> blocks = st.core.Pin(key, kind, now + ttl, now);
  st.Settle();
  TP_RETURN_IF_ERROR(blocks.status());
  return Pinned{*blocks, *blocks * layout().block_bytes()};
}

absl::StatusOr<BlockPool::Pinned> BlockPool::PinSession(uint64_t session, PinKind kind, absl::Duration ttl) {
  if (ttl <= absl::ZeroDuration()) return absl::InvalidArgumentError("pin: ttl must be above 0");
  if (session == 0) return absl::InvalidArgumentError("pin: session 0 means none; give the session's number");
  State& st = *state_;
  std::lock_guard lock(st.mu);
  const absl::Time now = st.Now();
  const absl::StatusOr<uint64_t> blocks = st.core.PinSession(session, kind, now + ttl, now);
  st.Settle();
  TP_RETURN_IF_ERROR(blocks.status());
  return Pinned{*blocks, *blocks * layout().block_bytes()};
}

bool BlockPool::Unpin(const BlockKey& key) {
  std::lock_guard lock(state_->mu);
  const bool there = state_->core.Unpin(key, state_->Now());
  state_->Settle();
  return there;
}

bool BlockPool::UnpinSession(uint64_t session) {
  std::lock_guard lock(state_->mu);
  const bool there = state_->core.UnpinSession(session, state_->Now());
  state_->Settle();
  return there;
}

BlockPool::Stats BlockPool::stats() const {
  State& st = *state_;
  std::lock_guard lock(st.mu);
  st.core.Expire(st.Now());
  const PoolCore::Counts c = st.core.counts();
  return {.slots = st.core.slots(),
          .free = c.free,
          .evictable = c.evictable,
          .leased = c.leased,
          .quarantined = c.quarantined,
          .published = c.published,
          .leases = c.leases,
          .hard_pinned = c.hard_pinned,
          .soft_pinned = c.soft_pinned,
          .pins = c.pins,
          .policy = std::string(st.core.policy().name())};
}

std::vector<BlockPool::TenantUsage> BlockPool::tenants() const {
  const State& st = *state_;
  std::vector<TenantUsage> out;
  {
    std::lock_guard lock(st.mu);
    for (const PoolCore::Tenant& t : st.core.tenants()) {
      if (t.used > 0) out.push_back({t.name, t.used, t.quota});
    }
  }
  for (TenantUsage& t : out) {
    t.bytes *= layout().block_bytes();
    t.quota *= layout().block_bytes();
  }
  std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.bytes > b.bytes; });
  return out;
}

void BlockPool::SetTenantQuotas(uint64_t tenant_quota_bytes, std::map<std::string, uint64_t> tenant_quotas) {
  State& st = *state_;
  {
    std::lock_guard lock(st.mu);
    if (st.core.SetQuotas(tenant_quota_bytes, std::move(tenant_quotas))) {
      absl::StatusOr<std::unique_ptr<EvictionPolicy>> policy =
          CreatePolicy({.name = std::string(st.core.policy().name()),
                        .capacity = st.options.slots,
                        .next_use = st.options.next_use,
                        .turn_bonus = st.options.turn_bonus});
      TP_CHECK(policy.ok());  // it is the one in force
      st.core.SetPolicy(std::move(*policy));
    }
  }
  for (size_t evicted = kStep; evicted == kStep;) {
    std::lock_guard lock(st.mu);
    evicted = st.core.TrimTenants(kStep);
    st.Settle();
  }
}

EventLog& BlockPool::events() const { return *state_->log; }

}  // namespace tidepool
