#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "scheduler/types.h"

namespace tidepool {

// FairQueue: which waiting request an engine begins next. Core: no thread, no clock, bounded. Not
// thread-safe.
//
// Strict levels first: the class, inside it the priority (lower first). Who has waited for `aging` counts as
// one class higher, and with the best priority that waits there, so that nothing waits for ever: it does not
// go before those, or a tenant with a long queue would pass all others by. Inside a level, by `order`:
//
//   kFcfs           arrival
//   kLongestPrefix  most cached tokens first: best for the cache, unfair without bound (to compare with)
//   kVtc            the tenant that has been given least: counter += prompt + output, each by its weight,
//                   over the tenant's. A tenant that comes back is lifted to the least of those who are
//                   there. Ties: who has fewest waiting. Source: Sheng et al., Fairness in Serving LLMs,
//                   arXiv:2401.00588.
//   kDlpm           longest prefix first among the tenants with credit, then who has fewest waiting; where
//                   none that waits has any credit, each gets a quantum (times its weight) more, up to one
//                   quantum: so who asks for less than its share finds its credit there. Charged: the
//                   uncached part of the prompt when it begins, then output tokens as they come. How much
//                   more than another a waiting tenant can be given is bounded by the quantum and its largest
//                   request, however long it lasts. Source: Cao et al., Locality-aware Fair Scheduling,
//                   arXiv:2501.14312 (there, only who has no credit is given some, and ties go by arrival).
class FairQueue {
 public:
  enum class Order : uint8_t { kFcfs, kLongestPrefix, kVtc, kDlpm };

  struct Options {
    Order order = Order::kDlpm;
    double prompt_weight = 1;
    double output_weight = 1;  // VTC's authors take 2
    // More than a request takes, or the prefix that two requests share is not used; larger: more of the
    // cache, less fair.
    double quantum = 32768;
    absl::Duration aging = absl::Seconds(30);  // zero: never
    bool batch_rises = true;                   // false: waiting takes the batch class to its top, not beyond
    absl::Duration idle = absl::Hours(1);      // what is known of a tenant with nothing here is dropped
    size_t max_waiting = 4096;
    size_t max_waiting_per_tenant = 4096;
    size_t max_running_per_tenant = 4096;  // of the batch class, and of all others
  };

  struct Item {
    uint64_t id = 0;  // not in use
    std::string tenant;
    SloClass slo_class = SloClass::kStandard;
    int32_t priority = 0;
    uint32_t prompt_tokens = 0;
    uint32_t cached_tokens = 0;  // of those, now; never more
    bool preempted = false;  // ran already: the first of its level, whoever's it is (kFcfs among themselves)
  };

  explicit FairQueue(const Options& options) : options_(options) {}

  // ResourceExhausted: the queue, or this tenant's part of it, is full; the message says which.
  absl::Status Push(Item item, absl::Time now);
  // What of a waiting one's prompt is cached has changed. Ignored where it does not wait.
  void SetCached(uint64_t id, uint32_t tokens);
  // The next one, valid until the next call. Null: nothing waits, or only tenants who run as many as they
  // may. Looks at all that wait.
  const Item* Peek(absl::Time now);
  // One that waits begins: its tenant is charged for its prompt (kDlpm: the uncached part), and it counts as
  // running.
  void Begin(uint64_t id, absl::Time now);
  // Both at once: begins the next one, where there is one.
  std::optional<uint64_t> Pop(absl::Time now);
  // A running one has drawn `total` tokens so far: counted once each, also where they are drawn again after a
  // preemption.
  void OnOutput(uint64_t id, uint32_t total);
  // Ended or cancelled, waiting or running; unknown ids are ignored. `uncomputed`: prompt tokens that it was
  // charged for and that were not computed: given back.
  void Remove(uint64_t id, absl::Time now, uint32_t uncomputed = 0);
  // Anything else that costs the others: pinned memory times time, swap traffic, in tokens' worth.
  void Charge(const std::string& tenant, double tokens, absl::Time now);
  // Above 0; 1 where never set. Kept while the tenant is known.
  void SetWeight(const std::string& tenant, double weight, absl::Time now);

  size_t waiting() const { return waiting_.size(); }
  size_t running() const { return running_.size(); }
  size_t tenants() const { return tenants_.size(); }
  // What a tenant was charged in all since it was first seen (or dropped as idle), unweighted.
  double service(const std::string& tenant) const;

 private:
  struct Tenant {
    double weight = 1;
    double counter = 0;  // kVtc
    double deficit = 0;  // kDlpm
    double service = 0;
    size_t waiting = 0, running = 0;
    size_t running_batch = 0;  // of those
    absl::Time used;
  };
  struct Waiting {
    Item item;
    absl::Time arrived;
    Tenant* tenant;
  };
  struct Running {
    Tenant* tenant;
    bool batch = false;
    uint32_t output_tokens = 0;
  };
  struct Level {
    int slo_class;
    int64_t priority;
    auto operator<=>(const Level&) const = default;
  };

  // One that has waited for long has the lowest priority of its (higher) class here, and `aged` is set.
  Level LevelOf(const Waiting& w, absl::Time now, bool& aged) const;
  bool MayBegin(const Waiting& w) const;
  // Whether a goes before b, both of one level.
  bool Before(const Waiting& a, const Waiting& b) const;
  Tenant& Known(const std::string& tenant, absl::Time now);
  void Forget(absl::Time now);
  static void Give(Tenant& tenant, double tokens);

  const Options options_;
  std::map<uint64_t, Waiting> waiting_;  // by arrival
  absl::flat_hash_map<uint64_t, uint64_t> arrival_of_;
  absl::flat_hash_map<uint64_t, Running> running_;
  std::map<std::string, Tenant> tenants_;  // nodes do not move
  uint64_t next_arrival_ = 1;
  absl::Time forgot_at_ = absl::InfinitePast();
};

inline constexpr size_t kQueueOrders = 4;
std::string_view QueueOrderName(FairQueue::Order order);
std::optional<FairQueue::Order> ParseQueueOrder(std::string_view name);

}  // namespace tidepool
