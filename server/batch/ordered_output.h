#pragma once

#include <string>

#include "absl/status/status.h"
#include "server/batch/input_index.h"

namespace tidepool {

// Moves a complete output into the order of its input: `output` appears (or is replaced) in one step, then
// `unordered` goes. Where lines are missing nothing is done. A crash at any point is mended by calling it
// again. Errors: as OpenOutput's, and of the files.
absl::Status PutInOrder(const InputIndex& index, const std::string& unordered, const std::string& output);

}  // namespace tidepool
