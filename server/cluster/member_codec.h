#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "tidepool/v1/member.pb.h"

namespace tidepool {

// What stands in etcd of a process: JSON, for people with etcdctl; unknown fields are left alone, so that a
// newer version may add some. At most 4 KiB.
std::string EncodeMember(const v1::Member& member);

// InvalidArgument: not such JSON, too large, or id, role, boot_id or address is missing or malformed. Whoever
// can write to etcd may have written anything.
absl::StatusOr<v1::Member> DecodeMember(std::string_view json);

}  // namespace tidepool
