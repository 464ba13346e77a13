#pragma once

#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "kvstore/block_pool.h"
#include "server/kv/kv_context.h"

namespace tidepool {

// Limits of one call.
inline constexpr size_t kKvKeysMax = 65536;
inline constexpr size_t kKvWhereMax = 4096;
inline constexpr size_t kKvTenantsMax = 1000;

// Which blocks a v1::KvSelector means here.
struct KvSelection {
  // Exactly one of these, unless it is another model's: then neither, and nothing is meant.
  std::optional<std::vector<BlockKey>> keys;  // of keys or tokens, in their order
  std::optional<BlockFilter> filter;          // of tenant, session, all

  bool nothing() const { return !keys && !filter; }
};

// What a call takes.
enum class KvSelectorKinds {
  kChain,           // keys or tokens
  kChainOrSession,  // those, or a session
  kAny,
};

// InvalidArgument names the field (`field` is the selector's own) and what it may be.
absl::StatusOr<KvSelection> ParseSelector(const KvContext& context, const v1::KvSelector& selector,
                                          KvSelectorKinds kinds, std::string_view field = "blocks");
absl::StatusOr<std::vector<BlockKey>> ParseKeys(const google::protobuf::RepeatedPtrField<std::string>& keys,
                                                std::string_view field);

// The blocks of a selection that are in the host tier, or on the disk: those of a filter by position, so that
// heads come before tails.
std::vector<BlockKey> HostKeys(const KvContext& context, const KvSelection& selection);
std::vector<BlockKey> DiskKeys(const KvContext& context, const KvSelection& selection);

// The first `limit` blocks of a selection in either tier, those of the host first, and how many there are. Of
// keys: the keys themselves, wherever they are.
struct KvListing {
  std::vector<BlockKey> keys;
  uint64_t selected = 0;
};
KvListing ListKeys(const KvContext& context, const KvSelection& selection, size_t limit);

}  // namespace tidepool
