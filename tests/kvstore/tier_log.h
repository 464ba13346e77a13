#pragma once

#include <mutex>
#include <utility>
#include <vector>

#include "kvstore/block_tier.h"

namespace tidepool {

// TierLog: what an observer was told.
class TierLog final : public TierObserver {
 public:
  void OnStored(const BlockInfo& info) override {
    std::lock_guard lock(mu_);
    stored_.push_back(info.key);
  }
  void OnRemoved(const BlockKey& key, TierRemoval why) override {
    std::lock_guard lock(mu_);
    removed_.emplace_back(key, why);
  }
  void OnHealth(const TierHealth& health) override {
    std::lock_guard lock(mu_);
    health_.push_back(health);
  }
  std::vector<BlockKey> stored() const {
    std::lock_guard lock(mu_);
    return stored_;
  }
  std::vector<std::pair<BlockKey, TierRemoval>> removed() const {
    std::lock_guard lock(mu_);
    return removed_;
  }
  std::vector<TierHealth> health() const {
    std::lock_guard lock(mu_);
    return health_;
  }

 private:
  mutable std::mutex mu_;
  std::vector<BlockKey> stored_;
  std::vector<std::pair<BlockKey, TierRemoval>> removed_;
  std::vector<TierHealth> health_;
};

}  // namespace tidepool
