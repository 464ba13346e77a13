// The APIs beside OpenAI's chat and completions, over real sockets, with a fake scheduler and a fake worker.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>

#include "base/digest.h"
#include "server/gateway/gateway_server.h"
#include "tests/server/gateway/fake_cluster.h"
#include "tests/server/http/raw_client.h"
#include "tidepool/v1/error_details.pb.h"
#include "tidepool/v1/inference.grpc.pb.h"

namespace tidepool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kCalls[] =
    "<think>hm</think>so<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":1}}</tool_call>";

class ApiFrontsTest : public ::testing::Test {
 protected:
  ApiFrontsTest() : dir_(std::filesystem::temp_directory_path() / ("tidepool-apis-" + RandomHexId())) {
    WriteByteModel(dir_);
    // One that knows tools, and thinks.
    std::ofstream(dir_ / "tokenizer_config.json") << DumpJson(
        OrderedJson{{"bos_token", "<s>"},
                    {"eos_token", "</s>"},
                    {"chat_template",
                     "{% if tools %}{% for t in tools %}{{ t.function.name }}|{% endfor %}{% endif %}"
                     "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.tool_calls %}"
                     "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>"
                     "{% endfor %}{% endif %}|{% endfor %}"
                     "{% if add_generation_prompt %}assistant:{% endif %}"}});
    config_.model.path = dir_.string();
    config_.model.reasoning_parser = "think";
    config_.gateway.http_listen = config_.gateway.grpc_listen = "127.0.0.1:0";
    config_.gateway.server_key = "secret";
    config_.cluster.scheduler = scheduler_.address();
    options_.poll_interval = absl::Milliseconds(20);
    scheduler_.Register(a_.address(), v1::ROLE_BOTH);
  }
  ~ApiFrontsTest() override {
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
    stub_ = v1::Inference::NewStub(grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->grpc_port()),
                                                       grpc::InsecureChannelCredentials()));
  }
  std::string Ask(const std::string& request) {
    RawClient client(server_->http_port());
    client.Send(request);
    return client.ReadResponse();
  }
  static OrderedJson Json(const std::string& response) {
    auto json = ParseJson(BodyOf(response));
    EXPECT_TRUE(json.ok()) << response;
    return json.ok() ? *json : OrderedJson();
  }
  // The names of a stream's events, in order.
  static std::vector<std::string> Names(const std::string& response) {
    std::vector<std::string> names;
    size_t at = 0;
    while ((at = response.find("event: ", at)) != std::string::npos) {
      const size_t end = response.find('\n', at);
      names.push_back(response.substr(at + 7, end - at - 7));
      at = end;
    }
    return names;
  }
  static std::string PromptOf(const v1::WorkerGenerateRequest& request) {
    return {request.prompt().begin(), request.prompt().end()};
  }

  struct Streamed {
    grpc::Status status;
    std::vector<v1::GenerateResponse> messages;
    std::string text, reasoning, arguments;
    std::multimap<grpc::string_ref, grpc::string_ref> initial, trailing;
  };
  Streamed Generate(grpc::ClientContext& context, const v1::GenerateRequest& request) {
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    Streamed out;
    auto reader = stub_->Generate(&context, request);
    v1::GenerateResponse message;
    while (reader->Read(&message)) {
      out.text += message.text();
      out.reasoning += message.reasoning();
      for (const auto& call : message.tool_calls()) out.arguments += call.arguments();
      out.messages.push_back(message);
    }
    out.status = reader->Finish();
    out.initial = context.GetServerInitialMetadata();
    out.trailing = context.GetServerTrailingMetadata();
    return out;
  }
  static std::string Of(const std::multimap<grpc::string_ref, grpc::string_ref>& metadata, const char* key) {
    const auto it = metadata.find(key);
    return it == metadata.end() ? "" : std::string(it->second.data(), it->second.size());
  }
  static v1::GenerateRequest Chat(const std::string& text) {
    v1::GenerateRequest request;
    auto& message = *request.mutable_chat()->add_messages();
    message.set_role("user");
    message.set_content(text);
    return request;
  }
  static void AddTool(v1::GenerateRequest& request) {
    auto& tool = *request.add_tools();
    tool.set_name("f");
    tool.set_parameters(R"({"type":"object"})");
  }

  const std::filesystem::path dir_;
  MetricRegistry metrics_;
  Config config_;
  GatewayServer::Options options_;
  FakeScheduler scheduler_;
  FakeWorker a_{"a"};
  std::unique_ptr<GatewayServer> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

constexpr char kTools[] = R"("tools":[{"type":"function","name":"f","parameters":{"type":"object"}}])";

TEST_F(ApiFrontsTest, ResponsesAnswersWhole) {
  a_.SetScript(FakeWorker::Says(kCalls, "stop", 257, 4));
  Start();
  const std::string response =
      Ask(Post("/v1/responses",
               R"({"model":"toy","instructions":"be kind","input":"hi",)" + std::string(kTools) + "}"));
  ASSERT_EQ(StatusOf(response), 200) << response;
  const OrderedJson json = Json(response);
  ASSERT_EQ(json["output"].size(), 3u) << response;
  EXPECT_EQ(json["output"][0]["content"][0]["text"], "hm");
  EXPECT_EQ(json["output"][1]["content"][0]["text"], "so");
  EXPECT_EQ(json["output"][2]["name"], "f");
  EXPECT_EQ(OrderedJson::parse(json["output"][2]["arguments"].get<std::string>()), OrderedJson({{"a", 1}}));
  EXPECT_EQ(json["status"], "completed");
  EXPECT_EQ(json["usage"]["input_tokens_details"]["cached_tokens"], 4);
  EXPECT_GT(json["usage"]["output_tokens_details"]["reasoning_tokens"], 0);
  EXPECT_EQ(PromptOf(a_.requests().at(0)), "f|system:be kind|user:hi|assistant:");
}

TEST_F(ApiFrontsTest, ResponsesStreamsNamedEventsWithoutDone) {
  a_.SetScript(FakeWorker::Says("ab", "length", -1));
  Start();
  const std::string response =
      Ask(Post("/v1/responses", R"({"input":"hi","stream":true,"max_output_tokens":2})"));
  EXPECT_EQ(StatusOf(response), 200);
  EXPECT_THAT(response, HasSubstr("text/event-stream"));
  EXPECT_THAT(Names(response),
              ElementsAre("response.created", "response.in_progress", "response.output_item.added",
                          "response.content_part.added", "response.output_text.delta",
                          "response.output_text.delta", "response.output_text.done",
                          "response.content_part.done", "response.output_item.done", "response.incomplete"));
  EXPECT_THAT(response, Not(HasSubstr("[DONE]")));
}

TEST_F(ApiFrontsTest, AFailureInAResponsesStreamIsNoCompletedResponse) {
  a_.SetScript(FakeWorker::Fails("par", grpc::StatusCode::UNAVAILABLE));
  Start();
  const auto names = Names(Ask(Post("/v1/responses", R"({"input":"hi","stream":true})")));
  ASSERT_GE(names.size(), 2u);
  EXPECT_EQ(names[names.size() - 2], "error");
  EXPECT_EQ(names.back(), "response.failed");
}

TEST_F(ApiFrontsTest, ResponsesRefusesBeforeTheFirstByte) {
  Start();
  const std::string stored = Ask(Post("/v1/responses", R"({"input":"hi","store":true,"stream":true})"));
  EXPECT_EQ(StatusOf(stored), 400);
  EXPECT_EQ(Json(stored)["error"]["param"], "store");
  EXPECT_EQ(Json(stored)["error"]["code"], "unsupported_parameter");
  const std::string model = Ask(Post("/v1/responses", R"({"input":"hi","model":"nope"})"));
  EXPECT_EQ(StatusOf(model), 404);
  const std::string length =
      Ask(Post("/v1/responses", R"({"input":"hi","max_output_tokens":1000,"stream":true})"));
  EXPECT_EQ(StatusOf(length), 400);
  EXPECT_EQ(Json(length)["error"]["param"], "max_output_tokens") << length;
  const std::string context = Ask(Post("/v1/responses", R"({"input":")" + std::string(300, 'x') + "\"}"));
  EXPECT_EQ(Json(context)["error"]["param"], "input") << context;
  EXPECT_EQ(Json(context)["error"]["code"], "context_length_exceeded");
  const std::string get = Ask(Get("/v1/responses"));
  EXPECT_EQ(StatusOf(get), 405);
  EXPECT_THAT(get, HasSubstr("Allow: POST"));
}

TEST_F(ApiFrontsTest, MessagesAnswersWhole) {
  a_.SetScript(FakeWorker::Says(kCalls, "stop", 257, 4));
  Start();
  const std::string response = Ask(
      Post("/v1/messages",
           R"({"model":"toy","max_tokens":90,"system":"be kind","messages":[{"role":"user","content":"hi"}],)"
           R"("tools":[{"name":"f","input_schema":{"type":"object"}}]})",
           "anthropic-version: 2023-06-01\r\n"));
  ASSERT_EQ(StatusOf(response), 200) << response;
  EXPECT_THAT(response, HasSubstr("request-id: "));
  const OrderedJson json = Json(response);
  EXPECT_EQ(json["type"], "message");
  ASSERT_EQ(json["content"].size(), 3u) << response;
  EXPECT_EQ(json["content"][0]["thinking"], "hm");
  EXPECT_EQ(json["content"][1]["text"], "so");
  EXPECT_EQ(json["content"][2]["input"], OrderedJson({{"a", 1}}));
  EXPECT_EQ(json["stop_reason"], "tool_use");
  const std::string prompt = "f|system:be kind|user:hi|assistant:";
  EXPECT_EQ(PromptOf(a_.requests().at(0)), prompt);
  EXPECT_EQ(json["usage"]["input_tokens"], prompt.size() - 4);
  EXPECT_EQ(json["usage"]["cache_read_input_tokens"], 4);
}

TEST_F(ApiFrontsTest, MessagesStreamsAnthropicsEvents) {
  a_.SetScript(FakeWorker::Says("ab END cd"));
  Start();
  const std::string response =
      Ask(Post("/v1/messages", R"({"max_tokens":90,"stream":true,"stop_sequences":["END"],)"
                               R"("messages":[{"role":"user","content":"hi"}]})"));
  const auto names = Names(response);
  ASSERT_GE(names.size(), 6u) << response;
  EXPECT_EQ(names[0], "message_start");
  EXPECT_EQ(names[1], "ping");
  EXPECT_EQ(names[2], "content_block_start");
  EXPECT_EQ(names[names.size() - 3], "content_block_stop");
  EXPECT_EQ(names[names.size() - 2], "message_delta");
  EXPECT_EQ(names.back(), "message_stop");
  EXPECT_THAT(response, HasSubstr(R"("stop_reason":"stop_sequence","stop_sequence":"END")"));
}

TEST_F(ApiFrontsTest, MessagesHasErrorsOfItsOwnShape) {
  config_.gateway.api_keys = {{HexEncode(Sha256().Update("key-a").Finish()), "tenant-a"}};
  a_.SetScript(FakeWorker::Says("ok"));
  Start();
  const std::string body = R"({"max_tokens":9,"messages":[{"role":"user","content":"hi"}]})";
  const std::string stranger = Ask(Post("/v1/messages", body, "x-api-key: wrong\r\nX-Request-Id: mine\r\n"));
  EXPECT_EQ(StatusOf(stranger), 401);
  EXPECT_EQ(Json(stranger)["type"], "error");
  EXPECT_EQ(Json(stranger)["error"]["type"], "authentication_error");
  EXPECT_EQ(Json(stranger)["request_id"], "mine");
  EXPECT_THAT(stranger, Not(HasSubstr("wrong")));
  EXPECT_EQ(StatusOf(Ask(Post("/v1/messages", body, "x-api-key: key-a\r\n"))), 200);
  EXPECT_EQ(StatusOf(Ask(Post("/v1/messages", body, "Authorization: Bearer key-a\r\n"))), 200);
  EXPECT_EQ(StatusOf(Ask(Post("/v1/chat/completions", R"({"messages":[{"role":"user","content":"hi"}]})",
                              "x-api-key: key-a\r\n"))),
            200);
  const std::string wrong = Ask(Post("/v1/messages", R"({"messages":[]})", "x-api-key: key-a\r\n"));
  EXPECT_EQ(StatusOf(wrong), 400);
  EXPECT_EQ(Json(wrong)["error"]["type"], "invalid_request_error");
  EXPECT_THAT(Json(wrong)["error"]["message"].get<std::string>(), HasSubstr("max_tokens: "));
}

TEST_F(ApiFrontsTest, CountTokensCountsThePromptThatWouldBeComputed) {
  Start();
  const std::string response = Ask(
      Post("/v1/messages/count_tokens", R"({"model":"toy","messages":[{"role":"user","content":"hello"}]})"));
  ASSERT_EQ(StatusOf(response), 200) << response;
  EXPECT_EQ(Json(response), OrderedJson({{"input_tokens", std::string("user:hello|assistant:").size()}}));
  EXPECT_TRUE(a_.requests().empty());
}

TEST_F(ApiFrontsTest, ModelsAreCardsOfWhoAsks) {
  Start();
  const OrderedJson openai = Json(Ask(Get("/v1/models/toy")));
  EXPECT_EQ(openai["object"], "model");
  EXPECT_GT(openai["created"], 0);
  EXPECT_EQ(openai["max_model_len"], 200);
  const OrderedJson anthropic =
      Json(Ask("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nanthropic-version: 2023-06-01\r\n\r\n"));
  EXPECT_EQ(anthropic["data"][0]["type"], "model");
  EXPECT_EQ(anthropic["data"][0]["display_name"], "toy");
  EXPECT_EQ(anthropic["has_more"], false);
  EXPECT_EQ(StatusOf(Ask(Get("/ping"))), 200);
  EXPECT_EQ(StatusOf(Ask("HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")), 200);
}

TEST_F(ApiFrontsTest, GrpcGivesThoughtsTextAndCallsApart) {
  a_.SetScript(FakeWorker::Says(kCalls, "stop", 257, 4));
  Start();
  v1::GenerateRequest request = Chat("hi");
  AddTool(request);
  request.set_return_trace(true);
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "mine");
  const Streamed got = Generate(context, request);
  ASSERT_TRUE(got.status.ok()) << got.status.error_message();
  EXPECT_EQ(got.reasoning, "hm");
  EXPECT_EQ(got.text, "so");
  EXPECT_EQ(OrderedJson::parse(got.arguments), OrderedJson({{"a", 1}}));
  std::string name, id;
  for (const auto& message : got.messages) {
    EXPECT_EQ(message.request_id(), "mine");
    for (const auto& call : message.tool_calls()) {
      name += call.name();
      id += call.id();
    }
  }
  EXPECT_EQ(name, "f");
  EXPECT_FALSE(id.empty());
  EXPECT_EQ(got.messages.back().finish_reason(), "tool_calls");
  EXPECT_GT(got.messages.back().usage().reasoning_tokens(), 0u);
  EXPECT_EQ(got.messages.back().trace().decode_worker(), "decode-0");
  EXPECT_EQ(Of(got.initial, "x-request-id"), "mine");
  EXPECT_EQ(PromptOf(a_.requests().at(0)), "f|user:hi|assistant:");
}

TEST_F(ApiFrontsTest, GrpcTakesAConversationWithCalls) {
  a_.SetScript(FakeWorker::Says("ok"));
  Start();
  v1::GenerateRequest request = Chat("hi");
  auto& call = *request.mutable_chat()->add_messages();
  call.set_role("assistant");
  auto& made = *call.add_tool_calls();
  made.set_id("c1");
  made.set_name("f");
  made.set_arguments("{\"a\": 1}");
  auto& result = *request.mutable_chat()->add_messages();
  result.set_role("tool");
  result.set_tool_call_id("c1");
  result.set_content("sun");
  request.set_priority(-5);
  request.set_request_class("batch");
  (*request.mutable_metadata())["a"] = "b";
  grpc::ClientContext context;
  const Streamed got = Generate(context, request);
  ASSERT_TRUE(got.status.ok()) << got.status.error_message();
  EXPECT_EQ(got.text, "ok");
  EXPECT_THAT(PromptOf(a_.requests().at(0)), HasSubstr("tool:sun|"));
  EXPECT_EQ(a_.requests().at(0).request_class(), v1::REQUEST_CLASS_BATCH);
  EXPECT_EQ(a_.requests().at(0).priority(), -5);
  EXPECT_FALSE(Of(got.initial, "x-request-id").empty());
}

TEST_F(ApiFrontsTest, GrpcSaysWhichStopEndedIt) {
  a_.SetScript(FakeWorker::Says("ab END"));
  Start();
  v1::GenerateRequest request;
  request.set_text("hi");
  request.add_stop("END");
  grpc::ClientContext context;
  EXPECT_EQ(Generate(context, request).messages.back().stop_text(), "END");
}

TEST_F(ApiFrontsTest, GrpcErrorsNameTheFieldInTrailersAndDetails) {
  Start();
  const struct {
    const char* param;
    std::function<void(v1::GenerateRequest&)> set;
    grpc::StatusCode code = grpc::StatusCode::INVALID_ARGUMENT;
  } cases[] = {
      {"chat.messages[0].role", [](auto& r) { r.mutable_chat()->mutable_messages(0)->set_role("robot"); }},
      {"chat.template_kwargs", [](auto& r) { r.mutable_chat()->set_template_kwargs("[1]"); }},
      {"chat.template_kwargs", [](auto& r) { r.mutable_chat()->set_template_kwargs("{"); }},
      {"tools[0].parameters",
       [](auto& r) {
         AddTool(r);
         r.mutable_tools(0)->set_parameters("7");
       }},
      {"tools[0].name",
       [](auto& r) {
         AddTool(r);
         r.mutable_tools(0)->set_name("a b");
       }},
      {"tool_choice",
       [](auto& r) {
         r.mutable_tool_choice()->set_mode("auto");
         r.mutable_tool_choice()->set_name("f");
       }},
      {"reasoning_effort", [](auto& r) { r.set_reasoning_effort("enormous"); }},
      {"output_format", [](auto& r) { r.mutable_output_format(); }},
      {"output_format.json_schema", [](auto& r) { r.mutable_output_format()->set_json_schema("7"); }},
      {"output_format.choice", [](auto& r) { r.mutable_output_format()->mutable_choice(); }},
      {"output_format.regex", [](auto& r) { r.mutable_output_format()->set_regex(""); }},
      {"priority", [](auto& r) { r.set_priority(1001); }},
      {"request_class", [](auto& r) { r.set_request_class("express"); }},
      {"metadata", [](auto& r) { (*r.mutable_metadata())["a"] = std::string(513, 'x'); }},
      {"request_id", [](auto& r) { r.set_request_id(std::string(129, 'x')); }},
      {"model", [](auto& r) { r.set_model("nope"); }, grpc::StatusCode::NOT_FOUND},
      {"tools",
       [](auto& r) {
         AddTool(r);
         r.set_text("x");
       }},
      {"sampling.logit_bias", [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[258] = 1; }},
  };
  for (const auto& c : cases) {
    v1::GenerateRequest request = Chat("hi");
    c.set(request);
    grpc::ClientContext context;
    const Streamed got = Generate(context, request);
    EXPECT_EQ(got.status.error_code(), c.code) << c.param << ": " << got.status.error_message();
    EXPECT_EQ(Of(got.trailing, "tidepool-error-param"), c.param) << got.status.error_message();
    EXPECT_FALSE(Of(got.trailing, "tidepool-error-code").empty());
    v1::RpcStatus details;
    ASSERT_TRUE(details.ParseFromString(got.status.error_details()));
    EXPECT_EQ(details.code(), c.code);
    ASSERT_EQ(details.details_size(), 2) << c.param;
    EXPECT_EQ(details.details(0).type_url(), "type.googleapis.com/google.rpc.ErrorInfo");
    EXPECT_EQ(details.details(1).type_url(), "type.googleapis.com/google.rpc.BadRequest");
    v1::RpcBadRequest bad;
    ASSERT_TRUE(bad.ParseFromString(details.details(1).value()));
    EXPECT_EQ(bad.field_violations(0).field(), c.param);
  }
}

TEST_F(ApiFrontsTest, GrpcTellsWhenToComeBack) {
  a_.SetScript(FakeWorker::Says("ok"));
  Start();
  server_->BeginDrain();
  grpc::ClientContext context;
  const Streamed got = Generate(context, Chat("hi"));
  EXPECT_EQ(got.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Of(got.trailing, "tidepool-error-code"), "draining");
  EXPECT_GE(std::stoi(Of(got.trailing, "grpc-retry-pushback-ms")), 1000);
  v1::RpcStatus details;
  ASSERT_TRUE(details.ParseFromString(got.status.error_details()));
  EXPECT_EQ(details.details(details.details_size() - 1).type_url(),
            "type.googleapis.com/google.rpc.RetryInfo");
}

TEST_F(ApiFrontsTest, GrpcTokenisesAndBack) {
  config_.gateway.api_keys = {{HexEncode(Sha256().Update("key-a").Finish()), "tenant-a"}};
  Start();
  const auto with_key = [](grpc::ClientContext& context) {
    context.AddMetadata("x-api-key", "key-a");
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  };
  v1::TokenizeRequest chat;
  auto& message = *chat.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("hi");
  v1::TokenizeResponse tokens;
  grpc::ClientContext stranger;
  EXPECT_EQ(stub_->Tokenize(&stranger, chat, &tokens).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  grpc::ClientContext first;
  with_key(first);
  ASSERT_TRUE(stub_->Tokenize(&first, chat, &tokens).ok());
  EXPECT_EQ(std::string(tokens.ids().begin(), tokens.ids().end()), "user:hi|assistant:");
  EXPECT_EQ(tokens.max_model_len(), 200u);

  v1::DetokenizeRequest back;
  *back.mutable_ids() = tokens.ids();
  v1::DetokenizeResponse text;
  grpc::ClientContext second;
  with_key(second);
  ASSERT_TRUE(stub_->Detokenize(&second, back, &text).ok());
  EXPECT_EQ(text.text(), "user:hi|assistant:");
  back.add_ids(258);
  grpc::ClientContext third;
  with_key(third);
  EXPECT_EQ(stub_->Detokenize(&third, back, &text).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ApiFrontsTest, GrpcEmbeds) {
  a_.SetScript(
      [](grpc::ServerContext&, const v1::WorkerGenerateRequest& request, FakeWorker::Writer& writer) {
        v1::WorkerGenerateEvent event;
        event.set_finish_reason("pooled");
        event.set_stop_token(-1);
        event.add_embedding(static_cast<float>(request.prompt_size()));
        event.add_embedding(request.pooling() == v1::POOLING_MEAN ? 1.0f : 0.0f);
        writer.Write(event);
        return grpc::Status::OK;
      });
  Start();
  v1::EmbedRequest request;
  request.add_inputs()->set_text("abc");
  request.add_inputs()->mutable_tokens()->add_ids(7);
  request.set_pooling(v1::POOLING_MEAN);
  request.set_request_id("mine");
  v1::EmbedResponse response;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  const grpc::Status status = stub_->Embed(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.request_id(), "mine");
  ASSERT_EQ(response.embeddings_size(), 2);
  EXPECT_THAT(response.embeddings(0).values(), ElementsAre(3.0f, 1.0f));
  EXPECT_THAT(response.embeddings(1).values(), ElementsAre(1.0f, 1.0f));
  EXPECT_EQ(response.usage().prompt_tokens(), 4u);

  v1::EmbedRequest empty;
  grpc::ClientContext other;
  const grpc::Status refused = stub_->Embed(&other, empty, &response);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), HasSubstr("inputs: "));
}

}  // namespace
}  // namespace tidepool
