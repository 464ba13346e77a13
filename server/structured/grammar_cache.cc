#include "server/structured/grammar_cache.h"

#include <utility>

#include "base/digest.h"
#include "base/status.h"

namespace tidepool {

std::string GrammarCache::Key(std::string_view salt, std::string_view source) {
  const Sha256Digest digest = Sha256().UpdateField(salt).UpdateField(source).Finish();
  return std::string(reinterpret_cast<const char*>(digest.data()), digest.size());
}

GrammarCache::Grammar GrammarCache::Find(const std::string& key) {
  const std::lock_guard lock(mu_);
  const auto it = index_.find(key);
  if (it == index_.end()) {
    ++stats_.misses;
    return nullptr;
  }
  ++stats_.hits;
  entries_.splice(entries_.begin(), entries_, it->second);
  return it->second->grammar;
}

void GrammarCache::Put(const std::string& key, Grammar grammar) {
  // What an entry takes beside its value: the list's and the index's nodes, two copies of the key.
  const size_t bytes = grammar->memory_bytes() + 2 * (sizeof(Entry) + key.size()) + 64;
  if (bytes > bytes_max_) return;
  const std::lock_guard lock(mu_);
  if (index_.contains(key)) return;
  while (stats_.bytes + bytes > bytes_max_) {
    stats_.bytes -= entries_.back().bytes;
    index_.erase(entries_.back().key);
    entries_.pop_back();
    ++stats_.evictions;
  }
  stats_.bytes += bytes;
  entries_.push_front({key, std::move(grammar), bytes});
  index_.emplace(key, entries_.begin());
}

absl::StatusOr<GrammarCache::Grammar> GrammarCache::FindOrMake(
    const std::string& key, const std::function<absl::StatusOr<Grammar>()>& make) {
  if (Grammar found = Find(key); found != nullptr) return found;
  TP_ASSIGN_OR_RETURN(Grammar made, make());
  Put(key, made);
  return made;
}

GrammarCache::Stats GrammarCache::stats() const {
  const std::lock_guard lock(mu_);
  Stats out = stats_;
  out.entries = index_.size();
  return out;
}

}  // namespace tidepool
