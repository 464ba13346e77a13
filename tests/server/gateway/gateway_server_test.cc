#include "server/gateway/gateway_server.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <thread>

#include "base/digest.h"
#include "kvstore/keys.h"
#include "tests/server/gateway/fake_cluster.h"
#include "tests/server/http/raw_client.h"
#include "tidepool/v1/inference.grpc.pb.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// The gateway over real sockets, with a fake scheduler and two fake workers.
class GatewayTest : public ::testing::Test {
 protected:
  GatewayTest() : dir_(std::filesystem::temp_directory_path() / ("tidepool-gateway-" + RandomHexId())) {
    WriteByteModel(dir_);
    config_.model.path = dir_.string();
    config_.gateway.http_listen = config_.gateway.grpc_listen = "127.0.0.1:0";
    config_.gateway.server_key = "secret";
    config_.cluster.scheduler = scheduler_.address();
    options_.poll_interval = absl::Milliseconds(20);
    scheduler_.Register(a_.address(), v1::ROLE_BOTH);
    scheduler_.Register(b_.address(), v1::ROLE_BOTH);
  }
  ~GatewayTest() override {
    server_.reset();
    std::filesystem::remove_all(dir_);
  }
  void Start() {
    auto server = GatewayServer::Start(config_, metrics_, options_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(server).value();
    const absl::Time deadline = absl::Now() + kTestWait;
    while (!server_->ready() && absl::Now() < deadline) std::this_thread::yield();
    ASSERT_TRUE(server_->ready());
  }
  std::string Ask(const std::string& request) {
    RawClient client(server_->http_port());
    client.Send(request);
    return client.ReadResponse();
  }
  std::string Completion(const std::string& more) {
    return Ask(Post("/v1/completions", R"({"prompt":"hello",)" + more + "}"));
  }
  static OrderedJson Json(const std::string& response) {
    auto json = ParseJson(BodyOf(response));
    EXPECT_TRUE(json.ok()) << response;
    return json.ok() ? *json : OrderedJson();
  }
  // The data of a stream's events, in order; chunk framing is taken out.
  static std::vector<std::string> Events(const std::string& response) {
    std::vector<std::string> events;
    size_t at = 0;
    while ((at = response.find("data: ", at)) != std::string::npos) {
      const size_t end = response.find("\n\n", at);
      events.push_back(response.substr(at + 6, end - at - 6));
      at = end == std::string::npos ? response.size() : end;
    }
    return events;
  }

  const std::filesystem::path dir_;
  MetricRegistry metrics_;
  Config config_;
  GatewayServer::Options options_;
  FakeScheduler scheduler_;
  FakeWorker a_{"a"}, b_{"b"};
  std::unique_ptr<GatewayServer> server_;
};

TEST_F(GatewayTest, IsNotReadyWithoutASchedulerAndSaysWhy) {
  config_.cluster.scheduler = "127.0.0.1:1";
  auto server = GatewayServer::Start(config_, metrics_, options_);
  ASSERT_TRUE(server.ok()) << server.status();
  server_ = std::move(server).value();
  EXPECT_FALSE(server_->ready());
  const std::string response = Ask(Get("/readyz"));
  EXPECT_EQ(StatusOf(response), 503);
  EXPECT_THAT(response, HasSubstr("no worker has registered a model"));
  EXPECT_EQ(StatusOf(Ask(Get("/livez"))), 200);
  const std::string refused = Completion(R"("max_tokens":4)");
  EXPECT_EQ(StatusOf(refused), 503);
  EXPECT_THAT(refused, HasSubstr("Retry-After: "));
  EXPECT_EQ(StatusOf(Ask(Get("/v1/models"))), 503);
}

TEST_F(GatewayTest, AnswersAChat) {
  a_.SetScript(FakeWorker::Says("Hi there", "stop", 257, 4));
  Start();
  const std::string response = Ask(
      Post("/v1/chat/completions",
           R"({"model":"toy","messages":[{"role":"user","content":"hello"}],"seed":5,"return_trace":true,)"
           R"("return_token_ids":true})",
           "X-Request-Id: my-id\r\n"));
  ASSERT_EQ(StatusOf(response), 200) << response;
  EXPECT_THAT(response, HasSubstr("X-Request-Id: my-id"));
  const OrderedJson json = Json(response);
  EXPECT_EQ(json["object"], "chat.completion");
  EXPECT_EQ(json["choices"][0]["message"]["content"], "Hi there");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(json["choices"][0]["stop_reason"], nullptr);
  const std::string prompt = "user:hello|assistant:";
  EXPECT_EQ(json["usage"]["prompt_tokens"], prompt.size());
  EXPECT_EQ(json["usage"]["completion_tokens"], 8);
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
  EXPECT_EQ(json["prompt_token_ids"].size(), prompt.size());
  EXPECT_EQ(json["choices"][0]["token_ids"].size(), 8u);
  EXPECT_EQ(json["tidepool_trace"]["reason"], "because the test says so");
  EXPECT_EQ(json["tidepool_trace"]["prefill_worker"], "prefill-0");

  ASSERT_EQ(a_.requests().size(), 1u);
  const auto request = a_.requests()[0];
  EXPECT_EQ(std::string(request.prompt().begin(), request.prompt().end()), prompt);
  EXPECT_EQ(request.sampling().seed(), 5u);
  EXPECT_THAT(request.stop_token_ids(), ::testing::ElementsAre(257));
  EXPECT_EQ(request.attempt(), 1u);
  EXPECT_TRUE(scheduler_.finished.Wait());

  // The keys that the scheduler got are those of the blocks that the worker will seal.
  BlockLayout layout{2, 1, 4, 4, DType::kBF16};
  const BlockKey root = RootKey("0123456789abcdef0123", layout, request.salt());
  const std::vector<int32_t> tokens(request.prompt().begin(), request.prompt().end());
  const auto keys = BlockKeys(root, tokens, 4);
  const auto place = scheduler_.places()[0];
  ASSERT_EQ(static_cast<size_t>(place.keys_size()), keys.size());
  EXPECT_EQ(place.keys(0), std::string(keys[0].bytes.begin(), keys[0].bytes.end()));
  EXPECT_EQ(place.request_id(), request.request_id());
  EXPECT_NE(place.request_id(), "my-id") << "ids are made here";
}

TEST_F(GatewayTest, StreamsInOpenAisOrder) {
  a_.SetScript(FakeWorker::Says("ab", "length", -1));
  Start();
  const std::string response = Ask(Post(
      "/v1/chat/completions",
      R"({"messages":[{"role":"user","content":"x"}],"stream":true,"stream_options":{"include_usage":true}})"));
  EXPECT_THAT(response, HasSubstr("text/event-stream"));
  const auto events = Events(response);
  ASSERT_GE(events.size(), 5u) << response;
  EXPECT_EQ(events.back(), "[DONE]");
  std::vector<OrderedJson> chunks;
  for (size_t i = 0; i + 1 < events.size(); ++i) chunks.push_back(*ParseJson(events[i]));
  EXPECT_EQ(chunks[0]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_EQ(chunks[0]["choices"][0]["delta"]["content"], "");
  std::string text;
  for (size_t i = 1; i + 2 < chunks.size(); ++i) {
    text += chunks[i]["choices"][0]["delta"]["content"].get<std::string>();
    EXPECT_EQ(chunks[i]["choices"][0]["finish_reason"], nullptr);
    EXPECT_EQ(chunks[i]["usage"], nullptr);
  }
  EXPECT_EQ(text, "ab");
  EXPECT_EQ(chunks[chunks.size() - 2]["choices"][0]["finish_reason"], "length");
  EXPECT_TRUE(chunks.back()["choices"].empty());
  EXPECT_EQ(chunks.back()["usage"]["completion_tokens"], 2);
  EXPECT_EQ(chunks.back()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  for (const auto& chunk : chunks) {
    EXPECT_EQ(chunk["id"], chunks[0]["id"]);
    EXPECT_EQ(chunk["created"], chunks[0]["created"]);
    EXPECT_EQ(chunk["object"], "chat.completion.chunk");
  }
}

TEST_F(GatewayTest, StopStringsAcrossTokensEndTheAnswerAndTheWorker) {
  a_.SetScript(a_.Hangs("one ENDtwo"));
  Start();
  const std::string response = Completion(R"("stop":["END"],"stream":true)");
  const auto events = Events(response);
  ASSERT_FALSE(events.empty());
  EXPECT_EQ(events.back(), "[DONE]");
  std::string text;
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    const auto chunk = *ParseJson(events[i]);
    text += chunk["choices"][0]["text"].get<std::string>();
    EXPECT_THAT(text, Not(HasSubstr("E"))) << "not even the stop string's beginning";
    if (i + 2 == events.size()) {
      EXPECT_EQ(chunk["choices"][0]["stop_reason"], "END");
    }
  }
  EXPECT_EQ(text, "one ");
  EXPECT_TRUE(a_.cancelled.Wait()) << "the worker does not go on";
  a_.SetScript(FakeWorker::Says("one END", "length", -1));
  EXPECT_EQ(Json(Completion(R"("stop":"END","include_stop_str_in_output":true)"))["choices"][0]["text"],
            "one END");
  a_.SetScript(FakeWorker::Says("one EN", "length", -1));
  EXPECT_EQ(Json(Completion(R"("stop":"END")"))["choices"][0]["text"], "one EN")
      << "held text comes at the end";
}

TEST_F(GatewayTest, NeverSendsHalfACharacter) {
  a_.SetScript(FakeWorker::Says("a\xe2\x82\xac\xf0\x9f\x8c\x8a!", "length", -1));
  Start();
  const auto events = Events(Completion(R"("stream":true)"));
  std::string text;
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    EXPECT_THAT(events[i], Not(HasSubstr("\xef\xbf\xbd")));
    text += (*ParseJson(events[i]))["choices"][0]["text"].get<std::string>();
  }
  EXPECT_EQ(text, "a\xe2\x82\xac\xf0\x9f\x8c\x8a!");
}

TEST_F(GatewayTest, RetriesOnAnotherWorkerBeforeTheFirstToken) {
  a_.SetScript(FakeWorker::Fails("", grpc::StatusCode::UNAVAILABLE));
  b_.SetScript(FakeWorker::Says("fine"));
  Start();
  const auto events = Events(Completion(R"("stream":true)"));
  ASSERT_FALSE(events.empty());
  EXPECT_EQ(events.back(), "[DONE]");
  ASSERT_EQ(scheduler_.places().size(), 2u);
  EXPECT_THAT(scheduler_.places()[1].exclude_workers(), ::testing::ElementsAre("a"));
  ASSERT_EQ(b_.requests().size(), 1u);
  EXPECT_EQ(b_.requests()[0].attempt(), 2u);
  EXPECT_EQ(b_.requests()[0].sampling().seed(), a_.requests()[0].sampling().seed());
}

TEST_F(GatewayTest, RetriesAWholeAnswerOfWhichNothingWasDelivered) {
  a_.SetScript(FakeWorker::Fails("par", grpc::StatusCode::UNAVAILABLE));
  b_.SetScript(FakeWorker::Says("whole"));
  Start();
  const auto json = Json(Completion(R"("max_tokens":9)"));
  EXPECT_EQ(json["choices"][0]["text"], "whole");
  EXPECT_EQ(json["usage"]["completion_tokens"], 5);
}

TEST_F(GatewayTest, FailsTheStreamWithoutDoneAfterTokens) {
  a_.SetScript(FakeWorker::Fails("par", grpc::StatusCode::UNAVAILABLE));
  b_.SetScript(FakeWorker::Says("never"));
  Start();
  const std::string response = Completion(R"("stream":true)");
  const auto events = Events(response);
  ASSERT_GE(events.size(), 2u) << response;
  const auto last = *ParseJson(events.back());
  EXPECT_EQ(last["error"]["code"], "no_worker");
  EXPECT_THAT(last["error"]["message"].get<std::string>(), HasSubstr("became unavailable"));
  EXPECT_THAT(response, Not(HasSubstr("[DONE]")));
  EXPECT_THAT(response, Not(HasSubstr("finish_reason\":\"")));
  EXPECT_TRUE(b_.requests().empty()) << "delivered tokens are not made again";
  EXPECT_TRUE(scheduler_.finished.Wait());
}

TEST_F(GatewayTest, GivesUpAfterTheLastWorker) {
  a_.SetScript(FakeWorker::Fails("", grpc::StatusCode::UNAVAILABLE));
  b_.SetScript(FakeWorker::Fails("", grpc::StatusCode::UNAVAILABLE));
  Start();
  const std::string response = Completion(R"("stream":true)");
  EXPECT_EQ(StatusOf(response), 503);
  EXPECT_THAT(response, HasSubstr("Retry-After: "));
  EXPECT_EQ(Json(response)["error"]["type"], "server_error");
}

TEST_F(GatewayTest, TokensOutOfOrderAreAnErrorNotAnAnswer) {
  a_.SetScript([](grpc::ServerContext&, const v1::WorkerGenerateRequest&, FakeWorker::Writer& writer) {
    uint32_t index = 0;
    FakeWorker::SendText(writer, "ab", index);
    ++index;
    FakeWorker::SendText(writer, "d", index);
    FakeWorker::SendFinish(writer, "length", -1);
    return grpc::Status::OK;
  });
  Start();
  EXPECT_EQ(StatusOf(Completion(R"("max_tokens":9)")), 500);
  a_.SetScript([](grpc::ServerContext&, const v1::WorkerGenerateRequest&, FakeWorker::Writer& writer) {
    uint32_t index = 0;
    FakeWorker::SendText(writer, "ab", index);
    return grpc::Status::OK;
  });
  EXPECT_THAT(Completion(R"("stream":true)"), Not(HasSubstr("[DONE]"))) << "an end without a finish reason";
}

TEST_F(GatewayTest, AClientThatLeavesIsCancelledEverywhere) {
  a_.SetScript(a_.Hangs("tok"));
  Start();
  {
    RawClient streaming(server_->http_port());
    streaming.Send(Post("/v1/completions", R"({"prompt":"x","stream":true})"));
    EXPECT_THAT(streaming.ReadUntil("\"text\":\"t\""), HasSubstr("data: "));
    streaming.Reset();
  }
  EXPECT_TRUE(a_.cancelled.Wait(1));
  {
    RawClient waiting(server_->http_port());
    waiting.Send(Post("/v1/completions", R"({"prompt":"x"})"));
    ASSERT_TRUE(a_.started.Wait(2));
  }
  EXPECT_TRUE(a_.cancelled.Wait(2));
  EXPECT_TRUE(scheduler_.finished.Wait(2));
  const std::string metrics = BodyOf(Ask(Get("/metrics")));
  EXPECT_THAT(metrics, HasSubstr("tidepool_client_disconnects_total{stage=\"streaming\"}"));
  EXPECT_THAT(metrics, HasSubstr("tidepool_requests_total{code=\"499\",reason=\"client_gone\"} 2"));
}

TEST_F(GatewayTest, EarlyRejectionIs429WithTheSchedulersWords) {
  scheduler_.SetPlace([](const v1::PlaceRequest&, v1::PlaceReply*) {
    v1::PlaceRejection rejection;
    rejection.set_reason("the first token would come after 3.1 s, the SLO is 0.5 s");
    rejection.set_retry_after_seconds(10);
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, rejection.reason(),
                        rejection.SerializeAsString());
  });
  Start();
  const std::string response = Completion(R"("stream":true)");
  EXPECT_EQ(StatusOf(response), 429);
  EXPECT_EQ(Json(response)["error"]["message"], "the first token would come after 3.1 s, the SLO is 0.5 s");
  const size_t at = response.find("Retry-After: ");
  ASSERT_NE(at, std::string::npos);
  const int seconds = std::atoi(response.c_str() + at + 13);
  EXPECT_GE(seconds, 8);
  EXPECT_LE(seconds, 12);
  EXPECT_TRUE(a_.requests().empty());
  EXPECT_THAT(BodyOf(Ask(Get("/metrics"))),
              HasSubstr("tidepool_requests_rejected_total{reason=\"slo_unattainable\"} 1"));
}

TEST_F(GatewayTest, RefusesBeforeAnyoneIsAsked) {
  config_.gateway.max_body_bytes = 2000;
  Start();
  EXPECT_EQ(StatusOf(Ask(Post("/v1/completions", R"({"model":"other","prompt":"x"})"))), 404);
  const std::string missing = Ask(Get("/v1/models/other/model"));
  EXPECT_EQ(StatusOf(missing), 404);
  EXPECT_EQ(Json(missing)["error"]["code"], "model_not_found");
  const std::string longer = Ask(Post("/v1/completions", R"({"prompt":")" + std::string(200, 'x') + "\"}"));
  EXPECT_EQ(StatusOf(longer), 400);
  EXPECT_EQ(Json(longer)["error"]["code"], "context_length_exceeded");
  EXPECT_EQ(Json(Completion(R"("max_tokens":196)"))["error"]["param"], "max_tokens");
  EXPECT_EQ(StatusOf(Ask(Post("/v1/completions", R"({"prompt":[258]})"))), 400);
  EXPECT_EQ(StatusOf(Ask(Post("/v1/completions", "{"))), 400);
  EXPECT_EQ(StatusOf(Ask(Post("/v1/completions", std::string(2001, ' ')))), 413);
  EXPECT_EQ(StatusOf(Ask(Get("/v1/completions"))), 405);
  EXPECT_EQ(Json(Completion(R"("tools":[{}])"))["error"]["code"], "unsupported_parameter");
  EXPECT_TRUE(scheduler_.places().empty());
}

TEST_F(GatewayTest, EveryProtectedRouteAsksForAKeyAndTenantsHaveTheirOwnSalt) {
  config_.gateway.api_keys = {{HexEncode(Sha256().Update("key-a").Finish()), "tenant-a"},
                              {HexEncode(Sha256().Update("key-b").Finish()), "tenant-b"}};
  a_.SetScript(FakeWorker::Says("ok"));
  Start();
  for (const char* path :
       {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/apply-template"}) {
    EXPECT_EQ(StatusOf(Ask(Post(path, "{}"))), 401) << path;
    EXPECT_EQ(StatusOf(Ask(Post(path, "{}", "Authorization: Bearer nope\r\n"))), 401) << path;
  }
  EXPECT_EQ(StatusOf(Ask(Get("/v1/models"))), 401);
  EXPECT_EQ(StatusOf(Ask(Get("/v1/models/toy"))), 401);
  EXPECT_EQ(StatusOf(Ask(Get("/v1%2Fmodels"))), 401) << "decoded before it is routed";
  EXPECT_EQ(StatusOf(Ask(Get("/metrics"))), 200);
  std::set<std::string> salts;
  for (const char* key : {"key-a", "key-b"}) {
    const std::string header = "Authorization: Bearer " + std::string(key) + "\r\n";
    EXPECT_EQ(StatusOf(Ask(Post("/v1/completions", R"({"prompt":"x"})", header))), 200);
    EXPECT_EQ(StatusOf(Ask(Post("/v1/completions", R"({"prompt":"x","cache_salt":"s"})", header))), 200);
  }
  for (const auto& request : a_.requests()) salts.insert(request.salt());
  EXPECT_EQ(salts.size(), 4u);
  EXPECT_EQ(a_.requests()[2].tenant(), "tenant-b");
}

TEST_F(GatewayTest, PingsWhileThereIsNothingToSay) {
  options_.ping_interval = absl::Milliseconds(20);
  Signal go;
  a_.SetScript(a_.Hangs("", &go));
  Start();
  RawClient client(server_->http_port());
  client.Send(Post("/v1/completions", R"({"prompt":"x","stream":true})"));
  EXPECT_THAT(client.ReadUntil(": ping\n\n"), HasSubstr("200 OK"));
  go.Set();
  EXPECT_THAT(client.ReadUntil("[DONE]"), HasSubstr("\"finish_reason\":\"length\""));
}

TEST_F(GatewayTest, TheDeadlineEndsARequest) {
  config_.gateway.request_timeout = absl::Milliseconds(300);
  config_.gateway.max_retries = 0;
  a_.SetScript(a_.Hangs(""));
  Start();
  EXPECT_EQ(StatusOf(Completion(R"("max_tokens":4)")), 504);
  a_.SetScript(a_.Hangs("tok"));
  const std::string response = Completion(R"("stream":true)");
  EXPECT_THAT(response, HasSubstr("request_timeout"));
  EXPECT_THAT(response, Not(HasSubstr("[DONE]")));
}

TEST_F(GatewayTest, BoundsRequestsInFlight) {
  config_.gateway.max_inflight = 1;
  a_.SetScript(a_.Hangs("t"));
  Start();
  RawClient first(server_->http_port());
  first.Send(Post("/v1/completions", R"({"prompt":"x","stream":true})"));
  first.ReadUntil("data: ");
  const std::string response = Completion(R"("max_tokens":4)");
  EXPECT_EQ(StatusOf(response), 429);
  EXPECT_THAT(response, HasSubstr("Retry-After: "));
}

TEST_F(GatewayTest, DrainsInFlightRequestsAndRefusesNewOnes) {
  Signal go;
  a_.SetScript(a_.Hangs("to", &go));
  Start();
  RawClient client(server_->http_port());
  client.Send(Post("/v1/completions", R"({"prompt":"x","stream":true})"));
  client.ReadUntil("data: ");
  server_->BeginDrain();
  EXPECT_FALSE(server_->ready());
  EXPECT_EQ(StatusOf(Ask(Get("/readyz"))), 503);
  EXPECT_EQ(StatusOf(Completion(R"("max_tokens":4)")), 503);
  std::thread finisher([&] { go.Set(); });
  server_->Shutdown(absl::Seconds(20));
  finisher.join();
  EXPECT_THAT(client.ReadUntil("[DONE]"), HasSubstr("\"finish_reason\":\"length\""));
}

TEST_F(GatewayTest, ShutdownWithoutGraceTellsTheClient) {
  a_.SetScript(a_.Hangs("to"));
  Start();
  RawClient client(server_->http_port());
  client.Send(Post("/v1/completions", R"({"prompt":"x","stream":true})"));
  client.ReadUntil("data: ");
  server_->Shutdown(absl::ZeroDuration());
  EXPECT_THAT(client.ReadToEnd(), HasSubstr("\"code\":\"draining\""));
  EXPECT_TRUE(a_.cancelled.Wait());
}

TEST_F(GatewayTest, TokenizesDetokenizesAndRenders) {
  Start();
  const auto tokens = Json(Ask(Post("/tokenize", R"({"prompt":"ab ","return_token_strs":true})")));
  EXPECT_EQ(tokens["tokens"], OrderedJson::array({97, 98, 32}));
  EXPECT_EQ(tokens["count"], 3);
  EXPECT_EQ(tokens["max_model_len"], 200);
  EXPECT_EQ(tokens["token_strs"][0], "a");
  EXPECT_EQ(Json(Ask(Post("/detokenize", R"({"tokens":[97,98,257]})")))["prompt"], "ab</s>");
  EXPECT_EQ(StatusOf(Ask(Post("/detokenize", R"({"tokens":[258]})"))), 400);
  EXPECT_EQ(Json(Ask(Post("/apply-template", R"({"messages":[{"role":"user","content":"q"}]})")))["prompt"],
            "user:q|assistant:");
  const auto models = Json(Ask(Get("/v1/models")));
  EXPECT_EQ(models["data"][0]["id"], "toy");
  EXPECT_EQ(models["data"][0]["max_model_len"], 200);
  EXPECT_EQ(Json(Ask(Get("/v1/models/toy")))["id"], "toy");
}

TEST_F(GatewayTest, LogprobsComeInBothShapes) {
  a_.SetScript(FakeWorker::Says("ab", "length", -1));
  Start();
  const auto text = Json(Completion(R"("logprobs":0)"))["choices"][0]["logprobs"];
  EXPECT_EQ(text["tokens"], OrderedJson::array({"a", "b"}));
  EXPECT_EQ(text["token_logprobs"], OrderedJson::array({-0.5, -0.5}));
  EXPECT_EQ(text["text_offset"], OrderedJson::array({0, 1}));
  const auto chat = Json(
      Ask(Post("/v1/chat/completions", R"({"messages":[{"role":"user","content":"x"}],"logprobs":true})")));
  EXPECT_EQ(chat["choices"][0]["logprobs"]["content"][1]["token"], "b");
  EXPECT_EQ(chat["choices"][0]["logprobs"]["content"][1]["bytes"], OrderedJson::array({98}));
  EXPECT_EQ(a_.requests()[0].top_logprobs(), 0);
}

TEST_F(GatewayTest, EverySeriesExistsBeforeTheFirstRequest) {
  Start();
  const std::string metrics = BodyOf(Ask(Get("/metrics")));
  for (const char* series :
       {"tidepool_requests_total{code=\"200\",reason=\"stop\"} 0", "tidepool_requests_total{code=\"504\"",
        "tidepool_requests_rejected_total{reason=\"draining\"} 0",
        "tidepool_time_to_first_token_seconds_count 0", "tidepool_inter_token_latency_seconds_count 0",
        "tidepool_request_stage_seconds_count{stage=\"transfer\"} 0",
        "tidepool_prompt_tokens_total{source=\"cached\"} 0", "tidepool_generation_tokens_total 0",
        "tidepool_client_disconnects_total{stage=\"queued\"} 0",
        "tidepool_requests_running{role=\"gateway\"} 0", "tidepool_build_info{version="}) {
    EXPECT_THAT(metrics, HasSubstr(series));
  }
}

class GrpcFrontTest : public GatewayTest {
 protected:
  void Connect() {
    Start();
    stub_ = v1::Inference::NewStub(grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->grpc_port()),
                                                       grpc::InsecureChannelCredentials()));
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  }
  std::unique_ptr<v1::Inference::Stub> stub_;
  grpc::ClientContext context_;
};

TEST_F(GrpcFrontTest, StreamsTheSameAnswer) {
  a_.SetScript(FakeWorker::Says("grpc says hi", "stop", 257, 4));
  Connect();
  v1::GenerateRequest request;
  request.set_request_id("mine");
  auto& message = *request.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("hello");
  auto reader = stub_->Generate(&context_, request);
  std::string text;
  v1::GenerateResponse response, last;
  while (reader->Read(&response)) {
    text += response.text();
    EXPECT_EQ(response.request_id(), "mine");
    last = response;
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(text, "grpc says hi");
  EXPECT_EQ(last.finish_reason(), "stop");
  EXPECT_EQ(last.usage().cached_tokens(), 4u);
  EXPECT_EQ(last.usage().completion_tokens(), 12u);
}

TEST_F(GrpcFrontTest, NamesTheFieldThatIsWrong) {
  Connect();
  v1::GenerateRequest request;
  request.set_text("x");
  request.mutable_sampling()->set_temperature(std::numeric_limits<float>::quiet_NaN());
  auto reader = stub_->Generate(&context_, request);
  v1::GenerateResponse response;
  EXPECT_FALSE(reader->Read(&response));
  const auto status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("sampling.temperature"));
}

TEST_F(GrpcFrontTest, CancellingFreesTheRequestEverywhere) {
  a_.SetScript(a_.Hangs("tok"));
  Connect();
  v1::GenerateRequest request;
  request.set_text("x");
  auto reader = stub_->Generate(&context_, request);
  v1::GenerateResponse response;
  EXPECT_TRUE(reader->Read(&response));
  context_.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(a_.cancelled.Wait());
  EXPECT_TRUE(scheduler_.finished.Wait());
}

TEST_F(GrpcFrontTest, AFailureAfterTokensIsNotOk) {
  a_.SetScript(FakeWorker::Fails("par", grpc::StatusCode::UNAVAILABLE));
  Connect();
  v1::GenerateRequest request;
  request.set_text("x");
  auto reader = stub_->Generate(&context_, request);
  v1::GenerateResponse response;
  std::string text;
  while (reader->Read(&response)) text += response.text();
  EXPECT_EQ(text, "par");
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(GrpcFrontTest, AsksForTheSameKeys) {
  config_.gateway.api_keys = {{HexEncode(Sha256().Update("key-a").Finish()), "tenant-a"}};
  Connect();
  v1::ListModelsResponse models;
  EXPECT_EQ(stub_->ListModels(&context_, {}, &models).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  grpc::ClientContext with_key;
  with_key.AddMetadata("authorization", "Bearer key-a");
  EXPECT_TRUE(stub_->ListModels(&with_key, {}, &models).ok());
  ASSERT_EQ(models.models_size(), 1);
  EXPECT_EQ(models.models(0).id(), "toy");
}

}  // namespace
}  // namespace tidepool
