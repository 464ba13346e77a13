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

// PayloadDigest: the checksum of a payload that comes in pieces, taken while each is in the cache, or while
// it is copied: one pass, and what was stored is what was taken. Same value as PayloadChecksum of the whole,
// and by the same instructions: AVX-512 where the CPU has it, else AVX2. Not thread-safe.
class PayloadDigest {
 public:
  // `total`: bytes of the whole payload.
  explicit PayloadDigest(uint64_t total);

  uint64_t size() const { return taken_; }  // bytes taken so far
  // The next bytes; never more than `total` in all.
  void Update(std::span<const std::byte> piece);
  // The same for src.size() bytes that it also copies to `dst` (no overlap). `stream`: past the cache; other
  // threads see them after a store fence (_mm_sfence).
  void Copy(std::byte* dst, std::span<const std::byte> src, bool stream);
  // After the last byte.
  uint64_t Finish() const;

 private:
  static constexpr size_t kStripe = 64;
  static constexpr size_t kBlock = 1024;

  enum class Store { kNone, kCopy, kStream };
  void Take(std::byte* dst, std::span<const std::byte> src, Store store);
  void Consume(std::byte* dst, const std::byte* src, size_t blocks, Store store);

  alignas(kStripe) uint64_t sums_[8];
  const uint64_t total_;
  uint64_t taken_ = 0;
  uint64_t blocks_left_;                // that are neither consumed nor the last, which Finish takes
  size_t held_ = 0;                     // bytes of a block that is not complete, or of the last one
  std::byte buffer_[kStripe + kBlock];  // the end of the block before, then those
};

std::string HexEncode(std::span<const uint8_t> bytes);

// 16 random bytes as 32 hex digits, from the operating system's generator.
std::string RandomHexId();

}  // namespace tidepool
