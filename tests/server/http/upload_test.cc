#include <gtest/gtest.h>

#include <cstring>

#include "server/http/exchange.h"
#include "server/http/request_reader.h"

namespace tidepool {
namespace {

struct Sink final : HttpBodySink {
  std::string bytes;
  size_t wants = SIZE_MAX;
  bool Write(std::string_view part) override {
    bytes.append(part);
    return bytes.size() <= wants;
  }
};

void Feed(RequestReader& reader, std::string_view bytes) {
  const auto room = reader.Prepare(bytes.size());
  std::memcpy(room.data(), bytes.data(), bytes.size());
  reader.Commit(bytes.size());
}

// A reader with one upload route, POST /up of at most 1000 bytes, beside bodies of at most 10.
struct Fixture {
  std::shared_ptr<Sink> sink = std::make_shared<Sink>();
  bool take = true;
  std::string seen;
  HttpUploads uploads;
  HttpLimits limits;
  std::unique_ptr<RequestReader> reader;

  Fixture() {
    limits.body_bytes_max = 10;
    uploads[{"POST", "/up"}] = {1000, [this](const HttpRequest& head) -> std::shared_ptr<HttpBodySink> {
                                  seen =
                                      head.method + " " + head.path + " " + std::string(head.Header("x-key"));
                                  if (!take) return nullptr;
                                  return sink;
                                }};
    reader = std::make_unique<RequestReader>(limits, &uploads);
  }

  // In pieces, up to the request or an error.
  RequestReader::Step Read(const std::string& text, size_t step = 7) {
    for (size_t at = 0; at < text.size(); at += step) {
      Feed(*reader, std::string_view(text).substr(at, step));
      for (;;) {
        const RequestReader::Step next = reader->Next();
        if (next == RequestReader::Step::kMore) break;
        if (next != RequestReader::Step::kHead) return next;
      }
    }
    return RequestReader::Step::kMore;
  }
};

std::string Post(const std::string& path, const std::string& body, const std::string& more = "") {
  return "POST " + path + " HTTP/1.1\r\nHost: a\r\nX-Key: k\r\n" + more +
         "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

TEST(Upload, GoesToItsSinkAndNotIntoMemory) {
  for (size_t step : {1, 7, 64, 4096}) {
    Fixture f;
    const std::string body(900, 'x');
    ASSERT_EQ(f.Read(Post("/up?a=b", body), step), RequestReader::Step::kRequest);
    EXPECT_EQ(f.seen, "POST /up k");
    const auto taken = f.reader->Take();
    EXPECT_EQ(f.sink->bytes, body);
    EXPECT_EQ(taken.request.sink, f.sink);
    EXPECT_TRUE(taken.request.body.empty());
    EXPECT_TRUE(taken.keep_alive);
  }
}

TEST(Upload, ComesInChunksToo) {
  Fixture f;
  ASSERT_EQ(f.Read("POST /up HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
                   "5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"),
            RequestReader::Step::kRequest);
  f.reader->Take();
  EXPECT_EQ(f.sink->bytes, "hello world");
}

TEST(Upload, LimitsAreTheRoutesOwn) {
  Fixture f;
  EXPECT_EQ(f.Read(Post("/up", std::string(1001, 'x'))), RequestReader::Step::kError);
  EXPECT_EQ(f.reader->error().kind.status, 413);
  EXPECT_EQ(f.seen, "");  // not even opened
  Fixture chunked;
  std::string text = "POST /up HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
  for (int i = 0; i < 11; ++i) text += "64\r\n" + std::string(100, 'x') + "\r\n";
  EXPECT_EQ(chunked.Read(text), RequestReader::Step::kError);
  EXPECT_EQ(chunked.reader->error().kind.status, 413);
  Fixture other;
  EXPECT_EQ(other.Read(Post("/other", std::string(11, 'x'))), RequestReader::Step::kError);
  Fixture other_chunked;
  EXPECT_EQ(other_chunked.Read("POST /o HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
                               "b\r\n12345678901\r\n0\r\n\r\n"),
            RequestReader::Step::kError);
  Fixture small;
  ASSERT_EQ(small.Read(Post("/other", "0123456789")), RequestReader::Step::kRequest);
  EXPECT_EQ(small.reader->Take().request.body, "0123456789");
}

TEST(Upload, ThatNobodyTakesIsARequestWithoutABodyAndTheLast) {
  Fixture f;
  f.take = false;
  ASSERT_EQ(f.Read(Post("/up", std::string(900, 'x'), "Expect: 100-continue\r\n")),
            RequestReader::Step::kRequest);
  EXPECT_FALSE(f.reader->wants_continue());
  const auto taken = f.reader->Take();
  EXPECT_EQ(taken.request.sink, nullptr);
  EXPECT_FALSE(taken.keep_alive);
}

TEST(Upload, ASinkMayStopInTheMiddle) {
  Fixture f;
  f.sink->wants = 100;
  ASSERT_EQ(f.Read(Post("/up", std::string(900, 'x'))), RequestReader::Step::kRequest);
  const auto taken = f.reader->Take();
  EXPECT_EQ(taken.request.sink, f.sink);
  EXPECT_FALSE(taken.keep_alive);
  EXPECT_LT(f.sink->bytes.size(), 200u);
}

TEST(Exchange, SaysWhenThereIsRoomAgain) {
  Exchange::Context context;
  context.buffer_bytes_max = 1000;
  context.wake = [] {};
  context.cut = [](DisconnectReason) { FAIL() << "cut"; };
  Exchange exchange(context);
  exchange.StartStream(200, {});
  std::string head;
  exchange.Take(head);
  exchange.Wrote(head.size());
  int ready = 0;
  exchange.OnWritable([&] { ++ready; });
  EXPECT_EQ(ready, 1);
  ASSERT_TRUE(exchange.Write(std::string(600, 'x')));
  exchange.OnWritable([&] { ++ready; });
  EXPECT_EQ(ready, 1);
  exchange.Wrote(50);
  EXPECT_EQ(ready, 1);
  exchange.Wrote(200);
  EXPECT_EQ(ready, 2);
  exchange.Wrote(10);
  EXPECT_EQ(ready, 2);  // once
}

TEST(Exchange, ForgetsWhoWaitsForRoomWhenTheClientIsGone) {
  Exchange::Context context;
  context.buffer_bytes_max = 1000;
  context.wake = [] {};
  Exchange exchange(context);
  exchange.StartStream(200, {});
  ASSERT_TRUE(exchange.Write(std::string(700, 'x')));
  auto owned = std::make_shared<int>(1);
  exchange.OnWritable([owned] { FAIL() << "called"; });
  EXPECT_EQ(owned.use_count(), 2);
  exchange.Disconnect(DisconnectReason::kClientGone);
  EXPECT_EQ(owned.use_count(), 1);
}

}  // namespace
}  // namespace tidepool
