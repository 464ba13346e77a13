#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kvstore/types.h"

namespace tidepool {

// What a policy may know of an entry.
struct PolicyEntry {
  BlockKey key;
  uint32_t position = 0;      // index in its chain
  float compute_seconds = 0;  // what making it again would take; 0: not known
  uint32_t bytes = 1;         // what it takes in the cache; all equal where sizes do not differ
  uint32_t group = 0;         // evictions can be asked of one group (a tenant) only
};

// One request's use of entries. Requests are numbered from 1; several uses may carry one number.
struct PolicyUse {
  uint64_t request = 0;
  bool extends_session = false;  // the request carries on a conversation that was seen before
  uint64_t session_gap = 0;      // requests since that conversation's last turn; 0: not known
};

// In which order candidates are taken: everything in kNormal before anything in kLate (soft pins).
enum class EvictionBand : uint8_t { kNormal, kLate };

// EvictionPolicy: which entry goes next. Core: no clock, thread or memory of its own; the host tier, disk
// tiers, the simulator and the tuner drive the same code. Entries are dense ids below the capacity, given by
// the owner and used again after OnErase.
//
// The owner decides which entries may go at all (not leased, not pinned, no children: a chain goes from its
// tail) and says so with SetCandidate; the policy only ranks. It may be told late that an entry is no
// candidate any more: whoever gets one from Victim that must stay takes it out with ClearCandidate and asks
// again, which keeps the hot path (leasing what is cached) free of any ordering work.
//
// Cost: OnUse is O(1) per entry, the others O(log n) amortised. Not thread-safe.
class EvictionPolicy {
 public:
  static constexpr uint32_t kAnyGroup = std::numeric_limits<uint32_t>::max();

  virtual ~EvictionPolicy() = default;
  virtual std::string_view name() const = 0;

  // A new entry, made by the request in `use`; no candidate yet.
  virtual void OnInsert(uint32_t id, const PolicyEntry& entry, const PolicyUse& use) = 0;
  // A request found these entries; each counts as one hit.
  virtual void OnUse(std::span<const uint32_t> ids, const PolicyUse& use) = 0;
  // The request that used these is through with them, at request number `now`: recency counts from here.
  virtual void OnRelease(std::span<const uint32_t> ids, uint64_t now) = 0;
  // It is gone. `evicted`: because it was the victim (some policies remember it), else erased.
  virtual void OnErase(uint32_t id, bool evicted) = 0;

  // May be evicted from now on, in `band`; calling it again moves it to another band.
  virtual void SetCandidate(uint32_t id, EvictionBand band) = 0;
  virtual void ClearCandidate(uint32_t id) = 0;
  // The candidate that goes next, of `group` only unless that is kAnyGroup. It stays a candidate until it is
  // erased or cleared. nullopt: there is none.
  virtual std::optional<uint32_t> Victim(uint32_t group) = 0;
};

// Belady's oracle: the number of the first request after `request` that uses `key`, kNever if none does.
inline constexpr uint64_t kNever = std::numeric_limits<uint64_t>::max();
using NextUse = std::function<uint64_t(const BlockKey& key, uint64_t request)>;

struct PolicyOptions {
  // One of PolicyNames(), or "belady", which exists in simulation only: it needs next_use.
  std::string name = "turn-aware";
  uint32_t capacity = 0;  // ids are below it
  // How many entries there are as a rule, where their sizes differ (s3-fifo sizes its queues by it); 0:
  // capacity.
  uint32_t typical = 0;
  NextUse next_use;
  uint64_t turn_bonus = 0;  // of turn-aware, in requests; 0: measured (reuse_gap.h)
};

// lru         least recently used
// lfu         least often used since it came; among those the least recently used
// s3-fifo     three FIFO queues (Yang et al., SOSP 2023): small (a tenth), main, and keys lately evicted from
// small gdsf        GreedyDual-Size-Frequency (Cherkasova 1998): clock + uses / bytes pgdsf       RAGCache's:
// clock + uses * cost / bytes, cost being seconds of computation turn-aware  LRU, but what a conversation's
// later turns use counts as used a while later (see policy.cc)
std::vector<std::string_view> PolicyNames();

// InvalidArgument: no such name (the message lists them), no capacity, or belady without next_use.
absl::StatusOr<std::unique_ptr<EvictionPolicy>> CreatePolicy(const PolicyOptions& options);

}  // namespace tidepool
