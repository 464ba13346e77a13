#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace tidepool {

// UcxInventory: what the UCX library that is loaded offers on this machine. Value.
struct UcxInventory {
  struct Resource {
    std::string transport;  // as in UCX_TLS: tcp, posix, rc_verbs, ...
    std::string device;     // as in UCX_NET_DEVICES: lo, eth0, mlx5_0:1, memory
  };
  std::string version;                    // "1.13.1"
  std::vector<Resource> resources;        // sorted, each once
  std::vector<std::string> memory_types;  // "host", "cuda", ...: what messages may be sent from and into

  bool HasTransport(std::string_view name) const;  // also by UCX's family names: rc, ud, dc, ib, shm, cuda
  bool HasMemory(std::string_view type) const;
  std::string TransportNames() const;  // "cma, posix, self, sysv, tcp"
};

// Asks the library; opens every component once (milliseconds). Empty lists where UCX cannot start.
const UcxInventory& LoadedUcx();

// `tls`, a UCX_TLS list ("all" and "^..." pass unchecked). InvalidArgument names what is not offered here.
absl::Status CheckUcxTransports(std::string_view tls);

// UCX's own messages go to the log from here on, at a fitting level. Idempotent, any thread.
void RouteUcxLog();

}  // namespace tidepool
