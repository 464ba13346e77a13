// A read is pending on a connection while its answer goes out: what it brings must not mix with what was read
// before it.
#include <gtest/gtest.h>

#include <cstring>

#include "server/http/request_reader.h"

namespace tidepool {
namespace {

void Fill(const boost::asio::mutable_buffer& room, std::string_view bytes) {
  std::memcpy(room.data(), bytes.data(), bytes.size());
}

TEST(ReadAheadTest, KeepsAReadThatWasPendingWhileARequestWasTaken) {
  RequestReader reader{HttpLimits{}};
  const std::string_view first = "GET /first HTTP/1.1\r\nHost: h\r\n\r\n";
  const std::string_view second = "GET /the-second HTTP/1.1\r\nHost: h\r\n\r\n";
  Fill(reader.Prepare(4096), first);
  reader.Commit(first.size());
  const auto pending = reader.Prepare(4096);  // the next read begins before the first request is looked at
  ASSERT_EQ(reader.Next(), RequestReader::Step::kHead);
  ASSERT_EQ(reader.Next(), RequestReader::Step::kRequest);
  EXPECT_EQ(reader.Take().request.path, "/first");
  Fill(pending, second);
  reader.Commit(second.size());
  ASSERT_EQ(reader.Next(), RequestReader::Step::kHead);
  ASSERT_EQ(reader.Next(), RequestReader::Step::kRequest);
  EXPECT_EQ(reader.Take().request.path, "/the-second");
}

}  // namespace
}  // namespace tidepool
