#include "server/http/http_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>

#include "base/bounded_queue.h"
#include "server/http/admin_server.h"
#include "tests/server/http/raw_client.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr absl::Duration kWait = absl::Seconds(20);

// A server with small limits and these routes: GET /hello, POST /echo, GET /open (hands the writer to the
// test), GET /item/{name}.
class HttpServerTest : public ::testing::Test {
 protected:
  HttpServerTest() {
    options_.limits.body_bytes_max = 1000;
    // Long: a busy machine may take a while between two lines of a test.
    options_.limits.header_timeout = options_.limits.body_timeout = absl::Seconds(30);
    options_.limits.idle_timeout = absl::Seconds(30);
    options_.limits.stream_buffer_bytes_max = 64 << 10;
  }
  void Start() {
    server_ = std::make_unique<HttpServer>(options_);
    server_->Handle("GET", "/hello", [](HttpRequest, std::shared_ptr<ResponseWriter> w) {
      w->Send(200, {{"Content-Type", "text/plain"}}, "hello");
    });
    server_->Handle("POST", "/echo", [](HttpRequest r, std::shared_ptr<ResponseWriter> w) {
      w->Send(200, {{"X-Query", r.query}}, r.body);
    });
    server_->Handle("GET", "/item/{name}",
                    [](HttpRequest r, std::shared_ptr<ResponseWriter> w) { w->Send(200, {}, r.param); });
    server_->Handle("GET", "/forgotten", [](HttpRequest, std::shared_ptr<ResponseWriter>) {});
    server_->Handle("GET", "/open", [this](HttpRequest, std::shared_ptr<ResponseWriter> w) {
      w->OnDisconnect([this](DisconnectReason r) { reasons_.TryPush(r); });
      ASSERT_TRUE(writers_.TryPush(w));
    });
    ASSERT_TRUE(server_->Start().ok());
  }
  std::shared_ptr<ResponseWriter> Writer() {
    auto writer = writers_.Pop(kWait);
    return writer ? *writer : nullptr;
  }
  std::string Ask(std::string_view request) {
    RawClient client(server_->port());
    client.Send(request);
    return client.ReadResponse();
  }

  HttpServer::Options options_;
  BoundedQueue<std::shared_ptr<ResponseWriter>> writers_{64};
  BoundedQueue<DisconnectReason> reasons_{64};
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, KeepsTheConnectionForTheNextRequest) {
  Start();
  RawClient client(server_->port());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(client.Send(Get("/hello")));
    const std::string response = client.ReadResponse();
    EXPECT_EQ(StatusOf(response), 200);
    EXPECT_EQ(BodyOf(response), "hello");
  }
  EXPECT_EQ(server_->stats().connections, 1u);
}

TEST_F(HttpServerTest, AnswersPipelinedRequestsInOrder) {
  Start();
  RawClient client(server_->port());
  client.Send(Post("/echo", "one") + Get("/item/two") + Post("/echo", "three") +
              Get("/hello", "Connection: close\r\n"));
  EXPECT_EQ(BodyOf(client.ReadResponse()), "one");
  EXPECT_EQ(BodyOf(client.ReadResponse()), "two");
  EXPECT_EQ(BodyOf(client.ReadResponse()), "three");
  EXPECT_THAT(client.ReadToEnd(), HasSubstr("Connection: close"));
  EXPECT_TRUE(client.closed_by_server());
}

TEST_F(HttpServerTest, RoutesByMethodAndDecodedPath) {
  Start();
  EXPECT_EQ(BodyOf(Ask(Get("/item/a%2Fb%20c?x=1"))), "a/b c");
  const std::string missing = Ask(Get("/nothing"));
  EXPECT_EQ(StatusOf(missing), 404);
  EXPECT_THAT(missing, HasSubstr("\"code\":\"not_found\""));
  EXPECT_EQ(StatusOf(Ask(Get("/item/"))), 404);
  const std::string method = Ask(Get("/echo"));
  EXPECT_EQ(StatusOf(method), 405);
  EXPECT_THAT(method, HasSubstr("Allow: POST\r\n"));
  EXPECT_EQ(StatusOf(Ask(Get("/item/%zz"))), 400);
}

TEST_F(HttpServerTest, HeadersOfAnAnswerCannotBeSplit) {
  Start();
  const std::string response =
      Ask("POST /echo?a\x01"
          "b HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n");
  EXPECT_THAT(response, Not(HasSubstr("a\x01")));
}

TEST_F(HttpServerTest, TakesChunkedBodies) {
  Start();
  EXPECT_EQ(BodyOf(Ask("POST /echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
                       "3\r\nabc\r\n4;ext=1\r\ndefg\r\n0\r\n\r\n")),
            "abcdefg");
}

TEST_F(HttpServerTest, SaysContinueToThoseWhoWait) {
  Start();
  RawClient client(server_->port());
  client.Send("POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_THAT(client.ReadUntil("\r\n\r\n"), StartsWith("HTTP/1.1 100 Continue"));
  client.Send("hi");
  EXPECT_THAT(client.ReadUntil("\r\n\r\nhi"), HasSubstr("HTTP/1.1 200"));
}

TEST_F(HttpServerTest, RefusesAmbiguousLengths) {
  Start();
  for (const char* headers : {
           "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
           "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
           "Content-Length: 3\r\nContent-Length: 3\r\n",
           "Content-Length: 3\r\nContent-Length: 4\r\n",
           "Content-Length: -1\r\n",
           "Content-Length: 0x3\r\n",
           "Transfer-Encoding: gzip, chunked\r\n",
           "Transfer-Encoding: identity\r\n",
       }) {
    const std::string response =
        Ask("POST /echo HTTP/1.1\r\nHost: t\r\n" + std::string(headers) + "\r\nabc\r\n\r\n");
    EXPECT_EQ(StatusOf(response), 400) << headers << response;
    EXPECT_THAT(response, HasSubstr("Connection: close")) << headers;
  }
}

TEST_F(HttpServerTest, RefusesWhatIsNotHttp) {
  Start();
  EXPECT_EQ(StatusOf(Ask("\x16\x03\x01\x02\r\n\r\n")), 400);
  EXPECT_EQ(StatusOf(Ask("GET /hello HTTP/1.1\r\n\r\n")), 400) << "no Host";
  EXPECT_EQ(StatusOf(Ask("GET /hello HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")), 400);
  EXPECT_EQ(StatusOf(Ask("GET /hello HTTP/1.1\r\nHost : a\r\n\r\n")), 400);
  EXPECT_EQ(server_->stats().protocol_errors, 4u);
  EXPECT_EQ(StatusOf(Ask(Get("/hello"))), 200) << "and serves the next client";
}

TEST_F(HttpServerTest, BoundsHeaders) {
  Start();
  std::string many;
  for (int i = 0; i < 100; ++i) many += "X-" + std::to_string(i) + ": v\r\n";
  EXPECT_EQ(StatusOf(Ask(Get("/hello", many))), 431) << "101 headers with Host";
  EXPECT_EQ(StatusOf(Ask(Get("/hello", "X: " + std::string(8200, 'a') + "\r\n"))), 431);
  std::string much;
  for (int i = 0; i < 10; ++i) much += "X-" + std::to_string(i) + ": " + std::string(7000, 'b') + "\r\n";
  EXPECT_EQ(StatusOf(Ask(Get("/hello", much))), 431);
  EXPECT_EQ(StatusOf(Ask(Get("/" + std::string(8300, 'c')))), 414);
}

TEST_F(HttpServerTest, BoundsBodiesBeforeAndWhileTheyArrive) {
  Start();
  EXPECT_EQ(StatusOf(Ask(Post("/echo", std::string(1000, 'x')))), 200);
  EXPECT_EQ(StatusOf(Ask("POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 1001\r\n\r\n")), 413)
      << "without waiting for the body";
  const std::string chunk = "1f4\r\n" + std::string(500, 'x') + "\r\n";
  EXPECT_EQ(StatusOf(Ask("POST /echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk +
                         chunk + chunk)),
            413);
  // A client that sends all of a big body before it reads still gets the answer, not a reset.
  EXPECT_EQ(StatusOf(Ask(Post("/echo", std::string(4 << 20, 'x')))), 413);
}

TEST_F(HttpServerTest, TimesSlowHeadersAndBodiesOut) {
  options_.limits.header_timeout = options_.limits.body_timeout = absl::Seconds(2);
  Start();
  RawClient silent(server_->port()), slow(server_->port()), body(server_->port());
  slow.Send("GET /hel");
  body.Send("POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nabc");
  EXPECT_EQ(StatusOf(slow.ReadToEnd()), 408);
  EXPECT_EQ(StatusOf(body.ReadToEnd()), 408);
  EXPECT_EQ(silent.ReadToEnd(), "") << "who asked nothing is owed nothing";
  EXPECT_TRUE(silent.closed_by_server());
}

TEST_F(HttpServerTest, RefusesConnectionsBeyondTheLimit) {
  options_.limits.connections_max = 2;
  Start();
  RawClient a(server_->port()), b(server_->port());
  a.Send(Get("/hello"));
  b.Send(Get("/hello"));
  EXPECT_EQ(StatusOf(a.ReadResponse()), 200);
  EXPECT_EQ(StatusOf(b.ReadResponse()), 200);
  RawClient c(server_->port());
  EXPECT_EQ(StatusOf(c.ReadToEnd()), 503);
  EXPECT_EQ(server_->stats().connections_refused, 1u);
}

TEST_F(HttpServerTest, StreamsFromAnotherThread) {
  Start();
  RawClient client(server_->port());
  client.Send(Get("/open"));
  auto writer = Writer();
  ASSERT_NE(writer, nullptr);
  writer->StartStream(200, {{"Content-Type", "text/event-stream"}});
  EXPECT_TRUE(writer->Write("data: 1\n\n"));
  EXPECT_THAT(client.ReadUntil("data: 1\n\n"), HasSubstr("Transfer-Encoding: chunked")) << "before the end";
  EXPECT_TRUE(writer->Write("data: 2\n\n"));
  writer->End();
  EXPECT_FALSE(writer->Write("late"));
  EXPECT_THAT(client.ReadResponse(), HasSubstr("9\r\ndata: 2\n\n\r\n0\r\n\r\n"));
  client.Send(Get("/hello"));
  EXPECT_EQ(StatusOf(client.ReadResponse()), 200) << "the connection is reused";
  EXPECT_EQ(reasons_.size(), 0u);
}

TEST_F(HttpServerTest, StreamsToHttp10UntilClose) {
  Start();
  RawClient client(server_->port());
  client.Send("GET /open HTTP/1.0\r\n\r\n");
  auto writer = Writer();
  ASSERT_NE(writer, nullptr);
  writer->StartStream(200, {});
  writer->Write("abc");
  writer->End();
  EXPECT_EQ(BodyOf(client.ReadToEnd()), "abc");
}

TEST_F(HttpServerTest, TellsOnceThatAWaitingClientLeft) {
  Start();
  for (const bool reset : {false, true}) {
    RawClient client(server_->port());
    client.Send(Get("/open"));
    auto writer = Writer();
    ASSERT_NE(writer, nullptr);
    reset ? client.Reset() : client.Close();
    const auto reason = reasons_.Pop(kWait);
    ASSERT_TRUE(reason.has_value());
    EXPECT_EQ(*reason, DisconnectReason::kClientGone);
    writer->Send(200, {}, "too late");
    EXPECT_FALSE(writer->Write("x"));
  }
  EXPECT_EQ(reasons_.size(), 0u);
}

TEST_F(HttpServerTest, TellsThatAStreamingClientLeft) {
  Start();
  RawClient client(server_->port());
  client.Send(Get("/open"));
  auto writer = Writer();
  ASSERT_NE(writer, nullptr);
  writer->StartStream(200, {});
  writer->Write("first");
  client.ReadUntil("first");
  client.Reset();
  EXPECT_TRUE(reasons_.Pop(kWait).has_value());
  EXPECT_FALSE(writer->Write("second"));
}

TEST_F(HttpServerTest, ResetInTheMiddleOfABodyHarmsNobody) {
  Start();
  {
    RawClient client(server_->port());
    client.Send("POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 900\r\n\r\nabc");
    client.Reset();
  }
  EXPECT_EQ(StatusOf(Ask(Get("/hello"))), 200);
}

TEST_F(HttpServerTest, CutsAClientThatLetsTheBufferRunFull) {
  Start();
  RawClient client(server_->port(), 4096);
  client.Send(Get("/open"));
  auto writer = Writer();
  ASSERT_NE(writer, nullptr);
  writer->StartStream(200, {});
  const std::string piece(4096, 'x');
  size_t accepted = 0;
  while (accepted < (64u << 20) && writer->Write(piece)) accepted += piece.size();
  // The stream buffer, and what the kernel's send buffer and the client's receive buffer took.
  EXPECT_LT(accepted, 2u << 20);
  const auto reason = reasons_.Pop(kWait);
  ASSERT_TRUE(reason.has_value());
  EXPECT_EQ(*reason, DisconnectReason::kSlowClient);
}

TEST_F(HttpServerTest, CutsAClientThatStopsReading) {
  options_.limits.slow_client_timeout = absl::Milliseconds(200);
  options_.limits.stream_buffer_bytes_max = 16 << 20;
  Start();
  RawClient client(server_->port(), 4096);
  client.Send(Get("/open"));
  auto writer = Writer();
  ASSERT_NE(writer, nullptr);
  writer->StartStream(200, {});
  EXPECT_TRUE(writer->Write(std::string(8 << 20, 'x')));
  const auto reason = reasons_.Pop(kWait);
  ASSERT_TRUE(reason.has_value());
  EXPECT_EQ(*reason, DisconnectReason::kSlowClient);
}

TEST_F(HttpServerTest, AnAbandonedRequestIs500AndAnAbandonedStreamIsCut) {
  Start();
  EXPECT_EQ(StatusOf(Ask(Get("/forgotten"))), 500);
  RawClient client(server_->port());
  client.Send(Get("/open"));
  {
    auto writer = Writer();
    ASSERT_NE(writer, nullptr);
    writer->StartStream(200, {});
    writer->Write("part");
    client.ReadUntil("part");
  }
  EXPECT_THAT(client.ReadToEnd(), Not(HasSubstr("0\r\n\r\n")));
  EXPECT_TRUE(client.closed_by_server());
}

TEST_F(HttpServerTest, ShutdownFinishesWhatIsInFlightAndCutsTheRest) {
  Start();
  RawClient idle(server_->port()), busy(server_->port()), stuck(server_->port());
  idle.Send(Get("/hello"));
  idle.ReadResponse();
  busy.Send(Get("/open"));
  auto first = Writer();
  stuck.Send(Get("/open"));
  auto second = Writer();
  ASSERT_TRUE(first && second);
  std::thread answer([&] {
    EXPECT_EQ(idle.ReadToEnd(), "") << "idle connections close first";
    first->Send(200, {}, "last words");
  });
  server_->Shutdown(absl::Seconds(3));
  answer.join();
  EXPECT_THAT(busy.ReadToEnd(), HasSubstr("last words"));
  EXPECT_EQ(stuck.ReadToEnd(), "");
  EXPECT_EQ(*reasons_.Pop(kWait), DisconnectReason::kShutdown);
  EXPECT_FALSE(second->Write("x")) << "a writer may outlive the server";
  EXPECT_FALSE(RawClient(server_->port()).connected());
}

TEST(HttpServerStartTest, NamesAnAddressThatItCannotUse) {
  HttpServer::Options options;
  options.listen = "nonsense";
  EXPECT_EQ(HttpServer(options).Start().code(), absl::StatusCode::kInvalidArgument);
  options.listen = "127.0.0.1:0";
  HttpServer first(options);
  ASSERT_TRUE(first.Start().ok());
  options.listen = "127.0.0.1:" + std::to_string(first.port());
  const absl::Status taken = HttpServer(options).Start();
  EXPECT_EQ(taken.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(taken.message()), HasSubstr(options.listen));
}

TEST(AdminServerTest, ShowsMetricsAndHealth) {
  MetricRegistry metrics;
  metrics.AddCounter("tidepool_test_total", "t").Add(3);
  std::atomic<bool> ready{false};
  auto server = StartAdminServer("127.0.0.1:0", metrics, [&] {
    ReadyReport report;
    report.checks = {{"engine", ""}, {"weights", ready ? "" : "still loading"}};
    return report;
  });
  ASSERT_TRUE(server.ok());
  auto ask = [&](std::string_view path) {
    RawClient client((*server)->port());
    client.Send(Get(path));
    return client.ReadResponse();
  };
  EXPECT_THAT(ask("/metrics"), HasSubstr("tidepool_test_total 3"));
  EXPECT_THAT(ask("/metrics"), HasSubstr("text/plain; version=0.0.4"));
  EXPECT_EQ(StatusOf(ask("/livez")), 200);
  EXPECT_EQ(StatusOf(ask("/readyz")), 503);
  EXPECT_THAT(ask("/readyz"), HasSubstr("weights: still loading"));
  ready = true;
  EXPECT_EQ(StatusOf(ask("/readyz")), 200);
  EXPECT_EQ(StatusOf(ask("/health")), 200);
}

}  // namespace
}  // namespace tidepool
