#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "config/config.h"
#include "config/tenants.h"

namespace tidepool {

// Authenticator: who a request belongs to, and the salt that keeps tenants' KV apart. Thread-safe; keys can
// be replaced while requests come in.
class Authenticator {
 public:
  // `table`: as LoadTenants gives it. An empty server_key is drawn at random: cached prefixes then do not
  // survive a restart of the gateway.
  Authenticator(const TenantTable& table, std::string server_key);
  // Keys and limits of `config`. Errors: as LoadTenants.
  static absl::StatusOr<std::unique_ptr<Authenticator>> Create(const GatewayConfig& config);

  // From now on these keys and epochs hold. Without keys everybody is "default": a caller that reloads makes
  // sure that this is meant.
  void Replace(const TenantTable& table);

  // The tenant of `authorization` ("Bearer KEY"); "default" where no keys are configured.
  // Errors: Unauthenticated.
  absl::StatusOr<std::string> Tenant(std::string_view authorization) const;
  // The same of the bare key, as in Anthropic's x-api-key.
  absl::StatusOr<std::string> TenantOfKey(std::string_view key) const;

  // HMAC-SHA-256(server key, tenant and its cache_epoch, cache_salt), each length-prefixed: a client's
  // cache_salt divides its own tenant's cache and can never reach another's.
  std::string Salt(std::string_view tenant, std::string_view cache_salt) const;

  // A number for the conversation that this tenant calls `name`, from the same key: two tenants' never meet
  // but by chance, and nothing but what is kept in the pool depends on it. 0: no name, no session.
  uint64_t Session(std::string_view tenant, std::string_view name) const;

 private:
  struct Key {
    std::string sha256_hex;  // lower case
    std::string tenant;
  };
  struct Snapshot {
    std::vector<Key> keys;
    std::vector<TenantSettings> tenants;
  };
  static std::shared_ptr<const Snapshot> Take(const TenantTable& table);
  std::shared_ptr<const Snapshot> Get() const;

  std::string server_key_;
  mutable std::mutex mu_;
  std::shared_ptr<const Snapshot> snapshot_;  // guarded by mu_
};

}  // namespace tidepool
