#include "server/bench/http_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>

namespace tidepool {
namespace {

using testing::HasSubstr;

HttpUrl UrlOf(int port) {
  auto url = ParseHttpUrl("http://127.0.0.1:" + std::to_string(port));
  EXPECT_TRUE(url.ok());
  return *url;
}

// Counts answers down.
class Latch {
 public:
  explicit Latch(int count) : count_(count) {}
  void Down() {
    std::lock_guard lock(mu_);
    --count_;
    changed_.notify_all();
  }
  [[nodiscard]] bool Wait() {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, std::chrono::seconds(60), [&] { return count_ <= 0; });
  }

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  int count_;
};

class Recorder final : public HttpReplyHandler {
 public:
  explicit Recorder(Latch& latch) : latch_(latch) {}
  void OnHead(int status, HttpHeaders, absl::Time) override { http = status; }
  void OnBody(std::string_view bytes, absl::Time) override {
    body += bytes;
    if (on_body) on_body();
  }
  void OnDone(absl::Status s, absl::Time) override {
    ++done;
    status = std::move(s);
    latch_.Down();
  }

  int http = 0, done = 0;
  std::string body;
  absl::Status status;
  std::function<void()> on_body;

 private:
  Latch& latch_;
};

class HttpClientTest : public testing::Test {
 protected:
  void SetUp() override {
    server_.Handle("POST", "/echo", [](HttpRequest request, std::shared_ptr<ResponseWriter> writer) {
      writer->Send(200, {{"X-Type", std::string(request.Header("x-type"))}}, request.body);
    });
    server_.Handle("GET", "/stream", [](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
      writer->StartStream(200, {{"Content-Type", "text/event-stream"}});
      for (int i = 0; i < 100; ++i) writer->Write("data: " + std::to_string(i) + "\n\n");
      writer->End();
    });
    server_.Handle("GET", "/cut", [](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
      writer->StartStream(200, {});
      writer->Write("half");
      writer->Abort();
    });
    server_.Handle("GET", "/held", [this](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
      writer->StartStream(200, {});
      writer->Write("first");
      std::lock_guard lock(mu_);
      held_.push_back(std::move(writer));
    });
    ASSERT_TRUE(server_.Start().ok());
  }
  void TearDown() override {
    std::lock_guard lock(mu_);
    held_.clear();
  }

  OutboundCall Call(const std::string& method, const std::string& target, const std::string& body = "") {
    OutboundCall call;
    call.url = UrlOf(server_.port());
    call.method = method;
    call.target = target;
    call.body = body;
    call.timeout = absl::Seconds(30);
    return call;
  }

  std::mutex mu_;
  std::vector<std::shared_ptr<ResponseWriter>> held_;
  HttpServer server_{{}};
  HttpClient client_;
};

TEST_F(HttpClientTest, FetchesBodiesOfAnySize) {
  for (const size_t size : {size_t{0}, size_t{1}, size_t{70'000}, size_t{5'000'000}}) {
    OutboundCall call = Call("POST", "/echo", std::string(size, 'x'));
    call.headers = {{"X-Type", "t"}};
    const auto reply = client_.Fetch(call);
    ASSERT_TRUE(reply.ok()) << reply.status();
    EXPECT_EQ(reply->status, 200);
    EXPECT_EQ(reply->body, std::string(size, 'x'));
    EXPECT_EQ(reply->Header("x-type"), "t");
  }
  EXPECT_EQ(client_.connections(), 1u);  // one after the other on one connection
}

TEST_F(HttpClientTest, GivesAStreamWithoutItsFraming) {
  const auto reply = client_.Fetch(Call("GET", "/stream"));
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_THAT(reply->body, HasSubstr("data: 0\n\n"));
  EXPECT_TRUE(reply->body.ends_with("data: 99\n\n"));
}

TEST_F(HttpClientTest, KeepsRequestsOfOneConnectionApart) {
  // Each request goes out as soon as the answer before it is in, while the server may still be at its end.
  for (int i = 0; i < 500; ++i) {
    const std::string body = std::to_string(i) + std::string(static_cast<size_t>(i % 7) * 100, 'y');
    const auto reply = client_.Fetch(Call("POST", "/echo", body));
    ASSERT_TRUE(reply.ok()) << i << ": " << reply.status();
    ASSERT_EQ(reply->body, body);
  }
}

TEST_F(HttpClientTest, HoldsManyStreamsAtOnce) {
  constexpr int kStreams = 400;
  Latch begun(kStreams), done(kStreams);
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (int i = 0; i < kStreams; ++i) {
    recorders.push_back(std::make_shared<Recorder>(done));
    recorders.back()->on_body = [&, first = true]() mutable {
      if (std::exchange(first, false)) begun.Down();
    };
    client_.Send(Call("GET", "/held"), recorders.back());
  }
  ASSERT_TRUE(begun.Wait());
  EXPECT_EQ(client_.connections(), static_cast<size_t>(kStreams));
  {
    std::lock_guard lock(mu_);
    for (auto& writer : held_) {
      writer->Write(" last");
      writer->End();
    }
  }
  ASSERT_TRUE(done.Wait());
  for (const auto& recorder : recorders) {
    EXPECT_TRUE(recorder->status.ok());
    EXPECT_EQ(recorder->body, "first last");
    EXPECT_EQ(recorder->done, 1);
  }
}

TEST_F(HttpClientTest, TellsAnAnswerThatIsCutFromACompleteOne) {
  EXPECT_TRUE(absl::IsDataLoss(client_.Fetch(Call("GET", "/cut")).status()));
}

TEST_F(HttpClientTest, EndsAtTheDeadline) {
  OutboundCall call = Call("GET", "/held");
  call.timeout = absl::Milliseconds(50);
  EXPECT_TRUE(absl::IsDeadlineExceeded(client_.Fetch(call).status()));
}

TEST_F(HttpClientTest, CancelsFromAnotherThread) {
  Latch begun(1), done(1);
  auto recorder = std::make_shared<Recorder>(done);
  recorder->on_body = [&] { begun.Down(); };
  const auto call = client_.Send(Call("GET", "/held"), recorder);
  ASSERT_TRUE(begun.Wait());
  if (auto running = call.lock()) running->Cancel();
  ASSERT_TRUE(done.Wait());
  EXPECT_TRUE(absl::IsCancelled(recorder->status));
}

TEST_F(HttpClientTest, EndsEveryCallWhenItGoes) {
  Latch begun(3), done(3);
  std::vector<std::shared_ptr<Recorder>> recorders;
  {
    HttpClient client;
    for (int i = 0; i < 3; ++i) {
      recorders.push_back(std::make_shared<Recorder>(done));
      recorders.back()->on_body = [&] { begun.Down(); };
      client.Send(Call("GET", "/held"), recorders.back());
    }
    ASSERT_TRUE(begun.Wait());
  }
  for (const auto& recorder : recorders) {
    EXPECT_TRUE(absl::IsCancelled(recorder->status));
    EXPECT_EQ(recorder->done, 1);
  }
}

TEST_F(HttpClientTest, RefusesAnAnswerBeyondItsLimit) {
  HttpClient::Options options;
  options.reply_bytes_max = 1000;
  HttpClient client(options);
  EXPECT_TRUE(
      absl::IsResourceExhausted(client.Fetch(Call("POST", "/echo", std::string(1001, 'x'))).status()));
  EXPECT_TRUE(client.Fetch(Call("POST", "/echo", std::string(1000, 'x'))).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(client.Fetch(Call("GET", "/stream")).status()) ||
              client.Fetch(Call("GET", "/stream"))->body.size() <= 1000);
}

TEST_F(HttpClientTest, WritesNoHeaderThatCouldEndALine) {
  OutboundCall call = Call("POST", "/echo");
  call.headers = {{"X-Type", "a\r\nX-Other: b"}};
  EXPECT_TRUE(absl::IsInvalidArgument(client_.Fetch(call).status()));
  call = Call("POST", "/echo HTTP/1.1");
  EXPECT_TRUE(absl::IsInvalidArgument(client_.Fetch(call).status()));
}

TEST_F(HttpClientTest, ClosesWhileItMeasuresItsLag) {
  HttpClient::Options options;
  options.measure_lag = true;
  options.threads = 2;
  // Long enough now and then for the timer's end to be in the queue when the client goes.
  for (int i = 0; i < 20; ++i) {
    HttpClient client(options);
    for (int k = 0; k < i; ++k)
      ASSERT_TRUE(client.Fetch(Call("POST", "/echo", std::string(100'000, 'x'))).ok());
  }
  HttpClient client(options);
  OutboundCall call = Call("GET", "/held");
  call.timeout = absl::Milliseconds(100);
  EXPECT_TRUE(absl::IsDeadlineExceeded(client.Fetch(call).status()));
  EXPECT_GT(client.TakeLag().ms_max, 0);
  EXPECT_EQ(client_.TakeLag().ms_max, 0);
}

// One that is not ours: says `answer` to whoever connects, and closes.
class RawServer {
 public:
  explicit RawServer(std::string answer) : answer_(std::move(answer)) {
    fd_ = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    if (::bind(fd_, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(fd_, 8) != 0 ||
        ::getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
      ADD_FAILURE() << "no socket";
    }
    port = ntohs(address.sin_port);
    thread_ = std::thread([this] {
      for (int client = ::accept(fd_, nullptr, nullptr); client >= 0;
           client = ::accept(fd_, nullptr, nullptr)) {
        char request[4096];
        if (::recv(client, request, sizeof request, 0) > 0) {
          (void)::send(client, answer_.data(), answer_.size(), MSG_NOSIGNAL);
        }
        ::shutdown(client, SHUT_WR);
        while (::recv(client, request, sizeof request, 0) > 0) {
        }
        ::close(client);
      }
    });
  }
  ~RawServer() {
    ::shutdown(fd_, SHUT_RDWR);
    thread_.join();
    ::close(fd_);
  }
  int port = 0;

 private:
  const std::string answer_;
  int fd_;
  std::thread thread_;
};

absl::StatusOr<HttpClient::Reply> Ask(const std::string& answer) {
  RawServer server(answer);
  HttpClient client;
  OutboundCall call;
  call.url = UrlOf(server.port);
  call.target = "/";
  call.timeout = absl::Seconds(30);
  return client.Fetch(call);
}

TEST(HttpClientRawTest, ReadsWhatOtherServersSay) {
  EXPECT_EQ(Ask("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")->body, "ok");
  EXPECT_EQ(Ask("HTTP/1.0 200 OK\r\n\r\nto the end")->body, "to the end");
  EXPECT_EQ(Ask("HTTP/1.1 204 No Content\r\n\r\n")->status, 204);
  EXPECT_EQ(
      Ask("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n0\r\nT: 1\r\n\r\n")
          ->body,
      "abc");
}

TEST(HttpClientRawTest, TellsWhatWentWrong) {
  EXPECT_TRUE(absl::IsUnavailable(Ask("").status()));
  EXPECT_TRUE(absl::IsDataLoss(Ask("SSH-2.0-x\r\n").status()));
  EXPECT_TRUE(absl::IsDataLoss(Ask("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok").status()));
  EXPECT_TRUE(absl::IsDataLoss(Ask("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n").status()));
  EXPECT_TRUE(absl::IsDataLoss(Ask("HTTP/1.1 200 OK\r\nX: " + std::string(100'000, 'x')).status()));
  EXPECT_TRUE(
      absl::IsResourceExhausted(Ask("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n").status()));
  int port = 0;
  {
    RawServer gone("");
    port = gone.port;
  }
  HttpClient client;
  OutboundCall call;
  call.url = UrlOf(port);
  call.target = "/";
  EXPECT_TRUE(absl::IsUnavailable(client.Fetch(call).status()));
}

TEST(HttpUrlTest, TakesUrlsApart) {
  const auto url = ParseHttpUrl("https://api.example.com/v1/");
  ASSERT_TRUE(url.ok());
  EXPECT_TRUE(url->tls);
  EXPECT_EQ(url->host, "api.example.com");
  EXPECT_EQ(url->port, 443);
  EXPECT_EQ(url->path, "/v1");
  EXPECT_EQ(ParseHttpUrl("localhost:8000")->Origin(), "http://localhost:8000");
  EXPECT_EQ(ParseHttpUrl("http://[::1]:9")->Origin(), "http://[::1]:9");
  EXPECT_EQ(ParseHttpUrl("http://h")->port, 80);
  for (const char* bad : {"", "ftp://h", "http://", "http://h:0", "http://h:70000", "http://h:x",
                          "http://h/?a", "http://u@h", "http://h/ b", "http://[::1", "http://[::1]x"}) {
    EXPECT_FALSE(ParseHttpUrl(bad).ok()) << bad;
  }
}

}  // namespace
}  // namespace tidepool
