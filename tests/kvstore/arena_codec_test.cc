#include "kvstore/arena_codec.h"

#include <gtest/gtest.h>

#include "tests/kvstore/fetch_test_util.h"

namespace tidepool {
namespace {

std::span<const std::byte> Bytes(const std::string& s) { return std::as_bytes(std::span(s)); }

std::vector<ArenaPacket> Samples() {
  return {ArenaHello{.token = "t", .boot = "b", .worker = "w", .fingerprint = "f", .layout = "l"},
          ArenaTake{.id = 7, .time_left_ms = 100, .request = "r", .keys = {TestKey(1), TestKey(2)}},
          ArenaTake{},
          ArenaRelease{.ids = {1, 2, UINT64_MAX}},
          ArenaRelease{},
          ArenaDone{"request"},
          ArenaCancel{9},
          ArenaWelcome{
              .arena_bytes = 1ull << 40, .stride = 64, .slot_bytes = 63, .slots = 5, .directory_bytes = 6},
          ArenaRefuse{ArenaRefusal::kUser, "no"},
          ArenaGrant{.id = 3, .short_of_room = true, .slots = {{1, 2}, {kAbsentSlot, 0}}}};
}

TEST(ArenaCodec, WhatIsWrittenIsRead) {
  for (const ArenaPacket& p : Samples()) {
    auto read = DecodeArenaPacket(Bytes(EncodeArenaPacket(p)));
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(*read, p);
  }
}

TEST(ArenaCodec, TheLongestPacketsFit) {
  ArenaTake take{.request = std::string(kMaxArenaText, 'r'), .keys = std::vector<BlockKey>(kMaxArenaKeys)};
  ArenaGrant grant{.slots = std::vector<SlotRef>(kMaxArenaKeys)};
  ArenaRelease release{.ids = std::vector<uint64_t>(kMaxArenaReleases)};
  for (const ArenaPacket& p : std::vector<ArenaPacket>{take, grant, release}) {
    EXPECT_LE(EncodeArenaPacket(p).size(), kMaxArenaPacket);
    EXPECT_TRUE(DecodeArenaPacket(Bytes(EncodeArenaPacket(p))).ok());
  }
}

TEST(ArenaCodec, WhatIsCutOrLongerIsRefused) {
  for (const ArenaPacket& p : Samples()) {
    const std::string whole = EncodeArenaPacket(p);
    for (size_t n = 0; n < whole.size(); ++n)
      EXPECT_FALSE(DecodeArenaPacket(Bytes(whole.substr(0, n))).ok()) << n << " of " << whole.size();
    EXPECT_FALSE(DecodeArenaPacket(Bytes(whole + "x")).ok());
  }
}

TEST(ArenaCodec, NoBytesCanDoHarm) {
  Rng rng(1);
  const std::vector<ArenaPacket> samples = Samples();
  for (int i = 0; i < 20000; ++i) {
    std::string bytes = EncodeArenaPacket(samples[rng.Below(samples.size())]);
    const uint64_t flips = 1 + rng.Below(4);
    for (uint64_t f = 0; f < flips; ++f) bytes[rng.Below(bytes.size())] = static_cast<char>(rng.Next());
    auto read = DecodeArenaPacket(Bytes(bytes));
    if (read.ok()) {
      EXPECT_EQ(EncodeArenaPacket(*read).size(), bytes.size());
    }
  }
}

}  // namespace
}  // namespace tidepool
