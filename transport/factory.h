#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/probe.h"
#include "transport/tls_transport.h"
#include "transport/transport.h"
#include "transport/ucx_transport.h"

namespace tidepool {

// Which transport to make, and how: what the configuration's section `transport` says.
struct TransportOptions {
  std::string kind = "ucx";           // ucx (private networks, fast) or tls (networks one does not trust)
  UcxOptions ucx;                     // read where kind is ucx
  TlsTransportOptions tls;            // read where kind is tls
  uint64_t max_bytes_per_second = 0;  // sent, bulk and control; 0: no limit (rate_limit.h)
  MetricRegistry* metrics = nullptr;  // outlives the transport; null: not counted
  const Clock* clock = &Clock::Real();
};

// The one place where transports are made. Errors: InvalidArgument (unknown kind, a device or a UCX transport
// that is not here, by name; certificates that cannot be read), Unavailable (the address is taken, UCX could
// not start).
absl::StatusOr<std::unique_ptr<Transport>> CreateTransport(const TransportOptions& options);

}  // namespace tidepool
