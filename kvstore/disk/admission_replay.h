#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kvstore/policy/replay.h"

namespace tidepool {

struct AdmissionReplayOptions {
  uint32_t blocks = 0;  // that the disk holds; at least 1
  std::string admission = "always";
  std::string eviction = "lru";
};

struct AdmissionReplayResult {
  uint64_t blocks = 0;   // looked up
  uint64_t hits = 0;     // found on the disk: prefixes only
  uint64_t written = 0;  // blocks

  double hit_rate() const {
    return blocks == 0 ? 0 : static_cast<double>(hits) / static_cast<double>(blocks);
  }
  double write_rate() const {
    return blocks == 0 ? 0 : static_cast<double>(written) / static_cast<double>(blocks);
  }
};

// What a disk of so many blocks gives for a trace, and what is written for it, under an admission filter: the
// disk tier's own ExtentTable and the filter itself, driven as a worker drives them (each use of a block that
// is there counts, each that is not offers it), with no host tier before them. InvalidArgument: no such
// filter or policy.
absl::StatusOr<AdmissionReplayResult> ReplayAdmission(const BlockTrace& trace,
                                                      const AdmissionReplayOptions& options);

}  // namespace tidepool
