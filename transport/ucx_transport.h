#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "transport/transport.h"

namespace tidepool {

struct UcxOptions {
  // UCX_NET_DEVICES, comma-separated. UCX trusts whoever reaches it: private interfaces only.
  std::string net_devices = "lo";
  // UCX_TLS. Shared memory may be named but UCX 1.13 does not use it here: its endpoints over shared
  // memory know no peer failure and so no force-close, without which memory could not be freed safely.
  std::string tls = "tcp,self";
  // Where peers connect; empty: the first address of the first of net_devices. No wildcard.
  std::string listen_host;
  uint16_t listen_port = 0;       // 0: any free one
  size_t max_connections = 1024;  // accepted ones; beyond: rejected
};

// UCX over active messages (UCP, one worker, no RMA feature): control messages eager and copied, bulk by
// rendezvous into the memory that the handler names. Address() is "ucx:HOST:PORT" of a UCX listener: each
// connection is a pair of endpoints of its own, so closing one never touches another, and an address that
// was tampered with cannot crash us (a packed UCX worker address can).
// Destroying it force-closes everything and runs no callbacks.
// Errors: InvalidArgument (no such device, bad address), Unavailable (UCX could not start).
absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(const UcxOptions& options);

}  // namespace tidepool
