#include "transport/socket_address.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netinet/in.h>

#include "base/status.h"

namespace tidepool {

absl::StatusOr<SocketAddress> MakeSocketAddress(const std::string& host, uint16_t port) {
  SocketAddress out;
  auto* v4 = reinterpret_cast<sockaddr_in*>(&out.storage);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&out.storage);
  if (inet_pton(AF_INET, host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(port);
    out.size = sizeof *v4;
  } else if (inet_pton(AF_INET6, host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(port);
    out.size = sizeof *v6;
  } else {
    return absl::InvalidArgumentError("'" + host + "' is not a numeric IP address");
  }
  return out;
}

absl::StatusOr<SocketAddress> ParseTransportAddress(std::string_view scheme, std::string_view address) {
  const size_t colon = address.rfind(':');
  if (!address.starts_with(scheme) || address.size() > 64 || colon < scheme.size()) {
    return absl::InvalidArgumentError("transport address is not of the form " + std::string(scheme) +
                                      "HOST:PORT");
  }
  const std::string_view digits = address.substr(colon + 1);
  unsigned port = 0;
  for (char c : digits) {
    if (c < '0' || c > '9' || port > 65535) port = 65536;
    port = port * 10 + static_cast<unsigned>(c - '0');
  }
  if (digits.empty() || digits.size() > 5 || port == 0 || port > 65535) {
    return absl::InvalidArgumentError("transport address has no valid port");
  }
  return MakeSocketAddress(std::string(address.substr(scheme.size(), colon - scheme.size())),
                           static_cast<uint16_t>(port));
}

std::string HostOf(const sockaddr* address) {
  char text[INET6_ADDRSTRLEN] = {};
  if (address->sa_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(address)->sin_addr, text, sizeof text);
  } else {
    inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr, text, sizeof text);
  }
  return text;
}

uint16_t PortOf(const sockaddr* address) {
  // Both families keep the port at the same place.
  return ntohs(reinterpret_cast<const sockaddr_in*>(address)->sin_port);
}

absl::StatusOr<std::string> FirstAddressOf(const std::string& net_devices) {
  const std::string device = net_devices.substr(0, net_devices.find_first_of(",:"));
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return absl::UnavailableError("interfaces cannot be listed");
  std::string v4, v6;
  for (const ifaddrs* i = all; i != nullptr; i = i->ifa_next) {
    if (i->ifa_addr == nullptr || device != i->ifa_name) continue;
    if (i->ifa_addr->sa_family == AF_INET && v4.empty()) v4 = HostOf(i->ifa_addr);
    if (i->ifa_addr->sa_family == AF_INET6 && v6.empty()) v6 = HostOf(i->ifa_addr);
  }
  freeifaddrs(all);
  if (v4.empty() && v6.empty()) {
    return absl::InvalidArgumentError("net_devices: interface '" + device +
                                      "' has no IP address here; name one that has, or set listen_host");
  }
  return v4.empty() ? v6 : v4;
}

}  // namespace tidepool
