#include "kvstore/block_pool.h"

#include <deque>
#include <limits>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "base/log.h"
#include "base/status.h"
#include "kvstore/arena.h"
#include "kvstore/probe.h"

namespace tidepool {

namespace {

constexpr uint32_t kNoSlot = std::numeric_limits<uint32_t>::max();

struct Slot {
  uint64_t generation = 1;
  uint64_t stamp = 0;  // of the last use
  uint32_t leases = 0;
  uint32_t children = 0;  // published blocks here whose parent this is
  // The parent's slot, valid while that slot still has this generation.
  SlotRef parent{kNoSlot, 0};
  bool published = false;
  bool quarantined = false;
  BlockKey key;
};

// Eviction order: chain tails first, then by last use.
using Rank = std::tuple<bool, uint64_t, uint32_t>;  // has children, stamp, slot

}  // namespace

struct BlockPool::State {
  State(const Options& o, SlotArena a)
      : options(o), arena(std::move(a)), slots(o.slots), probe(*o.metrics, "host") {
    free.reserve(o.slots);
    for (uint32_t i = o.slots; i-- > 0;) free.push_back(i);
  }

  const Options options;
  SlotArena arena;

  std::mutex mu;  // guards everything below
  std::vector<Slot> slots;
  std::vector<uint32_t> free;  // a stack: the slot used last is the warmest
  absl::btree_set<Rank> evictable;
  absl::flat_hash_map<BlockKey, uint32_t> index;
  std::deque<BlockPoolEvent> events;
  bool events_lost = false;
  uint64_t clock = 0;  // of stamps
  uint64_t leases = 0;
  uint32_t quarantined = 0;
  PoolProbe probe;

  Rank RankOf(uint32_t i) const { return {slots[i].children > 0, slots[i].stamp, i}; }
  bool IsEvictable(const Slot& s) const { return s.published && s.leases == 0; }
  SlotRef RefOf(uint32_t i) const { return {i, slots[i].generation}; }
  uint32_t LeasedSlots() const {
    return static_cast<uint32_t>(slots.size() - free.size() - evictable.size() - quarantined);
  }

  Slot& Get(SlotRef ref) {
    TP_CHECK(ref.slot < slots.size());
    Slot& s = slots[ref.slot];
    TP_CHECK(s.generation == ref.generation && s.leases > 0);
    return s;
  }

  void AddLease(uint32_t i) {
    if (IsEvictable(slots[i])) evictable.erase(RankOf(i));
    ++slots[i].leases;
    ++leases;
  }

  void DropLease(SlotRef ref) {
    Slot& s = Get(ref);
    --leases;
    if (--s.leases > 0 || s.quarantined) return;
    if (s.published) {
      s.stamp = ++clock;
      evictable.insert(RankOf(ref.slot));
    } else {
      Recycle(ref.slot);
    }
  }

  void Recycle(uint32_t i) {
    ++slots[i].generation;
    free.push_back(i);
  }

  // Moves `i` in the eviction order if it is there: its number of children is about to change.
  void SetChildren(uint32_t i, uint32_t n) {
    const bool ranked = IsEvictable(slots[i]);
    if (ranked) evictable.erase(RankOf(i));
    slots[i].children = n;
    if (ranked) evictable.insert(RankOf(i));
  }

  void LinkParent(uint32_t child, uint32_t parent) {
    Slot& c = slots[child];
    if (ParentOf(c) != kNoSlot || child == parent) return;
    c.parent = RefOf(parent);
    SetChildren(parent, slots[parent].children + 1);
  }

  uint32_t ParentOf(const Slot& c) const {
    if (c.parent.slot == kNoSlot) return kNoSlot;
    const Slot& p = slots[c.parent.slot];
    return p.published && p.generation == c.parent.generation ? c.parent.slot : kNoSlot;
  }

  // The caller has taken the slot out of `evictable`.
  void Unpublish(uint32_t i) {
    Slot& s = slots[i];
    index.erase(s.key);
    Emit(s.key, true);
    const uint32_t parent = ParentOf(s);
    s.published = false;
    s.parent = {kNoSlot, 0};
    s.children = 0;  // those that remain find the generation changed
    if (parent != kNoSlot) SetChildren(parent, slots[parent].children - 1);
  }

  void EvictOne() {
    const uint32_t i = std::get<2>(*evictable.begin());
    evictable.erase(evictable.begin());
    Unpublish(i);
    Recycle(i);
    probe.evicted_capacity.Add();
  }

  void Emit(const BlockKey& key, bool removed) {
    if (events_lost) {
      probe.events_lost.Add();
      return;
    }
    if (events.size() >= options.max_events) {
      // What is left would be a history with a hole: only a snapshot helps the reader now.
      probe.events_lost.Add(events.size() + 1);
      events.clear();
      events_lost = true;
      spdlog::warn("block pool: event queue full at {}, a snapshot is needed", options.max_events);
      return;
    }
    events.push_back({key, removed});
  }

  void Export() {
    const auto total = static_cast<double>(slots.size());
    const uint32_t leased = LeasedSlots();
    probe.usage.Set((leased + quarantined) / total);
    probe.bytes.Set(static_cast<double>(leased + evictable.size()) *
                    static_cast<double>(options.layout.block_bytes()));
    probe.objects.Set(static_cast<double>(index.size()));
  }
};

BlockLease::BlockLease(BlockLease&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), ref_(other.ref_) {}

BlockLease& BlockLease::operator=(BlockLease&& other) noexcept {
  if (this != &other) {
    BlockLease dropped(std::move(*this));
    pool_ = std::exchange(other.pool_, nullptr);
    ref_ = other.ref_;
  }
  return *this;
}

BlockLease::~BlockLease() {
  if (pool_ == nullptr) return;
  auto& state = *pool_->state_;
  std::lock_guard lock(state.mu);
  state.DropLease(ref_);
  state.Export();
}

std::span<std::byte> BlockLease::data() const {
  TP_CHECK(pool_ != nullptr);
  return pool_->state_->arena.slot(ref_.slot);
}

BlockLease BlockLease::Clone() const {
  TP_CHECK(pool_ != nullptr);
  auto& state = *pool_->state_;
  std::lock_guard lock(state.mu);
  state.Get(ref_);
  state.AddLease(ref_.slot);
  return BlockLease(pool_, ref_);
}

absl::StatusOr<std::unique_ptr<BlockPool>> BlockPool::Create(const Options& options) {
  const BlockLayout& l = options.layout;
  if (l.layers == 0 || l.kv_heads == 0 || l.head_dim == 0 || l.block_tokens == 0)
    return absl::InvalidArgumentError("block pool: layout '" + l.ToString() +
                                      "' has a zero in it; every dimension must be at least 1");
  if (options.slots == 0)
    return absl::InvalidArgumentError("block pool: no slots: kv.host_bytes must hold at least one block of " +
                                      std::to_string(l.block_bytes()) + " bytes");
  TP_CHECK(options.metrics != nullptr);
  TP_ASSIGN_OR_RETURN(SlotArena arena, SlotArena::Map(l.block_bytes(), options.slots));
  return std::unique_ptr<BlockPool>(new BlockPool(std::make_unique<State>(options, std::move(arena))));
}

BlockPool::BlockPool(std::unique_ptr<State> state) : state_(std::move(state)) {}

BlockPool::~BlockPool() {
  std::lock_guard lock(state_->mu);
  TP_CHECK(state_->leases == 0);
  if (state_->quarantined > 0) {
    spdlog::warn("block pool: {} quarantined slots: the arena stays mapped", state_->quarantined);
    state_->arena.Abandon();
  }
}

const BlockLayout& BlockPool::layout() const { return state_->options.layout; }

absl::StatusOr<std::vector<BlockLease>> BlockPool::Reserve(size_t n) {
  State& st = *state_;
  std::vector<BlockLease> out;
  out.reserve(n);
  std::lock_guard lock(st.mu);
  if (n > st.free.size() + st.evictable.size()) {
    st.probe.reserve_full.Add();
    return absl::ResourceExhaustedError("block pool: " + std::to_string(n) + " slots wanted, " +
                                        std::to_string(st.free.size() + st.evictable.size()) +
                                        " free or evictable, " + std::to_string(st.LeasedSlots()) + " of " +
                                        std::to_string(st.slots.size()) + " leased, " +
                                        std::to_string(st.quarantined) + " quarantined");
  }
  while (st.free.size() < n) st.EvictOne();
  for (size_t k = 0; k < n; ++k) {
    const uint32_t i = st.free.back();
    st.free.pop_back();
    st.AddLease(i);
    out.push_back(BlockLease(this, st.RefOf(i)));
  }
  st.probe.reserve_ok.Add();
  st.Export();
  return out;
}

std::vector<BlockLease> BlockPool::LeasePrefix(std::span<const BlockKey> keys) {
  State& st = *state_;
  std::vector<BlockLease> out;
  std::lock_guard lock(st.mu);
  uint32_t parent = kNoSlot;
  for (const BlockKey& key : keys) {
    const auto it = st.index.find(key);
    if (it == st.index.end()) break;
    // Neighbours in a prefix are parent and child: learnt here where the publisher did not say so.
    if (parent != kNoSlot) st.LinkParent(it->second, parent);
    parent = it->second;
    st.AddLease(parent);
    out.push_back(BlockLease(this, st.RefOf(parent)));
  }
  st.probe.lookup_hit.Add(out.size());
  if (out.size() < keys.size()) st.probe.lookup_miss.Add();
  st.Export();
  return out;
}

std::optional<BlockLease> BlockPool::Lease(const BlockKey& key) {
  State& st = *state_;
  std::lock_guard lock(st.mu);
  const auto it = st.index.find(key);
  if (it == st.index.end()) {
    st.probe.lookup_miss.Add();
    return std::nullopt;
  }
  st.probe.lookup_hit.Add();
  st.AddLease(it->second);
  st.Export();
  return BlockLease(this, st.RefOf(it->second));
}

size_t BlockPool::MatchPrefix(std::span<const BlockKey> keys) const {
  std::lock_guard lock(state_->mu);
  size_t n = 0;
  while (n < keys.size() && state_->index.contains(keys[n])) ++n;
  return n;
}

BlockLease BlockPool::Publish(BlockLease lease, const BlockKey& key, const BlockKey* parent) {
  TP_CHECK(lease.pool_ == this);
  State& st = *state_;
  // Declared before the lock: a duplicate's slot is given back after the lock is released.
  BlockLease given_up;
  std::lock_guard lock(st.mu);
  Slot& s = st.Get(lease.ref_);
  if (s.published) {
    TP_CHECK(s.key == key);  // a block's content and name never change
    return lease;
  }
  TP_CHECK(!s.quarantined);
  const auto [it, inserted] = st.index.try_emplace(key, lease.ref_.slot);
  if (!inserted) {
    st.probe.publish_duplicate.Add();
    st.AddLease(it->second);
    given_up = std::move(lease);
    st.Export();
    return BlockLease(this, st.RefOf(it->second));
  }
  s.published = true;
  s.key = key;
  if (parent != nullptr) {
    if (const auto p = st.index.find(*parent); p != st.index.end()) st.LinkParent(lease.ref_.slot, p->second);
  }
  st.probe.publish_ok.Add();
  st.Emit(key, false);
  st.Export();
  return lease;
}

void BlockPool::Quarantine(BlockLease lease) {
  TP_CHECK(lease.pool_ == this);
  State& st = *state_;
  std::lock_guard lock(st.mu);
  Slot& s = st.Get(lease.ref_);
  if (!s.quarantined) {
    if (s.published) {
      st.Unpublish(lease.ref_.slot);
      st.probe.evicted_quarantine.Add();
    }
    s.quarantined = true;
    ++st.quarantined;
    st.probe.quarantined.Set(st.quarantined);
    spdlog::warn("block pool: slot {} generation {} quarantined, {} in all", lease.ref_.slot,
                 lease.ref_.generation, st.quarantined);
  }
  st.DropLease(lease.ref_);
  lease.pool_ = nullptr;
  st.Export();
}

BlockPool::Stats BlockPool::stats() const {
  const State& st = *state_;
  std::lock_guard lock(state_->mu);
  return {.slots = static_cast<uint32_t>(st.slots.size()),
          .free = static_cast<uint32_t>(st.free.size()),
          .evictable = static_cast<uint32_t>(st.evictable.size()),
          .leased = st.LeasedSlots(),
          .quarantined = st.quarantined,
          .published = st.index.size()};
}

BlockPool::Events BlockPool::DrainEvents(size_t max) {
  State& st = *state_;
  std::lock_guard lock(st.mu);
  Events out;
  out.lost = st.events_lost;
  const auto n = static_cast<std::ptrdiff_t>(std::min(max, st.events.size()));
  out.events.assign(st.events.begin(), st.events.begin() + n);
  st.events.erase(st.events.begin(), st.events.begin() + n);
  return out;
}

std::vector<BlockKey> BlockPool::Snapshot() {
  State& st = *state_;
  std::lock_guard lock(st.mu);
  st.events.clear();
  st.events_lost = false;
  std::vector<BlockKey> keys;
  keys.reserve(st.index.size());
  for (const auto& [key, slot] : st.index) keys.push_back(key);
  return keys;
}

}  // namespace tidepool
