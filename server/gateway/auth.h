#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "config/config.h"

namespace tidepool {

// Authenticator: who a request belongs to, and the salt that keeps tenants' KV apart. Immutable, thread-safe.
class Authenticator {
 public:
  // An empty server_key is drawn at random: cached prefixes then do not survive a restart of the gateway.
  // Errors: InvalidArgument (a digest that is not 64 hex digits, an empty tenant).
  static absl::StatusOr<Authenticator> Create(const GatewayConfig& config);

  // The tenant of `authorization` ("Bearer KEY"); "default" where no keys are configured.
  // Errors: Unauthenticated.
  absl::StatusOr<std::string> Tenant(std::string_view authorization) const;

  // HMAC-SHA-256(server key, tenant, cache_salt), each length-prefixed: a client's cache_salt divides its own
  // tenant's cache and can never reach another's.
  std::string Salt(std::string_view tenant, std::string_view cache_salt) const;

 private:
  struct Key {
    std::string sha256_hex;  // lower case
    std::string tenant;
  };
  std::vector<Key> keys_;
  std::string server_key_;
};

}  // namespace tidepool
