#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "kvstore/types.h"
#include "tidepool/v1/cluster.pb.h"

// Codec: keys and tiers in the messages of cluster.proto and kv.proto. InvalidArgument names the field.
namespace tidepool {

// Unspecified is host; an enumerator from a later version is an error.
absl::StatusOr<Tier> FromProto(v1::KvTier tier, std::string_view field);
v1::KvTier ToProto(Tier tier);
absl::StatusOr<BlockKey> ToBlockKey(std::string_view bytes, std::string_view field);
inline std::string_view KeyBytes(const BlockKey& key) {
  return {reinterpret_cast<const char*>(key.bytes.data()), key.bytes.size()};
}

}  // namespace tidepool
