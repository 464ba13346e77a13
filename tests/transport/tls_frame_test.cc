#include "transport/tls_frame.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "transport/transport.h"

namespace tidepool {
namespace {

using Event = TlsFrameReader::Event;

// Feeds `stream` at most `step` bytes at a time; records what happened.
struct Feeder {
  explicit Feeder(size_t step) : step(step) {}
  absl::Status Feed(std::string_view stream) {
    while (!stream.empty()) {
      auto next = reader.Next();
      EXPECT_FALSE(next.empty());
      const size_t n = std::min({step, next.size(), stream.size()});
      std::memcpy(next.data(), stream.data(), n);
      stream.remove_prefix(n);
      auto event = reader.Advance(n);
      if (!event.ok()) return event.status();
      if (*event == Event::kMessage) log.push_back("message " + std::string(reader.message()));
      if (*event == Event::kBulk) {
        log.push_back("bulk " + std::string(reader.bulk_header()) + " " +
                      std::to_string(reader.bulk_length()));
        memory.assign(drop ? 0 : reader.bulk_length(), std::byte{0});
        if (reader.bulk_length() > 0) reader.SetSink(memory);
      }
      if (*event == Event::kBulkDone) {
        log.push_back("done " + std::string(reinterpret_cast<const char*>(memory.data()), memory.size()));
      }
    }
    return absl::OkStatus();
  }
  size_t step;
  bool drop = false;
  std::byte scratch[7];
  TlsFrameReader reader{scratch};
  std::vector<std::byte> memory;
  std::vector<std::string> log;
};

std::string Head(TlsFrameType type, size_t header_bytes, uint64_t length) {
  std::string out;
  AppendTlsHead(out, type, header_bytes, length);
  return out;
}
std::string Message(const std::string& text) { return Head(TlsFrameType::kMessage, 0, text.size()) + text; }

TEST(TlsFrameTest, AHeadHasSixteenBytesInLittleEndianOrder) {
  EXPECT_EQ(Head(TlsFrameType::kBulk, 0x0102, 0x030405060708),
            std::string("\x01\x02\x02\x01\0\0\0\0\x08\x07\x06\x05\x04\x03\0\0", 16));
}

TEST(TlsFrameTest, FramesCutAnywhereReadTheSame) {
  const std::string stream = Message("hello") + Message("") + Head(TlsFrameType::kKeepAlive, 0, 0) +
                             Head(TlsFrameType::kBulk, 2, 10) + "hd" + Head(TlsFrameType::kChunk, 0, 4) +
                             "0123" + Message("between") + Head(TlsFrameType::kChunk, 0, 6) + "456789" +
                             Head(TlsFrameType::kBulk, 0, 0) + Message(std::string(100000, 'x'));
  const std::vector<std::string> expected = {"message hello",
                                             "message ",
                                             "bulk hd 10",
                                             "message between",
                                             "done 0123456789",
                                             "bulk  0",
                                             "message " + std::string(100000, 'x')};
  for (size_t step : {1, 2, 3, 15, 16, 17, 100, 1000000}) {
    Feeder feeder(step);
    ASSERT_TRUE(feeder.Feed(stream).ok()) << step;
    EXPECT_EQ(feeder.log, expected) << step;
  }
}

TEST(TlsFrameTest, ADroppedBulkGoesToTheScratchBuffer) {
  Feeder feeder(1000);
  feeder.drop = true;
  ASSERT_TRUE(feeder
                  .Feed(Head(TlsFrameType::kBulk, 0, 100) + Head(TlsFrameType::kChunk, 0, 100) +
                        std::string(100, 'z') + Message("after"))
                  .ok());
  EXPECT_EQ(feeder.log, (std::vector<std::string>{"bulk  100", "done ", "message after"}));
}

TEST(TlsFrameTest, WhatTheGrammarDoesNotAllowIsAnError) {
  std::string other_version = Message("x");
  other_version[0] = 2;
  std::string reserved = Message("x");
  reserved[5] = 1;
  const std::string bulk = Head(TlsFrameType::kBulk, 0, 10);
  for (const std::string& stream :
       {other_version, reserved, Head(static_cast<TlsFrameType>(0), 0, 0),
        Head(static_cast<TlsFrameType>(5), 0, 0), Head(TlsFrameType::kMessage, 1, 0),
        Head(TlsFrameType::kMessage, 0, Transport::kMaxMessageBytes + 1),
        Head(TlsFrameType::kMessage, 0, UINT64_MAX), Head(TlsFrameType::kBulk, 513, 0),
        Head(TlsFrameType::kBulk, 0, kTlsMaxBulkBytes + 1), Head(TlsFrameType::kBulk, 0, UINT64_MAX),
        Head(TlsFrameType::kChunk, 0, 1), bulk + Head(TlsFrameType::kChunk, 0, 11),
        bulk + Head(TlsFrameType::kChunk, 0, 0), bulk + Head(TlsFrameType::kChunk, 1, 5), bulk + bulk,
        Head(TlsFrameType::kKeepAlive, 0, 1)}) {
    Feeder feeder(1000);
    EXPECT_TRUE(absl::IsInvalidArgument(feeder.Feed(stream))) << stream.size();
  }
}

TEST(TlsFrameTest, AMessagesMemoryFollowsWhatArrivedNotWhatWasClaimed) {
  Feeder feeder(1000);
  ASSERT_TRUE(feeder.Feed(Head(TlsFrameType::kMessage, 0, Transport::kMaxMessageBytes)).ok());
  EXPECT_LE(feeder.reader.Next().size(), 16u * 1024);
}

}  // namespace
}  // namespace tidepool
