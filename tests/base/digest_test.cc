#include "base/digest.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/digest_kernels.h"
#include "base/rng.h"

namespace tidepool {
namespace {

TEST(Digest, Sha256MatchesTheStandardsVector) {
  // FIPS 180-2, B.1.
  EXPECT_EQ(HexEncode(Sha256().Update("abc").Finish()),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(Digest, HmacMatchesRfc4231) {
  // RFC 4231, test case 2.
  EXPECT_EQ(HexEncode(HmacSha256("Jefe", "what do ya want for nothing?")),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

TEST(Digest, FieldsAreLengthPrefixed) {
  const auto one = Sha256().UpdateField("ab").UpdateField("c").Finish();
  const auto two = Sha256().UpdateField("a").UpdateField("bc").Finish();
  EXPECT_NE(one, two);
}

TEST(Digest, SecretEqualsComparesContentsAndLength) {
  EXPECT_TRUE(SecretEquals("secret", "secret"));
  EXPECT_FALSE(SecretEquals("secret", "secreT"));
  EXPECT_FALSE(SecretEquals("secret", "secret "));
}

TEST(Digest, RandomIdsDiffer) {
  EXPECT_EQ(RandomHexId().size(), 32u);
  EXPECT_NE(RandomHexId(), RandomHexId());
}

TEST(Digest, ChecksumSeesOneFlippedBit) {
  std::vector<std::byte> page(4096, std::byte{1});
  const uint64_t before = PayloadChecksum(page);
  page[4000] ^= std::byte{4};
  EXPECT_NE(PayloadChecksum(page), before);
}

std::vector<std::byte> RandomBytes(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<std::byte> out(n);
  for (std::byte& b : out) b = static_cast<std::byte>(rng.Next());
  return out;
}

// Every length where the formula changes: short inputs, stripes of 64, blocks of 1024.
std::vector<size_t> Lengths() {
  std::vector<size_t> out;
  for (size_t n = 0; n <= 320; ++n) out.push_back(n);
  for (size_t near : {1024, 2048, 4096, 32768, 65536}) {
    for (size_t n = near - 66; n <= near + 66; ++n) out.push_back(n);
  }
  out.push_back(1 << 20);
  return out;
}

TEST(Digest, ChecksumIsXxh3AtEveryLength) {
  const auto bytes = RandomBytes((1 << 20) + 3, 1);
  for (size_t n : Lengths()) {
    for (size_t shift : {0, 3}) {
      const std::span<const std::byte> payload = std::span(bytes).subspan(shift, n);
      ASSERT_EQ(PayloadChecksum(payload), XXH3_64bits(payload.data(), n)) << n << " from " << shift;
    }
  }
}

TEST(Digest, PiecesOfAnySizeMakeTheSameChecksum) {
  const auto bytes = RandomBytes(1 << 20, 2);
  Rng rng(3);
  for (size_t n : Lengths()) {
    for (size_t most : {1, 100, 5000, 40000}) {
      if (n > 5000 && most < 5000) continue;
      const std::span<const std::byte> payload = std::span(bytes).first(n);
      PayloadDigest digest(n);
      for (size_t at = 0; at < n;) {
        const size_t piece = std::min<size_t>(n - at, 1 + rng.Below(most));
        digest.Update(payload.subspan(at, piece));
        at += piece;
        ASSERT_EQ(digest.size(), at);
      }
      ASSERT_EQ(digest.Finish(), XXH3_64bits(payload.data(), n)) << n << " in pieces of up to " << most;
    }
  }
}

TEST(Digest, WhatIsCopiedIsWhatIsTaken) {
  const auto bytes = RandomBytes((1 << 20) + 64, 4);
  Rng rng(5);
  for (size_t n : {1, 240, 241, 1023, 1024, 1025, 2048, 32768, 65536 + 7, 1 << 20}) {
    for (bool stream : {false, true}) {
      for (size_t shift : {0, 1, 32}) {
        const std::span<const std::byte> payload = std::span(bytes).subspan(shift, n);
        std::vector<std::byte> room(n + 3 * 64, std::byte{0xa5});
        std::byte* const aligned =
            room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64 + shift;
        PayloadDigest digest(n);
        for (size_t at = 0; at < n;) {
          const size_t piece = std::min<size_t>(n - at, rng.Below(2) ? 32768 : 1 + rng.Below(3000));
          digest.Copy(aligned + at, payload.subspan(at, piece), stream);
          at += piece;
        }
        ASSERT_EQ(digest.Finish(), XXH3_64bits(payload.data(), n)) << n;
        ASSERT_EQ(std::memcmp(aligned, payload.data(), n), 0) << n;
        ASSERT_EQ(aligned[n], std::byte{0xa5}) << n;
      }
    }
  }
}

TEST(Digest, ADigestThatBeganWithACopyGoesOnWithWhatLies) {
  const auto bytes = RandomBytes(100000, 6);
  std::vector<std::byte> dst(bytes.size());
  PayloadDigest digest(bytes.size());
  digest.Copy(dst.data(), std::span(bytes).first(70001), /*stream=*/false);
  digest.Update(std::span(bytes).subspan(digest.size()));
  EXPECT_EQ(digest.Finish(), PayloadChecksum(bytes));
}

TEST(Digest, BothInstructionSetsMakeTheSameSums) {
  if (!__builtin_cpu_supports("avx512f")) GTEST_SKIP() << "no AVX-512";
  const auto bytes = RandomBytes(64 * kDigestBlock, 7);
  const auto secret = RandomBytes(192, 8);
  const auto* key = reinterpret_cast<const unsigned char*>(secret.data());
  alignas(64) uint64_t a[8] = {1, 2, 3, 4, 5, 6, 7, 8}, b[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<std::byte> x(bytes.size()), y(bytes.size());
  kDigestAvx2.take(a, bytes.data(), 64, key);
  kDigestAvx512.take(b, bytes.data(), 64, key);
  EXPECT_TRUE(std::equal(a, a + 8, b));
  kDigestAvx2.copy(a, bytes.data(), 64, key, x.data());
  kDigestAvx512.copy(b, bytes.data(), 64, key, y.data());
  EXPECT_TRUE(std::equal(a, a + 8, b));
  EXPECT_EQ(x, bytes);
  EXPECT_EQ(y, bytes);
}

}  // namespace
}  // namespace tidepool
