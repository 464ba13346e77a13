#include "server/http/request_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace tidepool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

void Feed(RequestReader& reader, std::string_view bytes) {
  const auto room = reader.Prepare(bytes.size());
  std::memcpy(room.data(), bytes.data(), bytes.size());
  reader.Commit(bytes.size());
}

// What came of `bytes`, fed in pieces of `piece`: one line a request ("METHOD path body"), then the code of
// the error, if there is one.
std::vector<std::string> Read(std::string_view bytes, size_t piece, const HttpLimits& limits = {}) {
  RequestReader reader(limits);
  std::vector<std::string> out;
  while (!bytes.empty()) {
    Feed(reader, bytes.substr(0, piece));
    bytes.remove_prefix(std::min(piece, bytes.size()));
    for (;;) {
      const auto step = reader.Next();
      if (step == RequestReader::Step::kMore) break;
      if (step == RequestReader::Step::kHead) continue;
      if (step == RequestReader::Step::kError) {
        out.emplace_back(reader.error().kind.code);
        EXPECT_EQ(reader.unread(), 0u);
        return out;
      }
      const auto taken = reader.Take();
      out.push_back(taken.request.method + " " + taken.request.path + " " + taken.request.body);
    }
  }
  return out;
}

TEST(RequestReaderTest, PiecesGiveWhatTheWholeGives) {
  HttpLimits limits;
  limits.body_bytes_max = 64;
  for (const char* bytes : {
           "GET /a HTTP/1.1\r\nHost: h\r\n\r\nPOST /b?q=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nxyz"
           "GET /c%20d HTTP/1.0\r\n\r\n",
           "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: "
           "chunked\r\n\r\n3;e=\"1\"\r\nabc\r\n2\r\nde\r\n0\r\nT: v\r\n\r\n",
           "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 65\r\n\r\n",
           "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n0\r\n\r\n",
           "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
           "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
           "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
       }) {
    const std::string_view view(bytes, std::strlen(bytes));
    const auto whole = Read(view, view.size(), limits);
    EXPECT_FALSE(whole.empty()) << bytes;
    for (const size_t piece : {1u, 2u, 7u}) EXPECT_EQ(Read(view, piece, limits), whole) << bytes;
  }
}

TEST(RequestReaderTest, TrailersAreNoHeaders) {
  RequestReader reader(HttpLimits{});
  Feed(reader,
       "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
       "Authorization: Bearer x\r\n\r\n");
  ASSERT_EQ(reader.Next(), RequestReader::Step::kHead);
  ASSERT_EQ(reader.Next(), RequestReader::Step::kRequest);
  const auto taken = reader.Take();
  EXPECT_EQ(taken.request.body, "a");
  EXPECT_EQ(taken.request.Header("host"), "h");
  EXPECT_EQ(taken.request.Header("authorization"), "");
}

TEST(RequestReaderTest, ABodyThatIsNotWantedIsNotWaitedFor) {
  const HttpBodyWanted wanted = [](const HttpRequest& head) { return head.Header("x-key") == "good"; };
  for (const char* key : {"good", "bad"}) {
    RequestReader reader(HttpLimits{}, nullptr, &wanted);
    Feed(reader, "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\nX-Key: " + std::string(key) +
                     "\r\nExpect: 100-continue\r\n\r\n");
    ASSERT_EQ(reader.Next(), RequestReader::Step::kHead);
    const bool good = std::string_view(key) == "good";
    EXPECT_EQ(reader.wants_continue(), good);
    ASSERT_EQ(reader.Next(), good ? RequestReader::Step::kMore : RequestReader::Step::kRequest);
    if (!good) {
      EXPECT_FALSE(reader.Take().keep_alive);
    }
  }
}

TEST(RequestReaderTest, ReadsPipelinedRequestsInOrder) {
  EXPECT_THAT(
      Read("GET /a HTTP/1.1\r\nHost: h\r\n\r\nPOST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi"
           "GET /c HTTP/1.1\r\nHost: h\r\n\r\n",
           4096),
      ElementsAre("GET /a ", "POST /b hi", "GET /c "));
}

TEST(RequestReaderTest, ATargetsAuthorityTakesHostsPlace) {
  RequestReader reader{HttpLimits()};
  Feed(reader, "GET HTTP://evil.example:80/livez?x=1 HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(reader.Next(), RequestReader::Step::kHead);
  EXPECT_EQ(reader.Next(), RequestReader::Step::kRequest);
  const auto taken = reader.Take();
  EXPECT_EQ(taken.request.path, "/livez");
  EXPECT_EQ(taken.request.query, "x=1");
  EXPECT_EQ(taken.request.Header("host"), "evil.example:80");
  EXPECT_THAT(Read("GET http://h HTTP/1.1\r\nHost: h\r\n\r\n", 4096), ElementsAre("GET / "));
}

TEST(RequestReaderTest, NulBytesAreRefused) {
  using namespace std::string_literals;
  EXPECT_THAT(Read("GET /a\0b HTTP/1.1\r\nHost: h\r\n\r\n"s, 4096), ElementsAre("bad_http"));
  EXPECT_THAT(Read("GET / HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n"s, 4096), ElementsAre("bad_http"));
  RequestReader reader{HttpLimits()};
  Feed(reader, "GET /a%00b HTTP/1.1\r\nHost: h\r\n\r\n");
  while (reader.Next() == RequestReader::Step::kHead) {
  }
  EXPECT_TRUE(reader.Take().bad_path);
}

TEST(RequestReaderTest, ABodyOfOneByteTooManyIsRefusedBeforeItCame) {
  EXPECT_THAT(Read("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10485761\r\n\r\n", 4096),
              ElementsAre("request_too_large"));
  EXPECT_THAT(Read("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 18446744073709551616\r\n\r\n", 4096),
              ElementsAre("bad_http"));
}

TEST(RequestReaderTest, AnEndlessChunkHeaderIsRefused) {
  const std::string head = "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
  for (const size_t piece : {1u, 4096u}) {
    EXPECT_THAT(Read(head + "1;" + std::string(40000, 'x'), piece), ElementsAre("bad_http")) << piece;
  }
}

TEST(RequestReaderTest, AfterAnErrorNothingIsTaken) {
  RequestReader reader{HttpLimits()};
  Feed(reader, "nonsense\r\n\r\n");
  EXPECT_EQ(reader.Next(), RequestReader::Step::kError);
  Feed(reader, "GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  EXPECT_EQ(reader.Next(), RequestReader::Step::kError);
  EXPECT_THAT(reader.error().message, HasSubstr("malformed"));
}

}  // namespace
}  // namespace tidepool
