#include "base/digest.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
// Compiled here for this build's instruction set: the shared library is built for the oldest one. Same
// values.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "base/digest_kernels.h"
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

namespace {

// Up to here XXH3 is another formula, for which it needs all bytes at once.
constexpr uint64_t kShort = 240;
// The last stripe of all is mixed with the secret from here (xxHash's specification).
constexpr size_t kLastStripeSecret = XXH_SECRET_DEFAULT_SIZE - XXH_STRIPE_LEN - 7;
constexpr size_t kMergeSecret = 11;

const DigestKernels& Kernels() {
  static const DigestKernels& kernels = __builtin_cpu_supports("avx512f") ? kDigestAvx512 : kDigestAvx2;
  return kernels;
}

// `last`: the 1 to 1024 bytes of the last block; the 64 before it are there too.
uint64_t FinishSums(const uint64_t (&sums)[8], const std::byte* last, size_t size, uint64_t total) {
  alignas(64) xxh_u64 acc[8];
  std::copy(std::begin(sums), std::end(sums), acc);
  for (size_t n = 0; n < (size - 1) / XXH_STRIPE_LEN; ++n) {
    XXH3_accumulate_512(acc, last + n * XXH_STRIPE_LEN, XXH3_kSecret + n * XXH_SECRET_CONSUME_RATE);
  }
  XXH3_accumulate_512(acc, last + size - XXH_STRIPE_LEN, XXH3_kSecret + kLastStripeSecret);
  return XXH3_mergeAccs(acc, XXH3_kSecret + kMergeSecret, total * XXH_PRIME64_1);
}

constexpr uint64_t kStart[8] = XXH3_INIT_ACC;

}  // namespace

uint64_t PayloadChecksum(std::span<const std::byte> payload) {
  if (payload.size() <= kShort) return XXH3_64bits(payload.data(), payload.size());
  alignas(64) uint64_t sums[8];
  std::copy(std::begin(kStart), std::end(kStart), sums);
  const size_t blocks = (payload.size() - 1) / kDigestBlock;
  Kernels().take(sums, payload.data(), blocks, XXH3_kSecret);
  const size_t done = blocks * kDigestBlock;
  return FinishSums(sums, payload.data() + done, payload.size() - done, payload.size());
}

PayloadDigest::PayloadDigest(uint64_t total)
    : total_(total), blocks_left_(total == 0 ? 0 : (total - 1) / kBlock) {
  static_assert(kBlock == kDigestBlock && kStripe == XXH_STRIPE_LEN);
  std::copy(std::begin(kStart), std::end(kStart), sums_);
}

void PayloadDigest::Update(std::span<const std::byte> piece) { Take(nullptr, piece, Store::kNone); }

void PayloadDigest::Copy(std::byte* dst, std::span<const std::byte> src, bool stream) {
  Take(dst, src, stream ? Store::kStream : Store::kCopy);
}

void PayloadDigest::Consume(std::byte* dst, const std::byte* src, size_t blocks, Store store) {
  switch (store) {
    case Store::kNone:
      Kernels().take(sums_, src, blocks, XXH3_kSecret);
      break;
    case Store::kStream:
      if (reinterpret_cast<uintptr_t>(dst) % kStripe == 0) {
        Kernels().stream(sums_, src, blocks, XXH3_kSecret, dst);
        break;
      }
      [[fallthrough]];
    case Store::kCopy:
      Kernels().copy(sums_, src, blocks, XXH3_kSecret, dst);
  }
  blocks_left_ -= blocks;
  if (blocks_left_ == 0) std::memcpy(buffer_, src + blocks * kBlock - kStripe, kStripe);
}

void PayloadDigest::Take(std::byte* dst, std::span<const std::byte> src, Store store) {
  TP_CHECK(src.size() <= total_ - taken_);
  taken_ += src.size();
  while (!src.empty()) {
    const bool direct = held_ == 0 && blocks_left_ > 0 && src.size() >= kBlock;
    size_t n;
    if (direct) {
      const size_t blocks = std::min<uint64_t>(src.size() / kBlock, blocks_left_);
      n = blocks * kBlock;
      Consume(dst, src.data(), blocks, store);
    } else {
      n = std::min(src.size(), kBlock - held_);
      std::byte* const held = buffer_ + kStripe + held_;
      std::memcpy(held, src.data(), n);
      // From what is held: the source may be memory that another process can write to.
      if (store != Store::kNone) std::memcpy(dst, held, n);
      held_ += n;
      if (held_ == kBlock && blocks_left_ > 0) {
        Consume(nullptr, buffer_ + kStripe, 1, Store::kNone);
        held_ = 0;
      }
    }
    src = src.subspan(n);
    if (dst != nullptr) dst += n;
  }
}

uint64_t PayloadDigest::Finish() const {
  TP_CHECK(taken_ == total_);
  if (total_ <= kShort) return XXH3_64bits(buffer_ + kStripe, total_);
  return FinishSums(sums_, buffer_ + kStripe, held_, total_);
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
