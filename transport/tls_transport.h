#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/probe.h"
#include "transport/transport.h"

namespace tidepool {

struct TlsTransportOptions {
  std::string cert_file;  // PEM: this process's certificate, followed by its chain; required
  std::string key_file;   // PEM: its private key; required
  std::string ca_file;    // PEM: a peer's certificate must chain to one of these; required
  // This process's name (the worker's id) goes into Address(), and whoever connects with `check_name` set
  // demands a certificate whose subjectAltName (DNS) is that name.
  std::string name;
  bool check_name = false;
  std::string net_devices = "lo";  // the first address of the first of these, unless listen_host is given
  std::string listen_host;         // numeric; no wildcard by default
  uint16_t listen_port = 0;        // 0: any free one
  size_t max_connections = 1024;   // both directions; beyond: closed at once
  size_t max_handshakes = 64;      // of those, accepted ones that have not proved who they are
  // TCP and TLS together. A peer that is slower costs its connection.
  absl::Duration handshake_timeout = absl::Seconds(5);
  // A connection without a byte received for this long is closed: half-open ones end here. Peers send a
  // keep-alive record at a third of it.
  absl::Duration idle_timeout = absl::Seconds(30);
  const Clock* clock = &Clock::Real();
  MetricRegistry* metrics = nullptr;  // outlives the transport; null: not counted
};

// Framed TCP under mutual TLS 1.3, for networks one does not trust: nobody without a certificate of the CA
// gets a byte of its traffic parsed (transport/tls_frame.h is the grammar). Bulk data is decrypted straight
// into the memory that the handler named. Address() is "tls:HOST:PORT" or "tls:HOST:PORT#NAME".
// Close closes the socket and frees the TLS state: nothing can write to our memory afterwards, whatever the
// peer does.
// Memory: per connection one control message being read, and what was sent and not yet taken by the
// socket: control messages up to 4 MiB (beyond: ResourceExhausted from Send), bulk borrowed, not copied.
// Errors: InvalidArgument (files that are missing, unreadable or do not belong together; no such device),
// Unavailable (the address is taken).
absl::StatusOr<std::unique_ptr<Transport>> CreateTlsTransport(const TlsTransportOptions& options);

}  // namespace tidepool
