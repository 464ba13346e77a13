#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/probe.h"
#include "transport/transport.h"

namespace tidepool {

struct UcxOptions {
  // UCX_NET_DEVICES, comma-separated. UCX trusts whoever reaches it: private interfaces only.
  std::string net_devices = "lo";
  // UCX_TLS. shm (or posix, sysv, cma by name) reaches processes of this host over lanes of ucx_shm.h, the
  // rest (tcp, rc, ud, ...) everybody else; without shm or without the rest, only the other half is there.
  std::string tls = "tcp,self";
  // Where peers connect; empty: the first address of the first of net_devices. No wildcard.
  std::string listen_host;
  uint16_t listen_port = 0;           // 0: any free one
  size_t max_connections = 1024;      // accepted ones; beyond: rejected
  size_t max_shm_lanes = 64;          // of those, over shared memory: 2.5 MB each
  MetricRegistry* metrics = nullptr;  // outlives the transport; null: not counted
};

// UCX over active messages (UCP, no RMA feature): control messages eager and copied, bulk by rendezvous (over
// shared memory: see ucx_shm.h) into the memory that the handler names. Where there is only TCP, bulk up to
// 960 KiB is eager and copied, too: both ends need the same receive segment size, or the receiver ends.
// Address() is "ucx:HOST:PORT" of a UCX listener: each connection is a pair of endpoints of its own, so
// closing one never touches another, and an address that was tampered with cannot crash us (a packed UCX
// worker address can). With shared memory ";shm=..." follows (ucx_shm.h); peers of the same host take that.
// Destroying it force-closes everything and runs no callbacks.
// Errors: InvalidArgument (no such device, a transport that UCX does not offer here, by name; bad address),
// Unavailable (UCX could not start).
absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(const UcxOptions& options);

}  // namespace tidepool
