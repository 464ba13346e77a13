#pragma once

#include <cstdint>

#include "base/probe.h"
#include "config/config.h"
#include "transport/factory.h"

namespace tidepool {

// What the configuration says of the transport, as the transport room takes it: for every process that
// makes one (workers, stores, doctor, benchmarks). `name`: of this process, for peers' certificates checks.
inline TransportOptions TransportOptionsOf(const TransportConfig& config, const std::string& name,
                                           MetricRegistry* metrics) {
  TransportOptions out;
  out.kind = config.kind;
  out.max_bytes_per_second = config.max_bytes_per_second;
  out.metrics = metrics;
  out.ucx.net_devices = config.net_devices;
  out.ucx.tls = config.ucx_tls;
  out.ucx.listen_port = static_cast<uint16_t>(config.port);
  out.tls.net_devices = config.net_devices;
  out.tls.listen_port = static_cast<uint16_t>(config.port);
  out.tls.cert_file = config.tls_cert;
  out.tls.key_file = config.tls_key;
  out.tls.ca_file = config.tls_ca;
  out.tls.check_name = config.tls_check_name;
  out.tls.name = name;
  return out;
}

}  // namespace tidepool
