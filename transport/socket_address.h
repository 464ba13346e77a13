#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace tidepool {

// SocketAddress: a numeric IP address with its port, as the kernel wants it. Value.
struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

// Numeric only: nothing here asks a name server. InvalidArgument otherwise.
absl::StatusOr<SocketAddress> MakeSocketAddress(const std::string& host, uint16_t port);

// "SCHEME:HOST:PORT" (the host of IPv6 holds colons, the port is after the last). `scheme` with its colon.
// InvalidArgument: another form, port 0, more than 64 characters.
absl::StatusOr<SocketAddress> ParseTransportAddress(std::string_view scheme, std::string_view address);

// The host of an IPv4 or IPv6 address, as text; its port.
std::string HostOf(const sockaddr* address);
uint16_t PortOf(const sockaddr* address);

// The first IP address, IPv4 before IPv6, of the first interface in a comma-separated list (":1" behind a
// device is UCX's port and is left out). InvalidArgument names the interface that has none.
absl::StatusOr<std::string> FirstAddressOf(const std::string& net_devices);

}  // namespace tidepool
