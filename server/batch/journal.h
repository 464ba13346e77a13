#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace tidepool {

// What a run's output belongs to. JSON in a file beside it.
struct RunIdentity {
  std::string input_sha256;
  uint64_t input_bytes = 0;
  uint64_t lines = 0;

  bool operator==(const RunIdentity&) const = default;
};

// Claims an output for `identity`, before its first line is written. True: a run of the same input was begun
// there before, and goes on. `output_empty`: there is no output yet, or nothing in it. Errors:
// FailedPrecondition where the output belongs to another input or to nobody we know; as ReadSmallFile's and
// WriteFileAtomically's.
absl::StatusOr<bool> ClaimOutput(const std::string& journal_path, const RunIdentity& identity,
                                 bool output_empty);

}  // namespace tidepool
