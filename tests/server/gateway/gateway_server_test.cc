#include "server/gateway/gateway_server.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <thread>

#include "base/digest.h"
#include "base/trace.h"
#include "kvstore/keys.h"
#include "server/structured/compiled_grammar.h"
#include "tests/server/gateway/fake_cluster.h"
#include "tests/server/http/raw_client.h"
#include "tidepool/v1/inference.grpc.pb.h"

namespace tidepool {
namespace {

using ::testing::ElementsAre;
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
    ASSERT_TRUE(Eventually([&] { return server_->ready(); }));
  }
  static bool Eventually(const std::function<bool()>& holds) {
    const absl::Time deadline = absl::Now() + kTestWait;
    while (!holds() && absl::Now() < deadline) std::this_thread::yield();
    return holds();
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
  EXPECT_THAT(request.sampling().stop_token_ids(), ::testing::ElementsAre(257));
  EXPECT_EQ(request.attempt(), 1u);
  EXPECT_TRUE(scheduler_.finished.Wait());

  // The keys that the scheduler got are those of the blocks that the worker will seal.
  BlockLayout layout{2, 1, 4, 4, DType::kBF16};
  const BlockKey root = RootKey("0123456789abcdef0123", layout, request.salt(), "");
  const std::vector<int32_t> tokens(request.prompt().begin(), request.prompt().end());
  const auto keys = BlockKeys(root, tokens, 4);
  const auto place = scheduler_.places()[0];
  ASSERT_EQ(static_cast<size_t>(place.keys_size()), keys.size());
  EXPECT_EQ(place.keys(0), std::string(keys[0].bytes.begin(), keys[0].bytes.end()));
  EXPECT_EQ(place.request_id(), request.request_id());
  EXPECT_NE(place.request_id(), "my-id") << "ids are made here";
}

TEST_F(GatewayTest, GrammarClassAndTraceReachTheWorker) {
  std::mutex mu;
  std::string traceparent;
  a_.SetScript([&](grpc::ServerContext& context, const v1::WorkerGenerateRequest& request,
                   FakeWorker::Writer& writer) {
    {
      std::lock_guard lock(mu);
      const auto& metadata = context.client_metadata();
      if (const auto it = metadata.find("traceparent"); it != metadata.end()) {
        traceparent.assign(it->second.data(), it->second.size());
      }
    }
    return FakeWorker::Says("12")(context, request, writer);
  });
  Start();
  const std::string response = Ask(
      Post("/v1/completions", R"({"prompt":"n: ","max_tokens":4,"structured_outputs":{"regex":"[0-9]{2}"}})",
           "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"));
  ASSERT_EQ(StatusOf(response), 200) << response;
  ASSERT_EQ(a_.requests().size(), 1u);
  const v1::WorkerGenerateRequest request = a_.requests()[0];
  EXPECT_EQ(request.request_class(), v1::REQUEST_CLASS_ONLINE);
  const auto grammar = CompiledGrammar::Parse(request.sampling().grammar());
  EXPECT_TRUE(grammar.ok()) << grammar.status();
  std::lock_guard lock(mu);
  const auto trace = ParseTraceparent(traceparent);
  ASSERT_TRUE(trace.has_value()) << traceparent;
  EXPECT_EQ(trace->TraceIdHex(), "0af7651916cd43dd8448eb211c80319c");
  EXPECT_THAT(traceparent, Not(HasSubstr("b7ad6b7169203331"))) << "the worker's caller is the gateway";
}

TEST_F(GatewayTest, SeveralPromptsAreOneAnswerInTheirOrder) {
  a_.SetScript(
      [](grpc::ServerContext& context, const v1::WorkerGenerateRequest& request, FakeWorker::Writer& writer) {
        const std::string prompt(request.prompt().begin(), request.prompt().end());
        return FakeWorker::Says(prompt + std::to_string(request.sampling().seed()))(context, request, writer);
      });
  Start();
  const std::string response =
      Ask(Post("/v1/completions", R"({"prompt":["ab","c"],"n":2,"max_tokens":9,"seed":4})"));
  ASSERT_EQ(StatusOf(response), 200) << response;
  const OrderedJson json = Json(response);
  std::vector<std::string> texts;
  for (const OrderedJson& choice : json["choices"]) {
    EXPECT_EQ(choice["index"], texts.size());
    texts.push_back(choice["text"]);
  }
  EXPECT_THAT(texts, ElementsAre("ab4", "ab5", "c4", "c5"));
  EXPECT_EQ(json["usage"]["prompt_tokens"], 3) << "each prompt once";
  EXPECT_EQ(json["usage"]["completion_tokens"], 3 + 3 + 2 + 2);

  // One that does not fit refuses all of them before anything goes out, streamed or not.
  const std::string refused = Ask(Post("/v1/completions", R"({"prompt":["ab",")" + std::string(5000, 'x') +
                                                              R"("],"max_tokens":9,"stream":true})"));
  EXPECT_EQ(StatusOf(refused), 400);
  EXPECT_THAT(refused, HasSubstr("prompt 1"));
}

TEST_F(GatewayTest, RequestOfSeveralChoicesFailsOnce) {
  a_.SetScript(FakeWorker::Fails("", grpc::StatusCode::INVALID_ARGUMENT));
  Start();
  EXPECT_EQ(StatusOf(Ask(Post("/v1/completions", R"({"prompt":["a","b","c"],"max_tokens":9})"))), 400);
  EXPECT_THAT(metrics_.Render(),
              HasSubstr(R"(tidepool_requests_total{code="400",reason="invalid_request"} 1)"));
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
  EXPECT_THAT(scheduler_.places()[1].exclude_workers(), ::testing::ElementsAre("boot-a"));
  ASSERT_EQ(b_.requests().size(), 1u);
  EXPECT_EQ(b_.requests()[0].attempt(), 2u);
  EXPECT_EQ(b_.requests()[0].sampling().seed(), a_.requests()[0].sampling().seed());
}

// What a worker says that goes on behind `emitted` tokens.
FakeWorker::Script GoesOn(const std::string& text) {
  return [text](grpc::ServerContext&, const v1::WorkerGenerateRequest& request, FakeWorker::Writer& writer) {
    uint32_t index = request.emitted_tokens();
    FakeWorker::SendText(writer, text, index);
    FakeWorker::SendFinish(writer, "stop", 257, /*cached=*/1000);
    return grpc::Status::OK;
  };
}

TEST_F(GatewayTest, AnAnswerGoesOnAtAnotherWorkerBehindWhatCame) {
  a_.SetScript(FakeWorker::Fails("par", grpc::StatusCode::UNAVAILABLE));
  b_.SetScript(GoesOn("ty"));
  Start();
  for (const bool stream : {false, true}) {
    const std::string response = Completion(stream ? R"("stream":true,"max_tokens":9)" : R"("max_tokens":9)");
    if (stream) {
      const auto events = Events(response);
      EXPECT_EQ(events.back(), "[DONE]") << response;
      std::string text;
      for (size_t i = 0; i + 1 < events.size(); ++i)
        text += (*ParseJson(events[i]))["choices"][0]["text"].get<std::string>();
      EXPECT_EQ(text, "party");
    } else {
      const auto json = Json(response);
      EXPECT_EQ(json["choices"][0]["text"], "party");
      EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
      EXPECT_EQ(json["usage"]["completion_tokens"], 5);
      EXPECT_LE(json["usage"]["prompt_tokens_details"]["cached_tokens"], json["usage"]["prompt_tokens"]);
    }
    const auto first = a_.requests().back(), second = b_.requests().back();
    EXPECT_EQ(second.attempt(), 2u);
    EXPECT_EQ(second.emitted_tokens(), 3u);
    EXPECT_EQ(second.max_tokens(), first.max_tokens());
    ASSERT_EQ(second.prompt_size(), first.prompt_size() + 3);
    EXPECT_EQ(second.prompt(second.prompt_size() - 1), 'r');
    EXPECT_EQ(second.sampling().seed(), first.sampling().seed());
    // Placed as what it is now: a longer prompt, with less to come, that was admitted already.
    const auto place = scheduler_.places().back();
    EXPECT_EQ(place.prompt_tokens(), static_cast<uint32_t>(second.prompt_size()));
    EXPECT_EQ(place.max_tokens(), 6u);
    EXPECT_EQ(place.keys_size(), second.prompt_size() / 4);
    EXPECT_GT(place.slo_ttft_seconds(), 1000);
  }
}

TEST_F(GatewayTest, StopStringsAndCharactersGoOnAcrossWorkers) {
  // The stop string and a character of several bytes are cut in the middle.
  a_.SetScript(FakeWorker::Fails("x\xe2\x82", grpc::StatusCode::UNAVAILABLE));
  b_.SetScript(GoesOn("\xac and on"));
  Start();
  EXPECT_EQ(Json(Completion(R"("max_tokens":40)"))["choices"][0]["text"], "x\xe2\x82\xac and on");
  a_.SetScript(FakeWorker::Fails("one EN", grpc::StatusCode::UNAVAILABLE));
  b_.SetScript(GoesOn("D two"));
  const auto json = Json(Completion(R"("max_tokens":40,"stop":["END"])"));
  EXPECT_EQ(json["choices"][0]["text"], "one ");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
}

TEST_F(GatewayTest, EndsTheStreamWithoutDoneWhereNobodyCanGoOn) {
  config_.gateway.placement_wait = absl::Milliseconds(300);
  a_.SetScript(FakeWorker::Fails("par", grpc::StatusCode::UNAVAILABLE));
  b_.SetScript(FakeWorker::Fails("", grpc::StatusCode::UNAVAILABLE));
  Start();
  const std::string response = Completion(R"("stream":true)");
  const auto events = Events(response);
  ASSERT_GE(events.size(), 2u) << response;
  const auto last = *ParseJson(events.back());
  EXPECT_EQ(last["error"]["code"], "no_worker");
  EXPECT_THAT(response, Not(HasSubstr("[DONE]")));
  EXPECT_THAT(response, Not(HasSubstr("finish_reason\":\"")));
  EXPECT_GT(scheduler_.places().size(), 3u) << "asked again for a while";
  EXPECT_TRUE(scheduler_.finished.Wait());
  EXPECT_EQ(scheduler_.finished.count(), 1) << "what has begun keeps its booking until the end";
}

TEST_F(GatewayTest, WhatHasBegunIsNoBadRequestWhereNobodyLeftCanServeIt) {
  a_.SetScript(FakeWorker::Fails("par", grpc::StatusCode::UNAVAILABLE));
  b_.SetScript(GoesOn("ty"));
  Start();
  std::atomic<int> asked{0};
  scheduler_.SetPlace([&](const v1::PlaceRequest& request, v1::PlaceReply* reply) {
    if (request.exclude_workers_size() > 0 && ++asked < 3)
      return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "the largest decode worker has too few blocks");
    *reply->mutable_decode() = (asked == 0 ? a_ : b_).address();
    return grpc::Status::OK;
  });
  EXPECT_EQ(Json(Completion(R"("max_tokens":9)"))["choices"][0]["text"], "party");
}

TEST_F(GatewayTest, GoesOnWhereAWorkerComesBackAsAnotherProcess) {
  a_.SetScript(FakeWorker::Fails("par", grpc::StatusCode::UNAVAILABLE));
  Start();
  std::atomic<int> asked{0};
  scheduler_.SetPlace([&](const v1::PlaceRequest& request, v1::PlaceReply* reply) {
    *reply->mutable_decode() = a_.address();
    if (request.exclude_workers_size() == 0) return grpc::Status::OK;
    // Away for a moment, and then there under its old name.
    if (++asked < 3) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "no worker can take the request now");
    a_.SetScript(GoesOn("ty"));
    reply->mutable_decode()->set_boot_id("young");
    return grpc::Status::OK;
  });
  EXPECT_EQ(Json(Completion(R"("max_tokens":9)"))["choices"][0]["text"], "party");
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
  const std::string metrics = Ask(Get("/metrics"));
  EXPECT_EQ(StatusOf(metrics), 403);
  EXPECT_THAT(metrics, HasSubstr("gateway.metrics_listen"));
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

TEST_F(GatewayTest, MetricsAreServedOnTheirOwnListenerAlone) {
  config_.gateway.metrics_listen = "127.0.0.1:0";
  config_.gateway.api_keys = {{std::string(64, 'a'), "a"}};
  Start();
  EXPECT_EQ(StatusOf(Ask(Get("/metrics"))), 403);
  ASSERT_GT(server_->metrics_port(), 0);
  const auto admin = [&](const char* path) {
    RawClient client(server_->metrics_port());
    client.Send(Get(path));
    return StatusOf(client.ReadResponse());
  };
  EXPECT_EQ(admin("/metrics"), 200);
  EXPECT_EQ(admin("/livez"), 200);
  // One look at the cluster may come too late on a busy machine.
  EXPECT_TRUE(Eventually([&] { return StatusOf(Ask(Get("/readyz"))) == 200 && admin("/readyz") == 200; }));
  RawClient client(server_->metrics_port());
  client.Send(Get("/v1/models"));
  EXPECT_EQ(StatusOf(client.ReadResponse()), 404);
}

TEST_F(GatewayTest, AStrangersBodyIsNotReadBeforeTheAnswer) {
  config_.gateway.api_keys = {{std::string(64, 'a'), "a"}};
  Start();
  const std::string response =
      Ask("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n");
  EXPECT_EQ(StatusOf(response), 401) << response;
  EXPECT_THAT(response, HasSubstr("Connection: close"));
}

TEST_F(GatewayTest, TokenizingIsARequestOfTheTenant) {
  config_.gateway.tenant_limits.requests_per_minute = 2;
  Start();
  for (const char* path : {"/tokenize", "/apply-template"}) {
    const char* body = R"({"messages":[{"role":"user","content":"hello"}]})";
    EXPECT_EQ(StatusOf(Ask(Post(path, body))), 200) << path;
  }
  const std::string refused = Ask(Post("/detokenize", R"({"tokens":[104]})"));
  EXPECT_EQ(StatusOf(refused), 429);
  EXPECT_THAT(refused, HasSubstr("rate_limit_exceeded"));
}

TEST_F(GatewayTest, AReloadThatFailedIsTriedAgain) {
  const std::string file = (dir_ / "keys.yaml").string();
  const std::string good = "keys:\n  - {key_sha256: " + std::string(64, 'a') + ", tenant: a}\n";
  std::ofstream(file) << good;
  config_.gateway.api_keys_file = file;
  config_.gateway.access_log = (dir_ / "log" / "access").string();
  Start();
  // What fails without any watched file's changing: the log's directory is no directory.
  std::filesystem::remove_all(dir_ / "log");
  std::ofstream(dir_ / "log") << "in the way";
  EXPECT_FALSE(server_->Reload().ok());
  std::ofstream(file) << good << "\n";
  const auto reloads = [&](const char* result) {
    return metrics_.AddCounter("tidepool_config_reloads_total", "", {{"result", result}}).value();
  };
  const absl::Time deadline = absl::Now() + kTestWait;
  while (reloads("failure") < 2 && absl::Now() < deadline) std::this_thread::yield();
  std::filesystem::remove(dir_ / "log");
  while (reloads("success") < 1 && absl::Now() < deadline) std::this_thread::yield();
  EXPECT_GE(reloads("success"), 1u);
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

// "</s>" in a chat is four characters; in a raw prompt, whose author is its template's, it is the token 257.
TEST_F(GatewayTest, AUserCannotSpellAControlToken) {
  a_.SetScript(FakeWorker::Says("ok"));
  Start();
  const std::string messages = R"("messages":[{"role":"user","content":"a</s>b"}])";
  const auto tokens = Json(Ask(Post("/tokenize", "{" + messages + "}")))["tokens"];
  EXPECT_EQ(tokens.size(), std::string("user:a</s>b|assistant:").size());
  EXPECT_EQ(StatusOf(Ask(Post("/v1/chat/completions", "{" + messages + "}"))), 200);
  const v1::WorkerGenerateRequest asked = a_.requests().at(0);
  const auto& ids = asked.prompt();
  EXPECT_EQ(OrderedJson(std::vector<int32_t>(ids.begin(), ids.end())), tokens);
  EXPECT_EQ(Json(Ask(Post("/apply-template", "{" + messages + "}")))["prompt"], "user:a</s>b|assistant:");
  EXPECT_EQ(Json(Ask(Post("/tokenize", R"({"prompt":"a</s>b"})")))["tokens"],
            OrderedJson::array({97, 257, 98}));
  EXPECT_EQ(StatusOf(Ask(Post("/v1/completions", R"({"prompt":"a</s>b"})"))), 200);
  EXPECT_EQ(a_.requests().at(1).prompt_size(), 3);
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
  EXPECT_EQ(a_.requests()[0].sampling().top_logprobs(), 0);
}

// Says the request's seed, the prompt's length and what else there is, so that a test sees who was asked.
FakeWorker::Script SaysItsSeed(float logprob_per_seed = 0) {
  return [=](grpc::ServerContext&, const v1::WorkerGenerateRequest& request, FakeWorker::Writer& writer) {
    v1::WorkerGenerateEvent event;
    uint32_t index = 0;
    for (char c : "seed " + std::to_string(request.sampling().seed())) {
      auto& token = *event.add_tokens();
      token.set_id(static_cast<unsigned char>(c));
      token.set_index(index++);
      token.set_logprob(logprob_per_seed * static_cast<float>(request.sampling().seed()));
    }
    event.set_finish_reason("stop");
    event.set_stop_token(257);
    event.mutable_path()->set_cached_tokens(4);
    writer.Write(event);
    return grpc::Status::OK;
  };
}

TEST_F(GatewayTest, ChoicesDrawWithNeighbouringSeeds) {
  a_.SetScript(SaysItsSeed());
  Start();
  const OrderedJson json = Json(Completion(R"("n":3,"seed":40,"return_token_ids":true)"));
  ASSERT_EQ(json["choices"].size(), 3u) << DumpJson(json);
  std::set<std::string> ids;
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(json["choices"][i]["index"], i);
    EXPECT_EQ(json["choices"][i]["text"], "seed " + std::to_string(40 + i));
    EXPECT_EQ(json["choices"][i]["finish_reason"], "stop");
    EXPECT_EQ(json["choices"][i]["token_ids"].size(), 7u);
    ids.insert(a_.requests()[i].request_id());
  }
  EXPECT_EQ(ids.size(), 3u) << "each is a request of its own to the cluster";
  EXPECT_EQ(json["usage"]["prompt_tokens"], 5) << "the prompt counts once";
  EXPECT_EQ(json["usage"]["completion_tokens"], 21);
  EXPECT_EQ(json["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
  EXPECT_TRUE(scheduler_.finished.Wait(3));
}

TEST_F(GatewayTest, OtherChoicesWaitForTheFirstOnesPrefill) {
  Signal go;
  std::atomic<int> calls{0};
  a_.SetScript([&](grpc::ServerContext& context, const v1::WorkerGenerateRequest& request,
                   FakeWorker::Writer& writer) {
    if (calls++ == 0) {
      EXPECT_TRUE(go.Wait());
    }
    return SaysItsSeed()(context, request, writer);
  });
  Start();
  std::thread client([&] { EXPECT_EQ(Json(Completion(R"("n":2,"seed":1)"))["choices"].size(), 2u); });
  EXPECT_TRUE(a_.started.Wait(1));
  EXPECT_EQ(a_.requests().size(), 1u) << "the second choice waits for the blocks of the first";
  go.Set();
  client.join();
  EXPECT_EQ(calls, 2);
}

TEST_F(GatewayTest, StreamedChoicesEachHaveTheirRoleTextAndEnd) {
  a_.SetScript(SaysItsSeed());
  Start();
  const auto events =
      Events(Ask(Post("/v1/chat/completions", R"({"messages":[{"role":"user","content":"x"}],"n":3,"seed":7,)"
                                              R"("stream":true,"stream_options":{"include_usage":true}})")));
  ASSERT_FALSE(events.empty());
  EXPECT_EQ(events.back(), "[DONE]");
  std::map<int, std::string> text, reason;
  std::map<int, int> roles;
  int usages = 0;
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    const OrderedJson chunk = *ParseJson(events[i]);
    if (chunk["choices"].empty()) {
      ++usages;
      EXPECT_EQ(chunk["usage"]["completion_tokens"], 18);
      EXPECT_EQ(i + 2, events.size()) << "the usage comes last";
      continue;
    }
    const OrderedJson& choice = chunk["choices"][0];
    const int index = choice["index"];
    EXPECT_FALSE(reason.contains(index)) << "nothing after the end of a choice";
    if (choice["delta"].contains("role")) {
      EXPECT_FALSE(text.contains(index)) << "the role comes first";
      ++roles[index];
    }
    if (choice["delta"].contains("content")) text[index] += choice["delta"]["content"];
    if (!choice["finish_reason"].is_null()) reason[index] = choice["finish_reason"];
  }
  EXPECT_EQ(usages, 1);
  EXPECT_EQ(text, (std::map<int, std::string>{{0, "seed 7"}, {1, "seed 8"}, {2, "seed 9"}}));
  EXPECT_EQ(roles, (std::map<int, int>{{0, 1}, {1, 1}, {2, 1}}));
  EXPECT_EQ(reason, (std::map<int, std::string>{{0, "stop"}, {1, "stop"}, {2, "stop"}}));
}

TEST_F(GatewayTest, BestOfGivesTheLikeliestAndCountsAll) {
  a_.SetScript(SaysItsSeed(-0.01f));  // the lower seed is the likelier
  Start();
  OrderedJson json = Json(Completion(R"("n":2,"best_of":4,"seed":10)"));
  ASSERT_EQ(json["choices"].size(), 2u) << DumpJson(json);
  EXPECT_EQ(json["choices"][0]["text"], "seed 10");
  EXPECT_EQ(json["choices"][1]["text"], "seed 11");
  EXPECT_EQ(json["choices"][0]["logprobs"], nullptr) << "chosen by them, not asked for them";
  EXPECT_EQ(json["usage"]["completion_tokens"], 28);
  a_.SetScript(SaysItsSeed(0.01f));
  json = Json(Completion(R"("n":2,"best_of":4,"seed":10)"));
  EXPECT_EQ(json["choices"][0]["text"], "seed 13");
  EXPECT_EQ(json["choices"][0]["index"], 0);
  EXPECT_EQ(json["choices"][1]["text"], "seed 12");
}

TEST_F(GatewayTest, AChoiceThatFailsEndsTheRequest) {
  config_.gateway.max_retries = 0;
  std::atomic<int> calls{0};
  a_.SetScript([&](grpc::ServerContext& context, const v1::WorkerGenerateRequest& request,
                   FakeWorker::Writer& writer) {
    switch (calls++) {
      case 0:
        return a_.Hangs("first")(context, request, writer);
      default:
        return FakeWorker::Fails("", grpc::StatusCode::INTERNAL)(context, request, writer);
    }
  });
  Start();
  const std::string response = Completion(R"("n":2)");
  EXPECT_EQ(StatusOf(response), 500) << response;
  EXPECT_THAT(response, HasSubstr("choice 1: "));
  EXPECT_TRUE(a_.cancelled.Wait()) << "the other choice is cancelled";
  // The places of all choices become free again.
  const absl::Time deadline = absl::Now() + kTestWait;
  std::string metrics;
  do {
    metrics = BodyOf(Ask(Get("/metrics")));
  } while (metrics.find("tidepool_requests_running{role=\"gateway\"} 0") == std::string::npos &&
           absl::Now() < deadline);
  EXPECT_THAT(metrics, HasSubstr("tidepool_requests_running{role=\"gateway\"} 0"));
}

TEST_F(GatewayTest, EveryChoiceCountsAsARequestInFlight) {
  config_.gateway.max_inflight = 2;
  a_.SetScript(SaysItsSeed());
  Start();
  EXPECT_EQ(StatusOf(Completion(R"("n":3)")), 429);
  EXPECT_EQ(Json(Completion(R"("n":2)"))["choices"].size(), 2u) << "and none of the refused stays";
}

TEST_F(GatewayTest, AChoiceThatFailsBeforeItsFirstTokenIsTriedElsewhere) {
  std::atomic<int> calls{0};
  a_.SetScript([&](grpc::ServerContext& context, const v1::WorkerGenerateRequest& request,
                   FakeWorker::Writer& writer) {
    return calls++ == 1 ? FakeWorker::Fails("", grpc::StatusCode::UNAVAILABLE)(context, request, writer)
                        : SaysItsSeed()(context, request, writer);
  });
  b_.SetScript(SaysItsSeed());
  Start();
  const OrderedJson json = Json(Completion(R"("n":2,"seed":1)"));
  ASSERT_EQ(json["choices"].size(), 2u) << DumpJson(json);
  EXPECT_EQ(json["choices"][1]["text"], "seed 2");
  EXPECT_EQ(b_.requests().size(), 1u);
}

TEST_F(GatewayTest, SamplingReachesTheWorkerAsAsked) {
  a_.SetScript(FakeWorker::Says("a"));
  Start();
  ASSERT_EQ(StatusOf(Completion(
                R"("temperature":0.5,"top_k":3,"top_p":0.75,"min_p":0.25,"typical_p":0.5,"seed":9,)"
                R"("repetition_penalty":1.5,"presence_penalty":1,"frequency_penalty":-1,)"
                R"("logit_bias":{"65":-100},"allowed_token_ids":[1,2],"bad_words":["ab","x"],"min_tokens":2,)"
                R"("stop_token_ids":[66],"prompt_logprobs":3)")),
            500)
      << "the fake sends no logprobs of the prompt, which is an error";
  const v1::WorkerGenerateRequest request = a_.requests().at(0);
  const v1::Sampling& s = request.sampling();
  EXPECT_EQ(s.temperature(), 0.5f);
  EXPECT_EQ(s.top_k(), 3);
  EXPECT_EQ(s.top_p(), 0.75f);
  EXPECT_EQ(s.min_p(), 0.25f);
  EXPECT_EQ(s.typical_p(), 0.5f);
  EXPECT_EQ(s.seed(), 9u);
  EXPECT_EQ(s.repetition_penalty(), 1.5f);
  EXPECT_EQ(s.presence_penalty(), 1.0f);
  EXPECT_EQ(s.frequency_penalty(), -1.0f);
  ASSERT_EQ(s.logit_bias_size(), 1);
  EXPECT_EQ(s.logit_bias(0).id(), 65);
  EXPECT_EQ(s.logit_bias(0).bias(), -100.0f);
  EXPECT_THAT(s.allowed_token_ids(), ::testing::ElementsAre(1, 2));
  // With a space in front each has one token more here: as in vLLM that is no other spelling of the word.
  ASSERT_EQ(s.bad_words_size(), 2);
  EXPECT_THAT(s.bad_words(0).ids(), ::testing::ElementsAre('a', 'b'));
  EXPECT_THAT(s.bad_words(1).ids(), ::testing::ElementsAre('x'));
  EXPECT_EQ(s.min_tokens(), 2u);
  EXPECT_THAT(s.stop_token_ids(), ::testing::ElementsAre(257, 66));
  EXPECT_FALSE(s.has_top_logprobs());
  EXPECT_EQ(request.prompt_logprobs(), 3u);
}

TEST_F(GatewayTest, IdsOutsideTheVocabularyAreRefusedByField) {
  Start();
  for (const char* field :
       {R"("logit_bias":{"258":1})", R"("allowed_token_ids":[5,258])", R"("stop_token_ids":[258])"}) {
    const std::string response = Completion(field);
    EXPECT_EQ(StatusOf(response), 400) << response;
    const std::string name(field + 1, std::string(field).find('"', 1) - 1);
    EXPECT_EQ(Json(response)["error"]["param"], name);
  }
}

TEST_F(GatewayTest, TheModelsOwnDefaultsHoldForWhatIsLeftOut) {
  std::ofstream(dir_ / "generation_config.json")
      << R"({"temperature":0.25,"top_k":11,"top_p":0.5,"min_p":0.125,"repetition_penalty":1.25,)"
         R"("max_new_tokens":33,"eos_token_id":257,"do_sample":true})";
  a_.SetScript(FakeWorker::Says("a"));
  Start();
  const auto chat = [&](const std::string& more) {
    EXPECT_EQ(StatusOf(Ask(Post("/v1/chat/completions",
                                R"({"messages":[{"role":"user","content":"x"}])" + more + "}"))),
              200);
    return a_.requests().back();
  };
  v1::WorkerGenerateRequest request = chat("");
  EXPECT_EQ(request.sampling().temperature(), 0.25f);
  EXPECT_EQ(request.sampling().top_k(), 11);
  EXPECT_EQ(request.sampling().top_p(), 0.5f);
  EXPECT_EQ(request.sampling().min_p(), 0.125f);
  EXPECT_EQ(request.sampling().repetition_penalty(), 1.25f);
  EXPECT_EQ(request.max_tokens(), 33u);
  request = chat(R"(,"temperature":1,"top_k":-1,"top_p":1,"min_p":0,"repetition_penalty":1,"max_tokens":50)");
  EXPECT_EQ(request.sampling().temperature(), 1.0f) << "what is asked for holds, also where it is neutral";
  EXPECT_EQ(request.sampling().top_k(), 0);
  EXPECT_EQ(request.sampling().top_p(), 1.0f);
  EXPECT_EQ(request.sampling().min_p(), 0.0f);
  EXPECT_EQ(request.sampling().repetition_penalty(), 1.0f);
  EXPECT_EQ(request.max_tokens(), 50u);
}

TEST_F(GatewayTest, TheModelsDefaultsCanBeTurnedOff) {
  std::ofstream(dir_ / "generation_config.json") << R"({"temperature":0.25})";
  config_.model.generation_config = "off";
  a_.SetScript(FakeWorker::Says("a"));
  Start();
  Completion(R"("max_tokens":2)");
  EXPECT_EQ(a_.requests().at(0).sampling().temperature(), 1.0f);
}

TEST_F(GatewayTest, ABrokenGenerationConfigIsNamed) {
  for (const char* bad : {R"({"temperature":"warm"})", R"({"top_p":0})", "{", "[]"}) {
    std::ofstream(dir_ / "generation_config.json") << bad;
    const auto server = GatewayServer::Start(config_, metrics_, options_);
    ASSERT_FALSE(server.ok()) << bad;
    EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(server.status().message()), HasSubstr("generation_config.json: "));
  }
}

// Gives, where asked, every token of the prompt but the first the logprob -id / 100, and "!" as the
// likeliest.
FakeWorker::Script Scores(std::string answer, size_t per_event = 2) {
  return [=](grpc::ServerContext&, const v1::WorkerGenerateRequest& request, FakeWorker::Writer& writer) {
    v1::WorkerGenerateEvent event;
    for (int i = 1; request.has_prompt_logprobs() && i < request.prompt_size(); ++i) {
      auto& score = *event.add_prompt_logprobs();
      score.set_logprob(static_cast<float>(-request.prompt(i)) / 100);
      score.set_rank(static_cast<uint32_t>(i + 1));
      for (uint32_t t = 0; t < request.prompt_logprobs(); ++t) {
        auto& top = *score.add_top();
        top.set_id('!' + static_cast<int32_t>(t));
        top.set_logprob(-0.25f);
      }
      if (static_cast<size_t>(event.prompt_logprobs_size()) == per_event) {
        writer.Write(event);
        event.Clear();
      }
    }
    if (event.prompt_logprobs_size() > 0) writer.Write(event);
    uint32_t index = 0;
    FakeWorker::SendText(writer, answer, index);
    FakeWorker::SendFinish(writer, "length", -1);
    return grpc::Status::OK;
  };
}

TEST_F(GatewayTest, EchoWithLogprobsBeginsWithThePrompts) {
  a_.SetScript(Scores("xy"));
  Start();
  const OrderedJson choice = Json(Completion(R"("echo":true,"logprobs":1)"))["choices"][0];
  EXPECT_EQ(choice["text"], "helloxy");
  const OrderedJson& logprobs = choice["logprobs"];
  EXPECT_EQ(logprobs["tokens"], OrderedJson::array({"h", "e", "l", "l", "o", "x", "y"}));
  EXPECT_EQ(logprobs["text_offset"], OrderedJson::array({0, 1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(logprobs["token_logprobs"][0], nullptr);
  EXPECT_NEAR(logprobs["token_logprobs"][1].get<double>(), -1.01, 1e-6);
  EXPECT_NEAR(logprobs["token_logprobs"][6].get<double>(), -0.5, 1e-6);
  EXPECT_EQ(logprobs["top_logprobs"][0], nullptr);
  EXPECT_EQ(logprobs["top_logprobs"][1].size(), 2u) << "the likeliest, and the token itself";
  EXPECT_NEAR(logprobs["top_logprobs"][1]["!"].get<double>(), -0.25, 1e-6);
  EXPECT_FALSE(choice.contains("prompt_logprobs"));

  // The same, streamed: the first event has the prompt.
  const auto events = Events(Completion(R"("echo":true,"logprobs":1,"stream":true)"));
  const OrderedJson first = *ParseJson(events.at(0));
  EXPECT_EQ(first["choices"][0]["text"], "hello");
  EXPECT_EQ(first["choices"][0]["logprobs"]["tokens"].size(), 5u);
  OrderedJson tokens = OrderedJson::array(), offsets = OrderedJson::array();
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    const OrderedJson chunk = *ParseJson(events[i]);
    const OrderedJson& part = chunk["choices"][0]["logprobs"];
    if (part.is_null()) continue;
    for (const auto& t : part["tokens"]) tokens.push_back(t);
    for (const auto& o : part["text_offset"]) offsets.push_back(o);
  }
  EXPECT_EQ(tokens, logprobs["tokens"]);
  EXPECT_EQ(offsets, logprobs["text_offset"]);
}

TEST_F(GatewayTest, NothingButTheEchoedPromptWithMaxTokensZero) {
  a_.SetScript(Scores("x"));
  Start();
  const OrderedJson json = Json(Completion(R"("echo":true,"logprobs":0,"max_tokens":0)"));
  EXPECT_EQ(json["choices"][0]["text"], "hello");
  EXPECT_EQ(json["choices"][0]["logprobs"]["tokens"].size(), 5u);
  EXPECT_EQ(json["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(json["usage"]["completion_tokens"], 0);
}

TEST_F(GatewayTest, PromptLogprobsComeInVllmsShape) {
  a_.SetScript(Scores("x"));
  Start();
  const OrderedJson json = Json(Completion(R"("prompt_logprobs":1,"n":2)"));
  for (const OrderedJson& choice : json["choices"]) {
    const OrderedJson& list = choice["prompt_logprobs"];
    ASSERT_EQ(list.size(), 5u) << DumpJson(json);
    EXPECT_EQ(list[0], nullptr);
    EXPECT_EQ(list[1][std::to_string('e')]["rank"], 2);
    EXPECT_EQ(list[1][std::to_string('e')]["decoded_token"], "e");
    EXPECT_NEAR(list[1][std::to_string('e')]["logprob"].get<double>(), -1.01, 1e-6);
    EXPECT_EQ(list[1][std::to_string('!')]["rank"], 1);
  }
  EXPECT_EQ(a_.requests().at(0).prompt_logprobs(), 1u);
  EXPECT_FALSE(a_.requests().at(1).has_prompt_logprobs()) << "the prompt is scored once";
  const OrderedJson chat = Json(Ask(
      Post("/v1/chat/completions", R"({"messages":[{"role":"user","content":"x"}],"prompt_logprobs":0})")));
  EXPECT_EQ(chat["prompt_logprobs"].size(), std::string("user:x|assistant:").size());
}

TEST_F(GatewayTest, PromptLogprobsThatDoNotFitThePromptAreAnError) {
  a_.SetScript([](grpc::ServerContext&, const v1::WorkerGenerateRequest&, FakeWorker::Writer& writer) {
    v1::WorkerGenerateEvent event;
    for (int i = 0; i < 50; ++i) event.add_prompt_logprobs();
    writer.Write(event);
    return grpc::Status::OK;
  });
  Start();
  EXPECT_EQ(StatusOf(Completion(R"("prompt_logprobs":0)")), 500);
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

TEST_F(GrpcFrontTest, AClassOfItsOwnIsNoWayAroundTheTenantsLimits) {
  config_.gateway.tenant_limits.requests_per_minute = 1;
  a_.SetScript(FakeWorker::Says("hi", "stop"));
  Connect();
  for (const auto expected : {grpc::StatusCode::OK, grpc::StatusCode::RESOURCE_EXHAUSTED}) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    v1::GenerateRequest request;
    request.set_text("hello");
    request.set_request_class("batch");
    auto reader = stub_->Generate(&context, request);
    v1::GenerateResponse event;
    while (reader->Read(&event)) {
    }
    EXPECT_EQ(reader->Finish().error_code(), expected);
  }
}

TEST_F(GrpcFrontTest, AUserCannotSpellAControlToken) {
  a_.SetScript(FakeWorker::Says("ok"));
  Connect();
  v1::GenerateRequest request;
  auto& message = *request.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("a</s>b");
  auto reader = stub_->Generate(&context_, request);
  v1::GenerateResponse response;
  while (reader->Read(&response)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
  const std::string prompt = "user:a</s>b|assistant:";
  const v1::WorkerGenerateRequest asked = a_.requests().at(0);
  const auto& ids = asked.prompt();
  EXPECT_EQ(std::vector<int32_t>(ids.begin(), ids.end()), std::vector<int32_t>(prompt.begin(), prompt.end()));
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

TEST_F(GrpcFrontTest, GivesChoicesAndLogprobs) {
  a_.SetScript(Scores("xy"));
  Connect();
  v1::GenerateRequest request;
  request.set_text("hello");
  request.set_n(2);
  request.set_logprobs(0);
  request.set_prompt_logprobs(2);
  request.mutable_sampling()->set_seed(3);
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, request);
  v1::GenerateResponse message;
  std::map<uint32_t, std::string> text, reason;
  int prompt_logprobs = 0, logprobs = 0, usages = 0;
  while (reader->Read(&message)) {
    EXPECT_EQ(usages, 0) << "the usage comes last";
    text[message.index()] += message.text();
    if (!message.finish_reason().empty()) reason[message.index()] = message.finish_reason();
    for (const auto& score : message.prompt_logprobs()) {
      EXPECT_EQ(score.top_size(), 2);
      ++prompt_logprobs;
    }
    EXPECT_EQ(message.logprobs_size(), message.token_ids_size());
    logprobs += message.logprobs_size();
    if (message.has_usage()) ++usages;
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(text, (std::map<uint32_t, std::string>{{0, "xy"}, {1, "xy"}}));
  EXPECT_EQ(reason, (std::map<uint32_t, std::string>{{0, "length"}, {1, "length"}}));
  EXPECT_EQ(prompt_logprobs, 4);
  EXPECT_EQ(logprobs, 4);
  EXPECT_EQ(usages, 1);
  EXPECT_EQ(message.usage().completion_tokens(), 4u);
  EXPECT_EQ(a_.requests().at(0).sampling().seed(), 3u);
  EXPECT_EQ(a_.requests().at(1).sampling().seed(), 4u);
}

TEST_F(GrpcFrontTest, EveryParameterHasItsRange) {
  Connect();
  const struct {
    const char* field;
    std::function<void(v1::GenerateRequest&)> set;
  } cases[] = {
      {"sampling.temperature", [](auto& r) { r.mutable_sampling()->set_temperature(std::nanf("")); }},
      {"sampling.top_k", [](auto& r) { r.mutable_sampling()->set_top_k(-2); }},
      {"sampling.top_p", [](auto& r) { r.mutable_sampling()->set_top_p(0); }},
      {"sampling.min_p", [](auto& r) { r.mutable_sampling()->set_min_p(2); }},
      {"sampling.typical_p", [](auto& r) { r.mutable_sampling()->set_typical_p(0); }},
      {"sampling.repetition_penalty", [](auto& r) { r.mutable_sampling()->set_repetition_penalty(0); }},
      {"sampling.presence_penalty", [](auto& r) { r.mutable_sampling()->set_presence_penalty(3); }},
      {"sampling.frequency_penalty", [](auto& r) { r.mutable_sampling()->set_frequency_penalty(-3); }},
      {"sampling.logit_bias", [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[5] = 101; }},
      {"sampling.logit_bias", [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[-5] = 1; }},
      {"logit_bias", [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[258] = 1; }},
      {"sampling.allowed_token_ids", [](auto& r) { r.mutable_sampling()->add_allowed_token_ids(-1); }},
      {"sampling.bad_words", [](auto& r) { r.mutable_sampling()->add_bad_words(""); }},
      {"min_tokens",
       [](auto& r) {
         r.set_max_tokens(2);
         r.set_min_tokens(3);
       }},
      {"n", [](auto& r) { r.set_n(17); }},
      {"logprobs", [](auto& r) { r.set_logprobs(21); }},
      {"prompt_logprobs", [](auto& r) { r.set_prompt_logprobs(21); }},
      {"stop_token_ids", [](auto& r) { r.add_stop_token_ids(-1); }},
  };
  for (const auto& c : cases) {
    v1::GenerateRequest request;
    request.set_text("hello");
    c.set(request);
    grpc::ClientContext context;
    auto reader = stub_->Generate(&context, request);
    v1::GenerateResponse message;
    while (reader->Read(&message)) {
    }
    const grpc::Status status = reader->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << c.field;
    EXPECT_THAT(status.error_message(), HasSubstr(std::string(c.field) + ": "));
  }
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

// A client that asks for more than its flow control lets through, and reads nothing: its call ends all the
// same, which shows in its line in the log.
class GrpcSlowClientTest : public GrpcFrontTest {
 protected:
  std::string LineOfACallThatIsNotRead() {
    config_.gateway.access_log = (dir_ / "access").string();
    a_.SetScript(FakeWorker::Says(std::string(150, 'x'), "length"));
    b_.SetScript(FakeWorker::Says(std::string(150, 'x'), "length"));
    Connect();
    // A window that does not grow.
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 16 << 10);
    stub_ = v1::Inference::NewStub(grpc::CreateCustomChannel(
        "127.0.0.1:" + std::to_string(server_->grpc_port()), grpc::InsecureChannelCredentials(), arguments));
    v1::GenerateRequest request;
    request.set_text("x");
    request.set_request_id(std::string(128, 'r'));
    request.set_n(16);
    request.set_max_tokens(150);
    const auto reader = stub_->Generate(&context_, request);
    const absl::Time deadline = absl::Now() + kTestWait;
    std::string line;
    while (line.empty() && absl::Now() < deadline) {
      std::ifstream log(dir_ / "access");
      std::getline(log, line);
    }
    context_.TryCancel();
    (void)reader->Finish();
    return line;
  }
};

TEST_F(GrpcSlowClientTest, AFullBufferEndsTheCall) {
  config_.gateway.slow_client_timeout = absl::Hours(1);
  config_.gateway.max_stream_buffer_bytes = 16u << 10;
  EXPECT_THAT(LineOfACallThatIsNotRead(), HasSubstr("\"error\":\"slow_client\""));
}

TEST_F(GrpcSlowClientTest, AWriteThatWaitsEndsTheCallInTime) {
  config_.gateway.slow_client_timeout = absl::Milliseconds(200);
  config_.gateway.max_stream_buffer_bytes = 64u << 20;
  EXPECT_THAT(LineOfACallThatIsNotRead(), HasSubstr("\"error\":\"slow_client\""));
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
