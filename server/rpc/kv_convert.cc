#include "server/rpc/kv_convert.h"

#include <cstring>
#include <string>

namespace tidepool {

absl::StatusOr<BlockKey> ToBlockKey(std::string_view bytes, std::string_view field) {
  BlockKey key;
  if (bytes.size() != key.bytes.size())
    return absl::InvalidArgumentError(std::string(field) + ": a block key has 32 bytes, not " +
                                      std::to_string(bytes.size()));
  std::memcpy(key.bytes.data(), bytes.data(), bytes.size());
  return key;
}

absl::StatusOr<Tier> FromProto(v1::KvTier tier, std::string_view field) {
  switch (tier) {
    case v1::KV_TIER_UNSPECIFIED:
    case v1::KV_TIER_HOST:
      return Tier::kHost;
    case v1::KV_TIER_DEVICE:
      return Tier::kDevice;
    case v1::KV_TIER_DISK:
      return Tier::kDisk;
    default:
      return absl::InvalidArgumentError(std::string(field) + ": " + std::to_string(static_cast<int>(tier)) +
                                        " is no tier; device (1), host (2) and disk (3) are");
  }
}

v1::KvTier ToProto(Tier tier) { return static_cast<v1::KvTier>(static_cast<int>(tier) + 1); }

}  // namespace tidepool
