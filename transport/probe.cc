#include "transport/probe.h"

#include <string>

namespace tidepool {
namespace {

Counter& Bytes(MetricRegistry& registry, std::string_view transport, const char* direction,
               const char* kind) {
  return registry.AddCounter(
      "tidepool_transport_bytes_total", "Payload moved between processes, headers of ours included.",
      {{"transport", std::string(transport)}, {"direction", direction}, {"kind", kind}});
}

}  // namespace

TransportProbe::TransportProbe(MetricRegistry* registry, std::string_view transport)
    : own_(registry == nullptr ? std::make_unique<MetricRegistry>() : nullptr),
      registry_(registry == nullptr ? own_.get() : registry),
      connections(registry_->AddGauge("tidepool_transport_connections",
                                      "Connections to peers, either direction, not yet closed.",
                                      {{"transport", std::string(transport)}})),
      sent_control(Bytes(*registry_, transport, "sent", "control")),
      sent_bulk(Bytes(*registry_, transport, "sent", "bulk")),
      received_control(Bytes(*registry_, transport, "received", "control")),
      received_bulk(Bytes(*registry_, transport, "received", "bulk")) {
  int i = 0;
  for (const char* reason : {"limit", "handshake", "handshake_timeout", "idle", "protocol"}) {
    refused_[i++] = &registry_->AddCounter("tidepool_transport_connections_refused_total",
                                           "Connections refused or ended because of what the peer did.",
                                           {{"transport", std::string(transport)}, {"reason", reason}});
  }
}

}  // namespace tidepool
