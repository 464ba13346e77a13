#include "base/digest.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
// Compiled here for this build's instruction set: the shared library is built for the oldest one. Same
// values.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/status.h"

namespace tidepool {

Sha256::Sha256() : ctx_(EVP_MD_CTX_new()) {
  TP_CHECK(EVP_DigestInit_ex(static_cast<EVP_MD_CTX*>(ctx_), EVP_sha256(), nullptr) == 1);
}

Sha256::~Sha256() { EVP_MD_CTX_free(static_cast<EVP_MD_CTX*>(ctx_)); }

Sha256& Sha256::Update(std::span<const uint8_t> bytes) {
  TP_CHECK(EVP_DigestUpdate(static_cast<EVP_MD_CTX*>(ctx_), bytes.data(), bytes.size()) == 1);
  return *this;
}

Sha256& Sha256::Update(std::string_view bytes) {
  return Update(std::span(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()));
}

Sha256& Sha256::UpdateU64(uint64_t v) {
  std::array<uint8_t, 8> le;
  for (size_t i = 0; i < le.size(); ++i) le[i] = static_cast<uint8_t>(v >> (8 * i));
  return Update(le);
}

Sha256& Sha256::UpdateField(std::string_view bytes) { return UpdateU64(bytes.size()).Update(bytes); }

Sha256Digest Sha256::Finish() {
  Sha256Digest out;
  unsigned len = 0;
  TP_CHECK(EVP_DigestFinal_ex(static_cast<EVP_MD_CTX*>(ctx_), out.data(), &len) == 1 && len == out.size());
  return out;
}

Sha256Digest HmacSha256(std::string_view key, std::string_view message) {
  Sha256Digest out;
  unsigned len = 0;
  TP_CHECK(HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()),
                reinterpret_cast<const uint8_t*>(message.data()), message.size(), out.data(),
                &len) != nullptr);
  return out;
}

bool SecretEquals(std::string_view a, std::string_view b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

uint64_t PayloadChecksum(std::span<const std::byte> payload) {
  return XXH3_64bits(payload.data(), payload.size());
}

std::string HexEncode(std::span<const uint8_t> bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  out.reserve(bytes.size() * 2);
  for (uint8_t b : bytes) {
    out.push_back(kDigits[b >> 4]);
    out.push_back(kDigits[b & 15]);
  }
  return out;
}

std::string RandomHexId() {
  std::array<uint8_t, 16> bytes;
  TP_CHECK(RAND_bytes(bytes.data(), static_cast<int>(bytes.size())) == 1);
  return HexEncode(bytes);
}

}  // namespace tidepool
