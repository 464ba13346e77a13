#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace tidepool {

using Sha256Digest = std::array<uint8_t, 32>;

// Sha256: incremental SHA-256 (OpenSSL). Not thread-safe; Finish may be called once.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  Sha256& Update(std::span<const uint8_t> bytes);
  Sha256& Update(std::string_view bytes);
  // Little-endian 64-bit: used to length-prefix variable fields, so that no two inputs encode alike.
  Sha256& UpdateU64(uint64_t v);
  // Length, then bytes.
  Sha256& UpdateField(std::string_view bytes);
  Sha256Digest Finish();

 private:
  void* ctx_;  // EVP_MD_CTX, kept out of this header
};

Sha256Digest HmacSha256(std::string_view key, std::string_view message);

// Constant-time in the contents (lengths may leak).
bool SecretEquals(std::string_view a, std::string_view b);

// XXH3-64 of a payload: detects corruption, not forgery.
uint64_t PayloadChecksum(std::span<const std::byte> payload);

std::string HexEncode(std::span<const uint8_t> bytes);

// 16 random bytes as 32 hex digits, from the operating system's generator.
std::string RandomHexId();

}  // namespace tidepool
