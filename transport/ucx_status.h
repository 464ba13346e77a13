#pragma once

#include <ucs/type/status.h>

#include <string>

#include "absl/status/status.h"

namespace tidepool {

// A UCX status as ours. For ucx_*.cc only.
inline absl::Status FromUcs(ucs_status_t s, const char* what) {
  if (s == UCS_OK) return absl::OkStatus();
  const std::string text = std::string(what) + ": " + ucs_status_string(s);
  switch (s) {
    case UCS_ERR_CANCELED:
      return absl::CancelledError(text);
    case UCS_ERR_NO_MEMORY:
    case UCS_ERR_NO_RESOURCE:
      return absl::ResourceExhaustedError(text);
    case UCS_ERR_INVALID_PARAM:
    case UCS_ERR_INVALID_ADDR:
      return absl::InvalidArgumentError(text);
    case UCS_ERR_MESSAGE_TRUNCATED:
      return absl::DataLossError(text);
    default:
      return absl::UnavailableError(text);
  }
}

}  // namespace tidepool
