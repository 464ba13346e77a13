#include "base/digest.h"

#include <gtest/gtest.h>

#include <vector>

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

}  // namespace
}  // namespace tidepool
