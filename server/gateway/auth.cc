#include "server/gateway/auth.h"

#include "absl/strings/ascii.h"
#include "base/digest.h"

namespace tidepool {

absl::StatusOr<Authenticator> Authenticator::Create(const GatewayConfig& config) {
  Authenticator auth;
  for (size_t i = 0; i < config.api_keys.size(); ++i) {
    const ApiKeyConfig& key = config.api_keys[i];
    const std::string where = "gateway.api_keys[" + std::to_string(i) + "]";
    std::string digest = absl::AsciiStrToLower(key.key_sha256);
    if (digest.size() != 64 || digest.find_first_not_of("0123456789abcdef") != std::string::npos) {
      return absl::InvalidArgumentError(where + ".key_sha256: must be the key's SHA-256 as 64 hex digits");
    }
    if (key.tenant.empty()) return absl::InvalidArgumentError(where + ".tenant: must not be empty");
    auth.keys_.push_back({std::move(digest), key.tenant});
  }
  auth.server_key_ = config.server_key.empty() ? RandomHexId() + RandomHexId() : config.server_key;
  return auth;
}

absl::StatusOr<std::string> Authenticator::Tenant(std::string_view authorization) const {
  if (keys_.empty()) return std::string("default");
  constexpr std::string_view kBearer = "bearer ";
  if (authorization.size() <= kBearer.size() ||
      absl::AsciiStrToLower(std::string(authorization.substr(0, kBearer.size()))) != kBearer) {
    return absl::UnauthenticatedError("an API key is required: send it as 'Authorization: Bearer KEY'");
  }
  const std::string digest = HexEncode(Sha256().Update(authorization.substr(kBearer.size())).Finish());
  // All keys are compared, so that the time tells nothing of which one matched.
  const Key* found = nullptr;
  for (const Key& key : keys_) {
    if (SecretEquals(key.sha256_hex, digest)) found = &key;
  }
  if (found == nullptr) return absl::UnauthenticatedError("the API key is not known here");
  return found->tenant;
}

std::string Authenticator::Salt(std::string_view tenant, std::string_view cache_salt) const {
  std::string message;
  for (std::string_view field : {tenant, cache_salt}) {
    uint64_t n = field.size();
    for (int i = 0; i < 8; ++i, n >>= 8) message += static_cast<char>(n & 0xff);
    message += field;
  }
  const Sha256Digest mac = HmacSha256(server_key_, message);
  return std::string(reinterpret_cast<const char*>(mac.data()), mac.size());
}

}  // namespace tidepool
