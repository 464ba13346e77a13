#pragma once

#include <string>

#include "tidepool/v1/cluster.pb.h"

namespace tidepool {

// Of all that two workers of one cluster must have in common (ClusterView compares the same), for
// Member.identity: 32 hex digits.
std::string ModelIdentityDigest(const v1::ModelIdentity& model);

}  // namespace tidepool
