#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace tidepool {

// A listener's or a peer's "host:port"; an IPv6 host stands in brackets, "[::1]:8000".
struct HostPort {
  std::string host;  // without brackets; never empty
  uint16_t port = 0;

  std::string ToString() const;
  // True for names and addresses that only this machine can reach: localhost, 127.0.0.0/8, ::1.
  bool IsLoopback() const;
};

// Errors: InvalidArgument, saying what is wrong and showing a right one. No name is resolved.
absl::StatusOr<HostPort> ParseHostPort(std::string_view text);

}  // namespace tidepool
