#include "kvstore/offer_table.h"

#include <algorithm>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr size_t kClosedMax = 8192;

}  // namespace

void OfferTable::SetObserver(OfferObserver* observer) {
  absl::flat_hash_map<std::string, Request> dropped;
  std::lock_guard lock(mu_);
  TP_CHECK(requests_.empty() || observer == nullptr);
  if (observer == nullptr) DropAll(dropped);
  observer_ = observer;
}

void OfferTable::Renew(Request& r, absl::Time now) {
  r.until = now + lease_;
  next_expiry_ = std::min(next_expiry_, r.until);
}

void OfferTable::Raise(const std::string& request, Request& r, const BlockKey& key, size_t i,
                       uint32_t layers_ready) {
  const uint32_t was = std::exchange(r.layers_ready[i], std::max(r.layers_ready[i], layers_ready));
  if (observer_ != nullptr && was < layers_ && r.layers_ready[i] == layers_)
    observer_->OnOffered(request, key, r.leases[i]);
}

void OfferTable::Offer(const std::string& request, const BlockKey& key, BlockLease lease,
                       uint32_t layers_ready, absl::Time now) {
  BlockLease dropped;  // after the lock is
  std::lock_guard lock(mu_);
  if (closed_.contains(request)) {
    dropped = std::move(lease);
    return;
  }
  Request& r = requests_[request];
  Renew(r, now);
  const auto [it, fresh] = r.index.try_emplace(key, r.leases.size());
  const size_t i = it->second;
  if (fresh) {
    r.leases.emplace_back();
    r.layers_ready.push_back(0);
    r.epochs.push_back(next_epoch_++);
    size_.fetch_add(1, std::memory_order_relaxed);
  } else if (r.layers_ready[i] == layers_) {
    dropped = std::move(lease);
    return;
  }
  if (!fresh && r.leases[i].ref() != lease.ref()) r.epochs[i] = next_epoch_++;
  // Of a growing offer the layers that are ready are those of the slot that is offered now.
  dropped = std::exchange(r.leases[i], std::move(lease));
  r.layers_ready[i] = 0;
  Raise(request, r, key, i, std::min(layers_ready, layers_));
}

void OfferTable::Advance(const std::string& request, std::span<const BlockKey> keys, uint32_t layers_ready,
                         absl::Time now) {
  layers_ready = std::min(layers_ready, layers_);
  std::lock_guard lock(mu_);
  const auto it = requests_.find(request);
  if (it == requests_.end()) return;
  Request& r = it->second;
  Renew(r, now);
  if (keys.empty()) {
    // In order: what comes first is also read first.
    std::vector<const BlockKey*> growing(r.leases.size(), nullptr);
    for (const auto& [key, i] : r.index) growing[i] = &key;
    for (size_t i = 0; i < growing.size(); ++i) Raise(request, r, *growing[i], i, layers_ready);
  }
  for (const BlockKey& key : keys) {
    if (const auto at = r.index.find(key); at != r.index.end())
      Raise(request, r, key, at->second, layers_ready);
  }
}

void OfferTable::Revoke(const std::string& request) {
  std::vector<BlockLease> dropped;
  std::lock_guard lock(mu_);
  const auto it = requests_.find(request);
  if (it == requests_.end()) return;
  Request& r = it->second;
  Request kept{.until = r.until};
  std::vector<const BlockKey*> keys(r.leases.size());
  for (const auto& [key, i] : r.index) keys[i] = &key;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (r.layers_ready[i] < layers_) {
      dropped.push_back(std::move(r.leases[i]));
      continue;
    }
    kept.index[*keys[i]] = kept.leases.size();
    kept.leases.push_back(std::move(r.leases[i]));
    kept.layers_ready.push_back(layers_);
    kept.epochs.push_back(r.epochs[i]);
  }
  size_.fetch_sub(dropped.size(), std::memory_order_relaxed);
  r = std::move(kept);
  if (observer_ != nullptr && !dropped.empty()) observer_->OnRevoked(request);
  if (r.leases.empty()) requests_.erase(it);
}

std::optional<OfferTable::Found> OfferTable::Find(const std::string& request, const BlockKey& key,
                                                  absl::Time now) {
  std::lock_guard lock(mu_);
  const auto r = requests_.find(request);
  if (r == requests_.end()) return std::nullopt;
  const auto it = r->second.index.find(key);
  if (it == r->second.index.end()) return std::nullopt;
  // Its fetcher is alive: it gets a lease's length to come for the rest.
  Renew(r->second, now);
  const size_t i = it->second;
  return Found{r->second.leases[i].Clone(), r->second.layers_ready[i], r->second.epochs[i]};
}

void OfferTable::Drop(const std::string& request, Request& r) {
  size_.fetch_sub(r.leases.size(), std::memory_order_relaxed);
  if (observer_ != nullptr) observer_->OnDropped(request, r.leases);
}

size_t OfferTable::Release(const std::string& request) {
  std::vector<BlockLease> dropped;
  const absl::Cleanup drop = [&] { BlockLease::DropAll(std::move(dropped)); };  // after the lock is
  std::lock_guard lock(mu_);
  const auto it = requests_.find(request);
  if (it == requests_.end()) return 0;
  const size_t blocks = it->second.leases.size();
  Drop(request, it->second);
  dropped = std::move(it->second.leases);
  requests_.erase(it);
  return blocks;
}

size_t OfferTable::Close(const std::string& request) {
  {
    std::lock_guard lock(mu_);
    if (closed_.insert(request).second) {
      closed_order_.push_back(request);
      if (closed_order_.size() > kClosedMax) {
        closed_.erase(closed_order_.front());
        closed_order_.pop_front();
      }
    }
  }
  return Release(request);
}

size_t OfferTable::Expire(absl::Time now) {
  std::vector<std::vector<BlockLease>> dropped;
  const absl::Cleanup drop = [&] {  // after the lock is
    for (auto& leases : dropped) BlockLease::DropAll(std::move(leases));
  };
  size_t blocks = 0;
  std::lock_guard lock(mu_);
  if (now < next_expiry_) return 0;
  next_expiry_ = absl::InfiniteFuture();
  absl::erase_if(requests_, [&](auto& item) {
    Request& r = item.second;
    if (now < r.until) {
      next_expiry_ = std::min(next_expiry_, r.until);
      return false;
    }
    blocks += r.leases.size();
    Drop(item.first, r);
    dropped.push_back(std::move(r.leases));
    return true;
  });
  return blocks;
}

void OfferTable::DropAll(absl::flat_hash_map<std::string, Request>& dropped) {
  for (auto& [request, r] : requests_) Drop(request, r);
  dropped.swap(requests_);
  next_expiry_ = absl::InfiniteFuture();
}

void OfferTable::Clear() {
  absl::flat_hash_map<std::string, Request> dropped;
  std::lock_guard lock(mu_);
  DropAll(dropped);
}

absl::Time OfferTable::next_expiry() const {
  std::lock_guard lock(mu_);
  return next_expiry_;
}

}  // namespace tidepool
