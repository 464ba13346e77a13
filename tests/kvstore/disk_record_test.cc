#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "base/rng.h"
#include "kvstore/disk/crc32c.h"
#include "kvstore/disk/record.h"
#include "kvstore/disk/rocks_index.h"

namespace tidepool {
namespace {

std::span<const std::byte> Bytes(std::string_view s) { return std::as_bytes(std::span(s.data(), s.size())); }

TEST(Crc32c, KnownValues) {
  // RFC 3720 B.4, and the usual check value.
  EXPECT_EQ(Crc32c(Bytes("123456789")), 0xe3069283u);
  EXPECT_EQ(Crc32c(Bytes(std::string(32, '\0'))), 0x8a9136aau);
  EXPECT_EQ(Crc32c(Bytes(std::string(32, '\xff'))), 0x62a8ab43u);
  EXPECT_EQ(Crc32c({}), 0u);
}

TEST(Crc32c, HardwareTableAndPiecesAgreeAtEveryLength) {
  Rng rng(1);
  std::vector<std::byte> data(40000);
  for (auto& b : data) b = static_cast<std::byte>(rng.Next());
  const auto check = [&](size_t from, size_t n) {
    const auto part = std::span(data).subspan(from, n);
    const uint32_t want = Crc32cPortable(part);
    ASSERT_EQ(Crc32c(part), want) << n;
    const size_t cut = n == 0 ? 0 : rng.Below(n);
    ASSERT_EQ(Crc32c(part.subspan(cut), Crc32c(part.first(cut))), want) << n;
    std::vector<std::byte> copy(n);
    ASSERT_EQ(Crc32cCopy(copy, part), want) << n;
    ASSERT_TRUE(std::ranges::equal(copy, part)) << n;
  };
  for (size_t n = 0; n < 1000; ++n) check(n % 7, n);
  for (const size_t n : {12287, 12288, 12289, 24576, 24577, 36863, 39990}) check(3, n);
}

RecordHeader Header() {
  RecordHeader h;
  h.stamp = {0x1122334455667788, 42};
  h.place = 7;
  h.space =
      RecordSpace("model", BlockLayout{.layers = 1, .kv_heads = 1, .head_dim = 8, .block_tokens = 4}, "none");
  h.layout = "l1 h1 d8 b4 bfloat16";
  h.info.key.bytes.fill(1);
  h.info.parent.emplace();
  h.info.parent->bytes.fill(2);
  h.info.tokens = {5, -1, 7, std::numeric_limits<int32_t>::max()};
  h.info.tenant = "tenant";
  h.info.session = 9;
  h.info.turn = 3;
  h.info.position = 11;
  h.info.compute_seconds = 0.25f;
  h.payload_bytes = 256;
  h.payload_crc = 0xdeadbeef;
  h.encoding = RecordEncoding::kPlanes;
  h.stored_bytes = 200;
  h.stored_crc = 0x01234567;
  return h;
}

TEST(RecordHeader, ComesBackAsItWent) {
  std::vector<std::byte> area(RecordHeaderBytes(4), std::byte{0xff});
  ASSERT_TRUE(EncodeRecordHeader(Header(), area).ok());
  const auto back = DecodeRecordHeader(area);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, Header());
  RecordHeader bare;
  ASSERT_TRUE(EncodeRecordHeader(bare, area).ok());
  EXPECT_EQ(*DecodeRecordHeader(area), bare);
}

TEST(RecordHeader, FirstBytesAreTheFormat) {
  std::vector<std::byte> area(RecordHeaderBytes(4));
  ASSERT_TRUE(EncodeRecordHeader(Header(), area).ok());
  EXPECT_EQ(std::memcmp(area.data(), "TPKVREC2", 8), 0);
  uint32_t used = 0;
  std::memcpy(&used, area.data() + 12, 4);
  EXPECT_EQ(used, 196u + 20 + 6 + 16);
  EXPECT_EQ(RecordHeaderBytes(32) % 64, 0u);
  EXPECT_EQ(RecordBytes(640, 256), kDiskPageBytes);
  EXPECT_EQ(RecordBytes(640, 4096), 2 * kDiskPageBytes);
}

// What this program wrote before records had sizes and encodings: made here by hand, byte by byte.
TEST(RecordHeader, VersionOneIsRead) {
  RecordHeader old = Header();
  old.version = 1;
  old.encoding = RecordEncoding::kPlain;
  old.stored_bytes = old.payload_bytes;
  old.stored_crc = old.payload_crc;
  std::vector<std::byte> area(RecordHeaderBytes(4));
  std::string text = "TPKVREC1";
  const auto number = [&](auto v) { text.append(reinterpret_cast<const char*>(&v), sizeof v); };
  const auto bytes = [&](const auto& digest) {
    text.append(reinterpret_cast<const char*>(digest.data()), digest.size());
  };
  number(uint32_t{0});
  number(uint32_t{180 + 20 + 6 + 16});
  number(old.stamp.run);
  number(old.stamp.serial);
  number(old.place);
  bytes(old.space);
  bytes(old.info.key.bytes);
  bytes(old.info.parent->bytes);
  number(old.info.session);
  number(old.info.turn);
  number(old.info.position);
  number(old.info.compute_seconds);
  number(uint32_t{1});
  number(old.payload_bytes);
  number(old.payload_crc);
  number(uint16_t{20});
  number(uint16_t{6});
  number(uint32_t{4});
  text += old.layout + old.info.tenant;
  for (const int32_t token : old.info.tokens) number(token);
  std::memcpy(area.data(), text.data(), text.size());
  const uint32_t crc = Crc32c(std::span(area).subspan(12, text.size() - 12));
  std::memcpy(area.data() + 8, &crc, 4);
  const auto back = DecodeRecordHeader(area);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, old);
  std::vector<std::byte> again(area.size(), std::byte{1});
  ASSERT_TRUE(EncodeRecordHeader(*back, again).ok());
  EXPECT_EQ(again, area);
}

TEST(RecordHeader, EveryFlippedBitIsNoticed) {
  std::vector<std::byte> area(RecordHeaderBytes(4));
  ASSERT_TRUE(EncodeRecordHeader(Header(), area).ok());
  for (size_t bit = 0; bit < area.size() * 8; ++bit) {
    area[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
    EXPECT_EQ(DecodeRecordHeader(area).status().code(), absl::StatusCode::kDataLoss) << bit;
    area[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
  }
}

TEST(RecordHeader, EveryCutIsNoticed) {
  std::vector<std::byte> area(RecordHeaderBytes(4));
  ASSERT_TRUE(EncodeRecordHeader(Header(), area).ok());
  for (size_t n = 0; n < 238; ++n) {
    EXPECT_FALSE(DecodeRecordHeader(std::span(area).first(n)).ok()) << n;
  }
}

TEST(RecordHeader, WhatDoesNotFitIsRefused) {
  std::vector<std::byte> area(RecordHeaderBytes(4));
  RecordHeader h = Header();
  h.info.tenant.assign(kRecordTenantBytesMax + 1, 't');
  EXPECT_EQ(EncodeRecordHeader(h, area).code(), absl::StatusCode::kInvalidArgument);
  h = Header();
  h.info.tokens.assign(1000, 1);
  EXPECT_EQ(EncodeRecordHeader(h, area).code(), absl::StatusCode::kInvalidArgument);
  h = Header();
  h.layout.assign(kRecordLayoutBytesMax + 1, 'l');
  EXPECT_EQ(EncodeRecordHeader(h, area).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(EncodeRecordHeader(Header(), std::span(area).first(100)).code(),
            absl::StatusCode::kInvalidArgument);
  // The largest of everything fits into the area made for it.
  h = Header();
  h.info.tenant.assign(kRecordTenantBytesMax, 't');
  h.layout.assign(kRecordLayoutBytesMax, 'l');
  h.info.tokens.assign(4, -5);
  ASSERT_TRUE(EncodeRecordHeader(h, area).ok());
  EXPECT_EQ(*DecodeRecordHeader(area), h);
}

TEST(RecordSpace, ModelLayoutAndCodecEachCount) {
  const BlockLayout layout{.layers = 1, .kv_heads = 1, .head_dim = 8, .block_tokens = 4};
  BlockLayout other = layout;
  other.kv_heads = 2;
  const auto space = RecordSpace("m", layout, "none");
  EXPECT_EQ(space, RecordSpace("m", layout, "none"));
  EXPECT_NE(space, RecordSpace("n", layout, "none"));
  EXPECT_NE(space, RecordSpace("m", other, "none"));
  EXPECT_NE(space, RecordSpace("m", layout, "int8"));
}

TEST(IndexValue, ComesBackAndDamageIsNoticed) {
  IndexEntry e;
  e.key.bytes.fill(3);
  e.place = 99;
  e.stamp = {1, 2};
  e.space = 77;
  e.parent.emplace();
  e.parent->bytes.fill(4);
  e.tenant = "tenant";
  e.session = 5;
  e.turn = 6;
  e.position = 7;
  e.compute_seconds = 1.5f;
  e.payload_bytes = 4096;
  e.encoding = RecordEncoding::kPlanes;
  e.stored_bytes = 3000;
  e.stored_at = 1'700'000'000;
  std::string value = EncodeIndexValue(e);
  ASSERT_TRUE(DecodeIndexValue(e.key, value).ok());
  EXPECT_EQ(*DecodeIndexValue(e.key, value), e);
  BlockKey other;
  EXPECT_FALSE(DecodeIndexValue(other, value).ok());  // an entry of another key
  for (size_t n = 0; n < value.size(); ++n) {
    EXPECT_FALSE(DecodeIndexValue(e.key, std::string_view(value).substr(0, n)).ok()) << n;
    value[n] = static_cast<char>(value[n] ^ 0x10);
    EXPECT_FALSE(DecodeIndexValue(e.key, value).ok()) << n;
    value[n] = static_cast<char>(value[n] ^ 0x10);
  }
}

TEST(IndexValue, VersionOneIsRead) {
  IndexEntry e;
  e.version = 1;
  e.key.bytes.fill(3);
  e.place = 99;
  e.payload_bytes = e.stored_bytes = 4096;
  e.tenant = "t";
  const std::string value = EncodeIndexValue(e);
  EXPECT_EQ(value.size(), 100u + 1 + 4);
  ASSERT_TRUE(DecodeIndexValue(e.key, value).ok());
  EXPECT_EQ(*DecodeIndexValue(e.key, value), e);
}

}  // namespace
}  // namespace tidepool
