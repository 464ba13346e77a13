#pragma once

#include <memory>
#include <string_view>

#include "base/probe.h"

namespace tidepool {

// Why a connection was refused or ended by us: the label values of the metric below.
enum class RefusedReason {
  kLimit,             // as many connections (or handshakes) as allowed
  kHandshake,         // no or a wrong certificate, garbage, another protocol; a wrong token
  kHandshakeTimeout,  // too slow to prove who it is
  kIdle,              // not a byte for the idle timeout
  kProtocol,          // proved who it is, and then broke the framing
};

// TransportProbe: what a transport counts. Any thread.
//   tidepool_transport_connections{transport}
//   tidepool_transport_bytes_total{transport,direction=sent|received,kind=control|bulk}
//   tidepool_transport_connections_refused_total{transport,reason}
class TransportProbe {
 public:
  // `registry` outlives the probe; null: counted for nobody.
  TransportProbe(MetricRegistry* registry, std::string_view transport);

  Counter& Refused(RefusedReason reason) { return *refused_[static_cast<int>(reason)]; }

 private:
  std::unique_ptr<MetricRegistry> own_;
  MetricRegistry* registry_;
  Counter* refused_[5];

 public:
  Gauge& connections;
  Counter& sent_control;
  Counter& sent_bulk;
  Counter& received_control;
  Counter& received_bulk;
};

}  // namespace tidepool
