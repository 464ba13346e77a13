#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "config/config.h"

namespace tidepool {

struct TenantSettings {
  std::string name;
  TenantLimitsConfig limits;
  // A part of the tenant's cache salt: another number, and nothing that was cached before is found again. For
  // a name that is given to somebody else.
  uint32_t cache_epoch = 0;
};

// TenantTable: who may call, and what each may use. Immutable once shared.
struct TenantTable {
  std::vector<ApiKeyConfig> keys;       // empty: no authentication, one tenant "default"
  std::vector<TenantSettings> tenants;  // those with settings of their own
  TenantLimitsConfig defaults;          // of the others

  // Of a tenant, with its own settings or the defaults.
  TenantSettings Settings(std::string_view tenant) const;
};

// From gateway.api_keys_file where there is one, else from gateway.api_keys. Errors: NotFound;
// InvalidArgument listing every problem, one a line, with its place.
absl::StatusOr<TenantTable> LoadTenants(const GatewayConfig& config);

// The file's text, YAML or JSON (which is YAML):
//
//   keys:
//     - {key_sha256: <64 lower-case hex digits>, tenant: team-a}
//   tenants:                        # may be left out, and so may each limit: then gateway.tenant_limits'
//   holds
//     - {name: team-a, requests_per_minute: 600, tokens_per_minute: 100000, max_inflight: 32,
//        max_queued_requests: 64, max_queued_tokens: 65536, cache_epoch: 0}
//
// At least one key: an emptied file must not open the door to everybody. `name` stands in messages.
absl::StatusOr<TenantTable> ParseTenants(std::string_view yaml, std::string_view name,
                                         const TenantLimitsConfig& defaults);

}  // namespace tidepool
