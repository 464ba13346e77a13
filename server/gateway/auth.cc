#include "server/gateway/auth.h"

#include "absl/strings/ascii.h"
#include "base/digest.h"
#include "base/status.h"

namespace tidepool {

Authenticator::Authenticator(const TenantTable& table, std::string server_key)
    : server_key_(server_key.empty() ? RandomHexId() + RandomHexId() : std::move(server_key)),
      snapshot_(Take(table)) {}

absl::StatusOr<std::unique_ptr<Authenticator>> Authenticator::Create(const GatewayConfig& config) {
  TP_ASSIGN_OR_RETURN(const TenantTable table, LoadTenants(config));
  return std::make_unique<Authenticator>(table, config.server_key);
}

std::shared_ptr<const Authenticator::Snapshot> Authenticator::Take(const TenantTable& table) {
  auto snapshot = std::make_shared<Snapshot>();
  for (const ApiKeyConfig& key : table.keys) snapshot->keys.push_back({key.key_sha256, key.tenant});
  snapshot->tenants = table.tenants;
  return snapshot;
}

void Authenticator::Replace(const TenantTable& table) {
  auto snapshot = Take(table);
  std::lock_guard lock(mu_);
  snapshot_ = std::move(snapshot);
}

std::shared_ptr<const Authenticator::Snapshot> Authenticator::Get() const {
  std::lock_guard lock(mu_);
  return snapshot_;
}

absl::StatusOr<std::string> Authenticator::Tenant(std::string_view authorization) const {
  constexpr std::string_view kBearer = "bearer ";
  if (Get()->keys.empty()) return std::string("default");
  if (authorization.size() <= kBearer.size() ||
      absl::AsciiStrToLower(std::string(authorization.substr(0, kBearer.size()))) != kBearer) {
    return absl::UnauthenticatedError("an API key is required: send it as 'Authorization: Bearer KEY'");
  }
  return TenantOfKey(authorization.substr(kBearer.size()));
}

absl::StatusOr<std::string> Authenticator::TenantOfKey(std::string_view key) const {
  const auto snapshot = Get();
  if (snapshot->keys.empty()) return std::string("default");
  const std::string digest = HexEncode(Sha256().Update(key).Finish());
  // All keys are compared, each in constant time: how long it takes tells nothing of which one matched, or
  // how nearly.
  const Key* found = nullptr;
  for (const Key& candidate : snapshot->keys) {
    if (SecretEquals(candidate.sha256_hex, digest)) found = &candidate;
  }
  if (found == nullptr) return absl::UnauthenticatedError("the API key is not known here");
  return found->tenant;
}

std::string Authenticator::Salt(std::string_view tenant, std::string_view cache_salt) const {
  uint32_t epoch = 0;
  for (const TenantSettings& settings : Get()->tenants) {
    if (settings.name == tenant) epoch = settings.cache_epoch;
  }
  std::string message;
  const auto number = [&message](uint64_t n) {
    for (int i = 0; i < 8; ++i, n >>= 8) message += static_cast<char>(n & 0xff);
  };
  for (std::string_view field : {tenant, cache_salt}) {
    number(field.size());
    message += field;
  }
  if (epoch != 0) number(epoch);  // last and of fixed size: no other message ends so
  const Sha256Digest mac = HmacSha256(server_key_, message);
  return std::string(reinterpret_cast<const char*>(mac.data()), mac.size());
}

uint64_t Authenticator::Session(std::string_view tenant, std::string_view name) const {
  if (name.empty()) return 0;
  // No salt's message begins so: those begin with the length of a tenant's name.
  std::string message("\xff\xff\xff\xff\xff\xff\xff\xffsession", 15);
  for (uint64_t n = tenant.size(), i = 0; i < 8; ++i, n >>= 8) message += static_cast<char>(n & 0xff);
  message += tenant;
  message += name;
  const Sha256Digest mac = HmacSha256(server_key_, message);
  uint64_t out = 0;
  for (int i = 0; i < 8; ++i) out = out << 8 | mac[static_cast<size_t>(i)];
  return out == 0 ? 1 : out;
}

}  // namespace tidepool
