#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kvstore/types.h"

namespace tidepool {

// AdmissionFilter: whether a block is worth a write to a tier whose writes cost (wear, bandwidth taken from
// loads). Most blocks are never used again (76% of Mooncake's conversation trace). Core: no clock; bounded
// memory. Not thread-safe.
class AdmissionFilter {
 public:
  virtual ~AdmissionFilter() = default;
  virtual std::string_view name() const = 0;
  // The block was published or found by a request: one use.
  virtual void OnUse(const BlockKey& key) = 0;
  // Whether to write the block. `victim`: what would have to go for it; null: there is room.
  virtual bool Admit(const BlockKey& key, const BlockKey* victim) const = 0;
};

// always   everything
// frequent Dynamo's rule: a block's score starts at 1, doubles with each further use, and loses 1 in each
// round
//          (one round is `capacity` uses of any block); 2 and more is written, so a block needs a second use
// tinylfu  TinyLFU (Einziger, Friedman, Manes 2017): what was used more often, lately, than what would have
// to go;
//          counted in a sketch (4 rows of 4-bit counters, halved every 10 * capacity uses) behind a filter
//          that takes each block's first use
std::vector<std::string_view> AdmissionNames();

// `capacity`: blocks that the tier holds, at least 1. InvalidArgument: no filter of this name; the message
// lists them.
absl::StatusOr<std::unique_ptr<AdmissionFilter>> CreateAdmissionFilter(std::string_view name,
                                                                       size_t capacity);

}  // namespace tidepool
