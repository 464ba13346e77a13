#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tidepool {

// Who wrote the cluster's document, and when: put beside it in the same transaction, so that it is of it only
// where both have the same revision.
struct ConfigAuthor {
  std::string who;  // user@host
  absl::Time when;
};

// {"who": ..., "when": RFC 3339}, for people with etcdctl.
std::string EncodeConfigAuthor(const ConfigAuthor& author);
// InvalidArgument: not such JSON, or more than 1 KiB. `who` is as Printable gives it.
absl::StatusOr<ConfigAuthor> DecodeConfigAuthor(std::string_view json);

}  // namespace tidepool
