#include "kvstore/fetch_codec.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/rng.h"

namespace tidepool {
namespace {

std::string Hex(std::string_view s) {
  return HexEncode({reinterpret_cast<const uint8_t*>(s.data()), s.size()});
}

FetchWireFrame Frame(auto body) {
  FetchWireFrame f;
  f.sender_boot = "AA";
  f.receiver_boot = "B";
  f.body = std::move(body);
  return f;
}

std::string Text(Rng& rng, size_t most) {
  std::string s(rng.Below(most + 1), ' ');
  for (char& c : s) c = static_cast<char>(rng.Next());
  return s;
}

FetchId Id(Rng& rng) {
  return {Text(rng, kMaxIdBytes), static_cast<uint32_t>(rng.Next()), static_cast<uint32_t>(rng.Next()),
          static_cast<uint32_t>(rng.Next())};
}

DataRange Range(Rng& rng) {
  return {static_cast<uint32_t>(rng.Next()),
          {static_cast<uint32_t>(rng.Next()), rng.Next()},
          static_cast<uint32_t>(rng.Next()),
          static_cast<uint32_t>(rng.Next()),
          static_cast<uint8_t>(rng.Next()),
          rng.Next(),
          rng.Next()};
}

FetchWireFrame RandomFrame(Rng& rng) {
  FetchWireFrame f;
  f.sender_boot = Text(rng, kMaxBootIdBytes);
  f.receiver_boot = Text(rng, kMaxBootIdBytes);
  const size_t n = rng.Below(20);
  switch (rng.Below(12)) {
    case 0:
      f.body = HelloFrame{Text(rng, kMaxIdBytes), Text(rng, kMaxIdBytes), Text(rng, kMaxIdBytes)};
      f.version = static_cast<uint8_t>(rng.Next());
      break;
    case 1:
      f.body = HelloAckFrame{Text(rng, kMaxIdBytes)};
      break;
    case 2:
      f.body = RefuseFrame{Id(rng), static_cast<RefuseReason>(rng.Below(256)), Text(rng, kMaxTextBytes)};
      break;
    case 3: {
      FetchFrame fetch{Id(rng), static_cast<uint32_t>(rng.Next()), rng.Next(), {}};
      for (size_t i = 0; i < n; ++i) {
        FetchItem item{{}, {static_cast<uint32_t>(rng.Next()), rng.Next()}};
        for (uint8_t& b : item.key.bytes) b = static_cast<uint8_t>(rng.Next());
        fetch.items.push_back(item);
      }
      f.body = fetch;
      break;
    }
    case 4:
      f.body = DataFrame{Id(rng), Range(rng)};
      break;
    case 5: {
      CommitFrame commit{Id(rng), static_cast<uint32_t>(rng.Next()), rng.Next(), rng.Next(), {}};
      for (size_t i = 0; i < n; ++i) commit.items.push_back({rng.Chance(0.5), rng.Next()});
      f.body = commit;
      break;
    }
    case 6:
      f.body = CommitAckFrame{Id(rng)};
      break;
    case 7:
      f.body = AbortFrame{Id(rng)};
      break;
    case 8:
      f.body = CreditFrame{Id(rng), rng.Next(), rng.Next(), rng.Chance(0.5)};
      break;
    case 9:
      f.body = ProgressFrame{Id(rng), rng.Next()};
      break;
    case 10:
      f.body = BatchFrame{Id(rng), static_cast<uint32_t>(rng.Next()), rng.Next(), rng.Next()};
      break;
    default:
      f.body = ReleaseFrame{Text(rng, kMaxIdBytes)};
  }
  return f;
}

// A frame whose sum is right whatever its bytes say: what a broken peer would send.
std::string WithSum(std::string content) {
  const uint64_t sum = PayloadChecksum(std::as_bytes(std::span(content)));
  for (int i = 0; i < 8; ++i) content.push_back(static_cast<char>(sum >> (8 * i)));
  return content;
}

TEST(FetchCodecTest, BytesAreTheDocumentedOnes) {
  auto expect = [&](const FetchWireFrame& f, const std::string& type, const std::string& body) {
    const std::string bytes = EncodeFetchFrame(f);
    EXPECT_EQ(Hex(bytes.substr(0, bytes.size() - 8)),
              absl::StrCat("54504b5603", type, "02004141010042", body));
  };
  const FetchId id{"r", 2, 3, 4};
  const std::string id_hex =
      "0100"
      "72"
      "02000000"
      "03000000"
      "04000000";
  expect(Frame(HelloFrame{"w", "fp", "l"}), "01",
         "0100"
         "77"
         "0200"
         "6670"
         "0100"
         "6c");
  expect(Frame(HelloAckFrame{"w"}), "02",
         "0100"
         "77");
  expect(Frame(RefuseFrame{id, RefuseReason::kBusy, "no"}), "03",
         id_hex +
             "03"
             "0200"
             "6e6f");
  FetchFrame fetch{id, 1000, 0x10203, {{{}, {0x0a0b, 0x0102030405060708}}}};
  fetch.items[0].key.bytes.fill(0xcc);
  std::string key_hex;
  for (int i = 0; i < 32; ++i) key_hex += "cc";
  expect(Frame(fetch), "04",
         id_hex +
             "e8030000"
             "0302010000000000"
             "01000000" +
             key_hex +
             "0b0a0000"
             "0807060504030201");
  expect(Frame(DataFrame{id, {5, {6, 7}, 0, 8, 1, 9, 10}}), "05",
         id_hex +
             "05000000"
             "06000000"
             "0700000000000000"
             "00000000"
             "08000000"
             "01"
             "0900000000000000"
             "0a00000000000000");
  expect(Frame(CommitFrame{id, 1, 2, 3, {{true, 4}, {false, 0}}}), "06",
         id_hex +
             "01000000"
             "0200000000000000"
             "0300000000000000"
             "02000000"
             "01"
             "0400000000000000"
             "00"
             "0000000000000000");
  expect(Frame(CommitAckFrame{id}), "07", id_hex);
  expect(Frame(AbortFrame{id}), "08", id_hex);
  expect(Frame(ReleaseFrame{"r"}), "09",
         "0100"
         "72");
  expect(Frame(CreditFrame{id, 1, 2, true}), "0a",
         id_hex +
             "0100000000000000"
             "0200000000000000"
             "01");
  expect(Frame(ProgressFrame{id, 5}), "0b", id_hex + "0500000000000000");
  expect(Frame(BatchFrame{id, 2, 3, 4}), "0c",
         id_hex +
             "02000000"
             "0300000000000000"
             "0400000000000000");
}

TEST(FetchCodecTest, EveryFrameComesBackAsItWas) {
  Rng rng(1);
  for (int i = 0; i < 3000; ++i) {
    const FetchWireFrame f = RandomFrame(rng);
    auto back = DecodeFetchFrame(EncodeFetchFrame(f));
    ASSERT_TRUE(back.ok()) << back.status();
    ASSERT_TRUE(*back == f) << i;
  }
}

TEST(FetchCodecTest, TheLargestFramesFitTheirLimits) {
  FetchFrame fetch{{std::string(kMaxIdBytes, 'r'), 1, 2, 3}, 4, 5, {}};
  fetch.items.resize(kMaxFetchKeys);
  FetchWireFrame f = Frame(fetch);
  f.sender_boot = f.receiver_boot = std::string(kMaxBootIdBytes, 'b');
  EXPECT_LE(EncodeFetchFrame(f).size(), 256u * 1024);
  // Bulk headers.
  f.body = DataFrame{fetch.id, {}};
  EXPECT_LE(EncodeFetchFrame(f).size(), 512u);
  f.body = BatchFrame{fetch.id};
  EXPECT_LE(EncodeFetchFrame(f).size(), 512u);
}

TEST(FetchCodecTest, DamageAndTruncationAreDetected) {
  Rng rng(2);
  for (int i = 0; i < 500; ++i) {
    const std::string good = EncodeFetchFrame(RandomFrame(rng));
    std::string bad = good;
    bad[rng.Below(bad.size())] ^= static_cast<char>(1 << rng.Below(8));
    EXPECT_FALSE(DecodeFetchFrame(bad).ok());
    EXPECT_FALSE(DecodeFetchFrame(good.substr(0, rng.Below(good.size()))).ok());
    EXPECT_FALSE(DecodeFetchFrame(good + "x").ok());
  }
}

// With the sum made right again, the grammar itself has to hold.
TEST(FetchCodecTest, MutatedFramesWithARightSumNeverReadOutOfBoundsAndReencodeAlike) {
  Rng rng(3);
  int accepted = 0;
  for (int i = 0; i < 30000; ++i) {
    std::string bytes = EncodeFetchFrame(RandomFrame(rng));
    bytes.resize(bytes.size() - 8);
    for (uint64_t n = 1 + rng.Below(4); n > 0; --n) {
      const size_t at = rng.Below(bytes.size());
      switch (rng.Below(4)) {
        case 0:
          bytes[at] = static_cast<char>(rng.Next());
          break;
        case 1:
          bytes[at] = static_cast<char>(0xff);
          break;
        case 2:
          bytes.erase(at, 1 + rng.Below(8));
          break;
        default:
          bytes.insert(at, 1, static_cast<char>(rng.Next()));
      }
      if (bytes.empty()) bytes.assign(1, 'T');
    }
    auto frame = DecodeFetchFrame(WithSum(bytes));
    if (!frame.ok()) continue;
    ++accepted;
    auto again = DecodeFetchFrame(EncodeFetchFrame(*frame));
    ASSERT_TRUE(again.ok() && *again == *frame);
  }
  EXPECT_GT(accepted, 1000);
}

TEST(FetchCodecTest, ACountBeyondTheBytesIsRefusedBeforeAnythingIsAllocated) {
  std::string bytes = EncodeFetchFrame(Frame(FetchFrame{{"r", 1, 2, 3}, 4, 5, {}}));
  bytes.resize(bytes.size() - 8);
  for (size_t i = 0; i < 4; ++i) bytes[bytes.size() - 4 + i] = static_cast<char>(0xff);
  EXPECT_TRUE(absl::IsDataLoss(DecodeFetchFrame(WithSum(bytes)).status()));
}

TEST(FetchCodecTest, AnotherVersionIsNamedExceptInHelloWhichAlwaysDecodes) {
  FetchWireFrame f = Frame(CommitAckFrame{{"r", 1, 2, 3}});
  f.version = 9;
  const absl::Status s = DecodeFetchFrame(EncodeFetchFrame(f)).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(s));
  EXPECT_NE(s.ToString().find("version 9"), std::string::npos);
  f.body = HelloFrame{"w", "fp", "l"};
  auto hello = DecodeFetchFrame(EncodeFetchFrame(f));
  ASSERT_TRUE(hello.ok());
  EXPECT_EQ(hello->version, 9);
}

TEST(FetchCodecTest, TheDigestDependsOnKeysChecksumsAndPresence) {
  std::vector<FetchItem> asked(2);
  asked[1].key.bytes.fill(1);
  const std::vector<CommitItem> both = {{true, 5}, {true, 6}};
  const uint64_t digest = ManifestDigest(asked, both);
  EXPECT_NE(digest, ManifestDigest(asked, {{true, 6}, {true, 5}}));
  EXPECT_NE(digest, ManifestDigest(asked, {{true, 5}, {false, 6}}));
  std::swap(asked[0], asked[1]);
  EXPECT_NE(digest, ManifestDigest(asked, both));
}

TEST(FetchCodecTest, ABatchsDirectoryComesBackAndItsDamageIsDetected) {
  Rng rng(4);
  for (int i = 0; i < 300; ++i) {
    std::vector<DataRange> ranges(rng.Below(20));
    uint64_t payload = 0;
    for (DataRange& range : ranges) {
      range = Range(rng);
      range.length = rng.Below(100);
      payload += range.length;
    }
    std::vector<std::byte> bytes(ranges.size() * kRangeBytes + payload);
    BatchFrame batch{{}, static_cast<uint32_t>(ranges.size()), bytes.size(), 0};
    batch.checksum = EncodeDirectory(ranges, std::span(bytes).first(ranges.size() * kRangeBytes));
    const auto back = DecodeDirectory(batch, bytes);
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_TRUE(*back == ranges);
    if (ranges.empty()) continue;

    std::vector<std::byte> bad = bytes;
    bad[rng.Below(ranges.size() * kRangeBytes)] ^= std::byte{1};
    EXPECT_TRUE(absl::IsDataLoss(DecodeDirectory(batch, bad).status()));
    bad = bytes;
    bad.push_back(std::byte{0});
    EXPECT_TRUE(absl::IsDataLoss(DecodeDirectory(batch, bad).status()));
    EXPECT_TRUE(absl::IsDataLoss(
        DecodeDirectory(batch, std::span(bytes).first(ranges.size() * kRangeBytes - 1)).status()));
    batch.count = UINT32_MAX;
    EXPECT_TRUE(absl::IsDataLoss(DecodeDirectory(batch, bytes).status()));
  }
}

// With the checksum made right: a peer that lies.
TEST(FetchCodecTest, ADirectoryWhoseLengthsDoNotAddUpIsRefused) {
  for (uint64_t length : {uint64_t{7}, uint64_t{9}, ~uint64_t{0}}) {
    std::vector<DataRange> ranges(2);
    ranges[0].length = length;
    ranges[1].length = 0;
    std::vector<std::byte> bytes(2 * kRangeBytes + 8);
    BatchFrame batch{{}, 2, bytes.size(), 0};
    batch.checksum = EncodeDirectory(ranges, std::span(bytes).first(2 * kRangeBytes));
    EXPECT_TRUE(absl::IsDataLoss(DecodeDirectory(batch, bytes).status())) << length;
  }
}

TEST(FetchCodecTest, ABlocksSumDependsOnEveryRangeAndOnHowItWasCut) {
  const uint64_t sum = BlockSum(std::vector<RangeSum>{{0, 2, 5}, {2, 4, 6}});
  EXPECT_EQ(sum, BlockSum(std::vector<RangeSum>{{0, 2, 5}, {2, 4, 6}}));
  EXPECT_NE(sum, BlockSum(std::vector<RangeSum>{{0, 2, 6}, {2, 4, 5}}));
  EXPECT_NE(sum, BlockSum(std::vector<RangeSum>{{0, 1, 5}, {1, 4, 6}}));
  EXPECT_NE(sum, BlockSum(std::vector<RangeSum>{{0, 4, 5}}));
}

}  // namespace
}  // namespace tidepool
