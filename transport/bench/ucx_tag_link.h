#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"

namespace tidepool {

// UcxTagLink: UCX as its own benchmark uses it, tag messages between two workers that know each other's
// packed address, with UCX's own defaults: what our transport is compared with. Single-threaded.
class UcxTagLink {
 public:
  // `tls`: UCX_TLS. Unavailable: UCX could not start.
  static absl::StatusOr<std::unique_ptr<UcxTagLink>> Create(const std::string& tls,
                                                            const std::string& net_devices);
  virtual ~UcxTagLink() = default;
  virtual std::string Address() const = 0;
  virtual absl::Status Join(const std::string& peer_address) = 0;
  // Sends (receives) `memory` in messages of `block` bytes, at most `in_flight` at once; returns when all are
  // through. Both sides give the same sizes. Gives up after `timeout_s`.
  virtual absl::Status Send(std::span<const std::byte> memory, size_t block, size_t in_flight,
                            double timeout_s) = 0;
  virtual absl::Status Receive(std::span<std::byte> memory, size_t block, size_t in_flight,
                               double timeout_s) = 0;
};

}  // namespace tidepool
