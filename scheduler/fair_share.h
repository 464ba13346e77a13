#pragma once

#include <cstddef>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "scheduler/types.h"

namespace tidepool {

// FairShare: D2LPM's deficits, one for each (tenant, worker): how many tokens of work the tenant may still be
// given there before others' turn. Placement prefers workers where the tenant has credit, whatever it has
// cached elsewhere; where it has none anywhere, every worker gives it a quantum more. So a tenant's locality
// cannot pile its work on one worker at the cost of those who share it, and the quantum says how much
// locality may count. Workers order their queues by DLPM (fair_queue.h). Charged: uncached prompt tokens when
// placed, output tokens when ended; a request that ended without an answer gets its prompt back. Not
// thread-safe. Source: Cao et al., Locality-aware Fair Scheduling in LLM Serving, arXiv:2501.14312.
class FairShare {
 public:
  // Of each tenant that was seen within kIdle; beyond max_tenants the longest unseen is forgotten.
  static constexpr absl::Duration kIdle = absl::Hours(1);

  explicit FairShare(double quantum, size_t max_tenants = 4096)
      : quantum_(quantum), max_tenants_(max_tenants) {}

  // A tenant's share on each worker, where that is not the whole quantum; borrowed until the next change.
  // Null: it has credit everywhere.
  using Deficits = absl::flat_hash_map<WorkerIndex, double>;
  const Deficits* Of(const std::string& tenant) const;
  static bool HasCredit(const Deficits* deficits, WorkerIndex worker) {
    if (deficits == nullptr) return true;
    const auto it = deficits->find(worker);
    return it == deficits->end() || it->second > 0;
  }

  // Negative: a refund, which never lifts a deficit above the quantum.
  void Charge(const std::string& tenant, WorkerIndex worker, double tokens, absl::Time now);
  // Workers where the tenant has no credit give it a quantum.
  void Refill(const std::string& tenant);
  // A worker is gone; its index will mean another.
  void Forget(WorkerIndex worker);

  size_t tenants() const { return tenants_.size(); }

 private:
  struct Tenant {
    Deficits deficits;
    absl::Time used;
  };
  void MakeRoom(absl::Time now);

  const double quantum_;
  const size_t max_tenants_;
  absl::flat_hash_map<std::string, Tenant> tenants_;
};

}  // namespace tidepool
