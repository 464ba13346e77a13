#include "scheduler/fair_share.h"

#include <algorithm>

namespace tidepool {

const FairShare::Deficits* FairShare::Of(const std::string& tenant) const {
  const auto it = tenants_.find(tenant);
  return it == tenants_.end() ? nullptr : &it->second.deficits;
}

void FairShare::Charge(const std::string& tenant, WorkerIndex worker, double tokens, absl::Time now) {
  auto it = tenants_.find(tenant);
  if (it == tenants_.end()) {
    if (tokens <= 0) return;
    if (tenants_.size() >= max_tenants_) MakeRoom(now);
    it = tenants_.emplace(tenant, Tenant()).first;
  }
  it->second.used = now;
  Deficits& deficits = it->second.deficits;
  const auto at = deficits.try_emplace(worker, quantum_).first;
  at->second -= tokens;
  if (at->second >= quantum_) deficits.erase(at);  // as if it had never been there
}

void FairShare::Refill(const std::string& tenant) {
  const auto it = tenants_.find(tenant);
  if (it == tenants_.end()) return;
  absl::erase_if(it->second.deficits, [&](auto& entry) {
    if (entry.second <= 0) entry.second += quantum_;
    return entry.second >= quantum_;
  });
}

void FairShare::Forget(WorkerIndex worker) {
  for (auto& [name, tenant] : tenants_) tenant.deficits.erase(worker);
}

void FairShare::MakeRoom(absl::Time now) {
  absl::erase_if(tenants_, [&](const auto& entry) { return now - entry.second.used > kIdle; });
  if (tenants_.size() < max_tenants_) return;
  tenants_.erase(std::min_element(tenants_.begin(), tenants_.end(), [](const auto& a, const auto& b) {
    return a.second.used < b.second.used;
  }));
}

}  // namespace tidepool
