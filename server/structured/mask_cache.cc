#include "server/structured/mask_cache.h"

#include "server/structured/token_class.h"

namespace tidepool {

MaskCache::MaskCache(size_t bytes_max) : bytes_max_(bytes_max) {}
MaskCache::~MaskCache() = default;

MaskCache::Stats MaskCache::stats() const {
  const std::lock_guard lock(mu_);
  Stats out = stats_;
  out.entries = index_.size();
  return out;
}

MaskCache::Entry* MaskCache::Find(const Key& key) {
  const auto it = index_.find(key);
  if (it == index_.end()) {
    ++stats_.misses;
    return nullptr;
  }
  ++stats_.hits;
  entries_.splice(entries_.begin(), entries_, it->second);
  return &*it->second;
}

void MaskCache::Put(Entry entry) {
  // What an entry takes beside its value: the list's and the index's nodes.
  entry.bytes += 2 * sizeof(Entry) + 64;
  if (entry.bytes > bytes_max_) return;
  const std::lock_guard lock(mu_);
  if (index_.contains(entry.key)) return;  // another matcher made the same
  while (stats_.bytes + entry.bytes > bytes_max_) {
    stats_.bytes -= entries_.back().bytes;
    index_.erase(entries_.back().key);
    entries_.pop_back();
    ++stats_.evictions;
  }
  stats_.bytes += entry.bytes;
  entries_.push_front(std::move(entry));
  index_.emplace(entries_.front().key, entries_.begin());
}

MaskCache::Mask MaskCache::FindMask(const Key& key) {
  const std::lock_guard lock(mu_);
  const Entry* entry = Find(key);
  return entry == nullptr ? nullptr : entry->mask;
}

void MaskCache::PutMask(const Key& key, Mask mask) {
  const size_t bytes = mask->capacity() * sizeof(uint32_t);
  Put({key, std::move(mask), nullptr, bytes});
}

MaskCache::Class MaskCache::FindClass(const Key& key) {
  const std::lock_guard lock(mu_);
  const Entry* entry = Find(key);
  return entry == nullptr ? nullptr : entry->token_class;
}

void MaskCache::PutClass(const Key& key, Class value, size_t bytes) {
  Put({key, nullptr, std::move(value), bytes});
}

}  // namespace tidepool
