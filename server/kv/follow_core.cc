#include "server/kv/follow_core.h"

#include <utility>

namespace tidepool {

void FollowCore::OnStored(const std::string& worker, const BlockKey& key,
                          const std::optional<BlockKey>& parent, absl::Time now) {
  const auto [it, fresh] = blocks_.try_emplace(key);
  it->second.worker = worker;  // the latest to have it has it longest
  if (!fresh) return;
  it->second.parent = parent;
  it->second.stored_at = now;
  order_.push_back(key);
  if (options_.all) {
    Want(key);
  } else if (parent) {
    if (const auto before = blocks_.find(*parent); before != blocks_.end()) {
      Block& p = before->second;
      const bool carried_on = now > p.stored_at + options_.carried_on_after;
      const bool forked = p.child && *p.child != key;
      if (!p.child) p.child = key;
      if (p.taken || carried_on) {
        Want(key);
      } else if (forked) {
        Want(*parent);
      }
    }
  }
  Forget();
}

void FollowCore::Want(const BlockKey& key) {
  // Back to the first block that was not asked for yet, and from there on.
  std::vector<BlockKey> chain;
  for (std::optional<BlockKey> at = key; at;) {
    const auto it = blocks_.find(*at);
    if (it == blocks_.end() || it->second.taken) break;
    it->second.taken = true;
    chain.push_back(*at);
    at = it->second.parent;
  }
  queue_.insert(queue_.end(), chain.rbegin(), chain.rend());
  while (queue_.size() > options_.max_wanted) {
    queue_.pop_front();
    ++dropped_;
  }
}

void FollowCore::OnRemoved(const std::string& worker, const BlockKey& key) {
  const auto it = blocks_.find(key);
  if (it != blocks_.end() && it->second.worker == worker) blocks_.erase(it);
}

void FollowCore::OnGone(const std::string& worker) {
  absl::erase_if(blocks_, [&](const auto& entry) { return entry.second.worker == worker; });
}

void FollowCore::Forget() {
  // Twice as many names as blocks: those of blocks that are gone are swept out on the way.
  while (blocks_.size() > options_.max_blocks || order_.size() > 2 * options_.max_blocks) {
    blocks_.erase(order_.front());
    order_.pop_front();
  }
}

FollowCore::Wanted FollowCore::Take(size_t max) {
  Wanted out;
  while (!queue_.empty() && out.keys.size() < max) {
    const auto it = blocks_.find(queue_.front());
    if (it != blocks_.end()) {
      if (!out.keys.empty() && it->second.worker != out.worker_id) break;
      out.worker_id = it->second.worker;
      out.keys.push_back(queue_.front());
    }
    queue_.pop_front();
  }
  return out;
}

}  // namespace tidepool
