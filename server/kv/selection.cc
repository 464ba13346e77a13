#include "server/kv/selection.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "base/status.h"
#include "kvstore/keys.h"
#include "server/rpc/kv_convert.h"

namespace tidepool {
namespace {

// Of one listing step: short enough that nothing waits for the pool's lock.
constexpr size_t kPageEntries = 1024;

absl::Status Bad(std::string_view field, std::string_view what) {
  return absl::InvalidArgumentError(std::string(field) + ": " + std::string(what));
}

bool Matches(const BlockFilter& filter, const TierEntry& entry) {
  return (!filter.tenant || *filter.tenant == entry.tenant) &&
         (!filter.session || *filter.session == entry.session);
}

std::vector<BlockKey> InOrder(std::vector<std::pair<uint32_t, BlockKey>> blocks) {
  std::sort(blocks.begin(), blocks.end());
  std::vector<BlockKey> out;
  out.reserve(blocks.size());
  for (const auto& [position, key] : blocks) out.push_back(key);
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

// FirstBlocks: the `limit` blocks of lowest position among any number.
class FirstBlocks {
 public:
  explicit FirstBlocks(size_t limit) : limit_(limit) {}
  void Add(uint32_t position, const BlockKey& key) {
    if (limit_ == 0) return;
    if (heap_.size() == limit_) {
      if (!(std::pair(position, key) < heap_.front())) return;
      std::pop_heap(heap_.begin(), heap_.end());
      heap_.pop_back();
    }
    heap_.emplace_back(position, key);
    std::push_heap(heap_.begin(), heap_.end());
  }
  std::vector<BlockKey> Take() { return InOrder(std::move(heap_)); }

 private:
  const size_t limit_;
  std::vector<std::pair<uint32_t, BlockKey>> heap_;  // the last of them in front
};

}  // namespace

absl::StatusOr<std::vector<BlockKey>> ParseKeys(const google::protobuf::RepeatedPtrField<std::string>& keys,
                                                std::string_view field) {
  if (keys.empty()) return Bad(field, "is empty; name at least one block key of 32 bytes");
  if (static_cast<size_t>(keys.size()) > kKvKeysMax) {
    return Bad(field, "has " + std::to_string(keys.size()) + " keys; at most " + std::to_string(kKvKeysMax) +
                          " a call");
  }
  std::vector<BlockKey> out;
  out.reserve(static_cast<size_t>(keys.size()));
  for (const std::string& bytes : keys) {
    TP_ASSIGN_OR_RETURN(const BlockKey key, ToBlockKey(bytes, field));
    out.push_back(key);
  }
  return out;
}

absl::StatusOr<KvSelection> ParseSelector(const KvContext& context, const v1::KvSelector& selector,
                                          KvSelectorKinds kinds, std::string_view field) {
  const std::string name(field);
  KvSelection out;
  const bool ours = selector.fingerprint().empty() || selector.fingerprint() == context.fingerprint;
  const auto not_here = [&](std::string_view what) {
    return Bad(field, std::string(what) + " cannot be used here; give keys or tokens" +
                          (kinds == KvSelectorKinds::kChainOrSession ? ", or a session" : ""));
  };
  switch (selector.blocks_case()) {
    case v1::KvSelector::kKeys: {
      TP_ASSIGN_OR_RETURN(auto keys, ParseKeys(selector.keys().keys(), name + ".keys"));
      if (ours) out.keys = std::move(keys);
      return out;
    }
    case v1::KvSelector::kTokens: {
      const auto& tokens = selector.tokens();
      const uint32_t block = context.layout.block_tokens;
      if (static_cast<uint32_t>(tokens.tokens_size()) < block) {
        return Bad(name + ".tokens", "has " + std::to_string(tokens.tokens_size()) +
                                         " tokens, fewer than one block of " + std::to_string(block));
      }
      if (static_cast<size_t>(tokens.tokens_size()) / block > kKvKeysMax) {
        return Bad(name + ".tokens", "has more than " + std::to_string(kKvKeysMax) + " blocks");
      }
      if (ours) {
        out.keys = BlockKeys(RootKey(context.fingerprint, context.layout, tokens.salt(), context.codec),
                             {tokens.tokens().data(), static_cast<size_t>(tokens.tokens_size())}, block);
      }
      return out;
    }
    case v1::KvSelector::kSession:
      if (kinds == KvSelectorKinds::kChain) return not_here("session");
      if (selector.session() == 0) return Bad(name + ".session", "0 is no session");
      if (ours) out.filter.emplace().session = selector.session();
      return out;
    case v1::KvSelector::kTenant:
      if (kinds != KvSelectorKinds::kAny) return not_here("tenant");
      if (selector.tenant().empty()) return Bad(name + ".tenant", "is empty");
      if (ours) out.filter.emplace().tenant = selector.tenant();
      return out;
    case v1::KvSelector::kAll:
      if (kinds != KvSelectorKinds::kAny) return not_here("all");
      if (!selector.all()) return Bad(name + ".all", "is false; leave it out or set it");
      if (ours) out.filter.emplace();
      return out;
    case v1::KvSelector::BLOCKS_NOT_SET:
      break;
  }
  return Bad(field, "is missing; name blocks by keys, tokens, session, tenant or all");
}

std::vector<BlockKey> HostKeys(const KvContext& context, const KvSelection& selection) {
  if (selection.keys) {
    const std::vector<bool> here = context.pool->Contains(*selection.keys);
    std::vector<BlockKey> out;
    for (size_t i = 0; i < here.size(); ++i) {
      if (here[i]) out.push_back((*selection.keys)[i]);
    }
    return out;
  }
  std::vector<std::pair<uint32_t, BlockKey>> found;
  for (std::optional<uint64_t> cursor = 0; selection.filter && cursor;) {
    BlockPool::Page page = context.pool->List(*cursor, kPageEntries, *selection.filter);
    for (const BlockPool::Entry& e : page.entries) found.emplace_back(e.info.position, e.info.key);
    cursor = page.next;
  }
  return InOrder(std::move(found));
}

std::vector<BlockKey> DiskKeys(const KvContext& context, const KvSelection& selection) {
  std::vector<BlockKey> out;
  if (context.disk == nullptr) return out;
  if (selection.keys) {
    for (const BlockKey& key : *selection.keys) {
      if (context.disk->Contains(key)) out.push_back(key);
    }
    return out;
  }
  std::vector<std::pair<uint32_t, BlockKey>> found;
  for (std::optional<uint64_t> cursor = 0; selection.filter && cursor;) {
    BlockTier::Page page = context.disk->List(*cursor, kPageEntries);
    for (const TierEntry& e : page.entries) {
      if (Matches(*selection.filter, e)) found.emplace_back(e.position, e.key);
    }
    cursor = page.next;
  }
  return InOrder(std::move(found));
}

KvListing ListKeys(const KvContext& context, const KvSelection& selection, size_t limit) {
  KvListing out;
  if (selection.keys) {
    out.keys = *selection.keys;
    out.selected = out.keys.size();
    if (out.keys.size() > limit) out.keys.resize(limit);
    return out;
  }
  FirstBlocks host(limit);
  for (std::optional<uint64_t> cursor = 0; selection.filter && cursor;) {
    const BlockPool::Page page = context.pool->List(*cursor, kPageEntries, *selection.filter);
    out.selected += page.entries.size();
    for (const BlockPool::Entry& e : page.entries) host.Add(e.info.position, e.info.key);
    cursor = page.next;
  }
  out.keys = host.Take();
  FirstBlocks disk(limit - out.keys.size());
  for (std::optional<uint64_t> cursor = 0; selection.filter && context.disk != nullptr && cursor;) {
    BlockTier::Page page = context.disk->List(*cursor, kPageEntries);
    std::erase_if(page.entries, [&](const TierEntry& e) { return !Matches(*selection.filter, e); });
    std::vector<BlockKey> keys;
    for (const TierEntry& e : page.entries) keys.push_back(e.key);
    const std::vector<bool> in_host = context.pool->Contains(keys);
    for (size_t i = 0; i < keys.size(); ++i) {
      if (in_host[i]) continue;
      ++out.selected;
      disk.Add(page.entries[i].position, keys[i]);
    }
    cursor = page.next;
  }
  const std::vector<BlockKey> rest = disk.Take();
  out.keys.insert(out.keys.end(), rest.begin(), rest.end());
  return out;
}

}  // namespace tidepool
