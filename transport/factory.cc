#include "transport/factory.h"

#include <utility>

#include "base/status.h"
#include "transport/rate_limit.h"

namespace tidepool {

absl::StatusOr<std::unique_ptr<Transport>> CreateTransport(const TransportOptions& options) {
  std::unique_ptr<Transport> transport;
  if (options.kind == "ucx") {
    UcxOptions ucx = options.ucx;
    ucx.metrics = options.metrics;
    TP_ASSIGN_OR_RETURN(transport, CreateUcxTransport(ucx));
  } else if (options.kind == "tls") {
    TlsTransportOptions tls = options.tls;
    tls.metrics = options.metrics;
    tls.clock = options.clock;
    TP_ASSIGN_OR_RETURN(transport, CreateTlsTransport(tls));
  } else {
    return absl::InvalidArgumentError("transport.kind '" + options.kind + "' is unknown; give ucx or tls");
  }
  return LimitRate(std::move(transport), options.max_bytes_per_second, options.clock, options.metrics);
}

}  // namespace tidepool
