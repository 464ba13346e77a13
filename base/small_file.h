#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace tidepool {

// Reads a whole regular file. Never waits (a pipe is refused, not opened for reading) and never takes more
// than `bytes_max` of memory, whatever the path names. Messages begin with the path. NotFound: absent.
// InvalidArgument: larger than bytes_max, not a regular file, or a link that leads nowhere. PermissionDenied.
// Unavailable: the system could not read it.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, uint64_t bytes_max);

// Opens a regular file for reading without waiting; the caller closes the descriptor. Errors as above.
absl::StatusOr<int> OpenRegularFile(const std::string& path, uint64_t& bytes);

}  // namespace tidepool
