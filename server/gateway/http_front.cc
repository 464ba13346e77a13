#include "server/gateway/http_front.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/digest.h"
#include "server/gateway/access_log.h"
#include "server/gateway/embeddings.h"
#include "server/gateway/http_answer.h"
#include "server/gateway/messages_answer.h"
#include "server/gateway/openai_response.h"
#include "server/gateway/responses_answer.h"

namespace tidepool {
namespace {

constexpr size_t kRequestIdChars = 128;

// The client's X-Request-Id where it is usable, else one of ours.
std::string RequestId(const HttpRequest& http) {
  const std::string_view given = http.Header("x-request-id");
  const bool usable = !given.empty() && given.size() <= kRequestIdChars &&
                      std::ranges::all_of(given, [](char c) { return c > 0x20 && c < 0x7f; });
  return usable ? std::string(given) : RandomHexId();
}

// vLLM's request_id in the body names the request as X-Request-Id does.
void TakeRequestId(const InferenceRequest& request, HttpCall& call) {
  if (request.request_id.empty()) return;
  call.id = request.request_id;
  if (const auto record = AccessRecord::Of(call.http)) record->SetRequestId(call.id);
}

// A request whose client goes away is cancelled.
void CancelWith(ResponseWriter& writer, std::weak_ptr<RequestRunner::Running> running) {
  writer.OnDisconnect([running = std::move(running)](DisconnectReason reason) {
    auto request = running.lock();
    if (request == nullptr) return;
    request->Cancel(reason == DisconnectReason::kClientGone   ? errors::kClientGone
                    : reason == DisconnectReason::kSlowClient ? errors::kSlowClient
                                                              : errors::kDraining);
  });
}

// FirstTokenSink: tells when an answer begins, and passes everything on.
class FirstTokenSink final : public OutputSink {
 public:
  FirstTokenSink(std::shared_ptr<OutputSink> sink, std::function<void()> on_first_token)
      : sink_(std::move(sink)), on_first_token_(std::move(on_first_token)) {}

  void OnAdmitted(const Admission& admission) override { sink_->OnAdmitted(admission); }
  void OnPromptLogprobs(std::vector<PromptScore> scores) override {
    sink_->OnPromptLogprobs(std::move(scores));
  }
  bool OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& usage) override {
    if (!delta.tokens.empty() && on_first_token_) std::exchange(on_first_token_, nullptr)();
    return sink_->OnDelta(choice, std::move(delta), usage);
  }
  bool Restart(uint32_t choice) override { return sink_->Restart(choice); }
  void OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage) override {
    sink_->OnChoiceEnd(choice, end, usage);
  }
  int Status(const Outcome& outcome) override { return sink_->Status(outcome); }
  void OnDone(const Outcome& outcome) override { sink_->OnDone(outcome); }

 private:
  const std::shared_ptr<OutputSink> sink_;
  std::function<void()> on_first_token_;
};

}  // namespace

HttpFront::HttpFront(Dependencies deps) : deps_(std::move(deps)), started_(absl::ToUnixSeconds(absl::Now())) {
  pinger_ = std::thread([this] { PingLoop(); });
}

HttpFront::~HttpFront() { Stop(); }

void HttpFront::Stop() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  if (pinger_.joinable()) pinger_.join();
}

void HttpFront::PingLoop() {
  const absl::Duration period = std::clamp(deps_.ping_interval / 4, absl::Milliseconds(10), absl::Seconds(1));
  std::unique_lock lock(mu_);
  while (!stop_) {
    wake_.wait_for(lock, absl::ToChronoNanoseconds(period), [&] { return stop_; });
    std::erase_if(streams_, [](const auto& weak) { return weak.expired(); });
    const auto streams = streams_;
    lock.unlock();
    const absl::Time now = Clock::Real().Now();
    for (const auto& weak : streams) {
      if (auto answer = weak.lock()) answer->Ping(now, deps_.ping_interval);
    }
    lock.lock();
  }
}

void HttpFront::AddRoutes(HttpServer& server) {
  const auto own = [this](void (HttpFront::*handler)(HttpCall)) {
    return [this, handler](HttpCall call) { (this->*handler)(std::move(call)); };
  };
  for (HttpRoute& route : std::to_array<HttpRoute>({
           {"POST", "/v1/chat/completions", own(&HttpFront::ChatCompletion)},
           {"POST", "/v1/completions", own(&HttpFront::Completion)},
           {"POST", "/v1/embeddings", own(&HttpFront::Embeddings)},
           {"POST", "/v1/responses", own(&HttpFront::Responses)},
           {"POST", "/v1/messages", own(&HttpFront::Messages), ApiStyle::kAnthropic},
           {"POST", "/v1/messages/count_tokens", own(&HttpFront::CountTokens), ApiStyle::kAnthropic},
           {"GET", "/v1/models", own(&HttpFront::Models)},
           {"GET", "/v1/models/{id}", own(&HttpFront::Models)},
           {"POST", "/tokenize", own(&HttpFront::Tokenize)},
           {"POST", "/detokenize", own(&HttpFront::Detokenize)},
           {"POST", "/apply-template", own(&HttpFront::ApplyTemplate)},
       })) {
    Add(server, std::move(route));
  }
  // Open: what load balancers and clients ask before they have a key.
  server.Handle("GET", "/version", [](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
    writer->Send(200, {{"Content-Type", "application/json"}},
                 DumpJson(OrderedJson{{"version", TIDEPOOL_VERSION}}));
  });
  // vLLM's, for SageMaker: 200 once there is something to answer with.
  for (const char* method : {"GET", "POST"}) {
    server.Handle(method, "/ping", [this](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
      const bool ready = !deps_.runner->draining() && !deps_.runner->CheckModel("");
      HttpHeaders headers = {{"Content-Type", "application/json"}};
      if (!ready) headers.emplace_back("Retry-After", "1");
      writer->Send(ready ? 200 : 503, std::move(headers), "{}");
    });
  }
}

void HttpFront::Serve(HttpCall call) {
  const std::string_view path = call.http.path;
  if (path == "/v1/chat/completions") return ChatCompletion(std::move(call));
  if (path == "/v1/completions") return Completion(std::move(call));
  if (path == "/v1/responses") return Responses(std::move(call));
  if (path == "/v1/embeddings") return Embeddings(std::move(call));
  Refuse(call, MakeError(errors::kInvalidRequest, "url: is no endpoint for batches", "url"));
}

absl::StatusOr<std::string> HttpFront::TenantOf(const HttpRequest& http) const {
  // Anthropic's clients send the bare key in a header of its own.
  const std::string_view authorization = http.Header("authorization");
  const std::string_view key = http.Header("x-api-key");
  return authorization.empty() && !key.empty() ? deps_.auth->TenantOfKey(key)
                                               : deps_.auth->Tenant(authorization);
}

void HttpFront::Add(HttpServer& server, HttpRoute route) {
  const std::string_view method = route.method, path = route.path;
  server.Handle(method, path,
                [this, style = route.style, handler = std::move(route.handler)](
                    HttpRequest http, std::shared_ptr<ResponseWriter> writer) {
                  HttpCall call;
                  call.id = RequestId(http);
                  call.style = style;
                  call.writer = std::move(writer);
                  auto tenant = TenantOf(http);
                  if (!tenant.ok()) {
                    return Refuse(call,
                                  MakeError(errors::kUnauthorized, std::string(tenant.status().message())));
                  }
                  call.tenant = *std::move(tenant);
                  if (const auto record = AccessRecord::Of(http)) record->SetTenant(call.tenant);
                  call.http = std::move(http);
                  handler(std::move(call));
                });
}

void HttpFront::Refuse(const HttpCall& call, const ApiError& error) {
  SendError(call, error);
  deps_.probe->Request(error.status, error.code);
  deps_.probe->Rejected(error.code);
}

void HttpFront::SendError(const HttpCall& call, const ApiError& error) {
  const bool anthropic = call.style == ApiStyle::kAnthropic;
  HttpHeaders headers = JsonHeaders(call.id, error.retry_after_seconds);
  if (error.status == 401) headers.emplace_back("WWW-Authenticate", "Bearer");
  if (anthropic) headers.emplace_back("request-id", call.id);
  call.writer->Send(error.status, std::move(headers),
                    anthropic ? MessagesErrorBody(error, call.id) : ErrorBody(error));
}

void HttpFront::Reply(const HttpCall& call, const OrderedJson& body) {
  HttpHeaders headers = JsonHeaders(call.id);
  if (call.style == ApiStyle::kAnthropic) headers.emplace_back("request-id", call.id);
  call.writer->Send(200, std::move(headers), DumpJson(body));
}

void HttpFront::ChatCompletion(HttpCall call) { OpenAi(std::move(call), ParseChatCompletion); }

void HttpFront::Completion(HttpCall call) { OpenAi(std::move(call), ParseCompletion); }

void HttpFront::OpenAi(HttpCall call, OrError<InferenceRequest> (*parse)(std::string_view)) {
  auto parsed = parse(call.http.body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  auto& request = std::get<InferenceRequest>(parsed);
  TakeRequestId(request, call);
  const auto model = ModelFor(call, request);
  if (!model) return;
  auto encoder = std::make_unique<OpenAiAnswer>(request, model->name(), model->fingerprint(),
                                                absl::ToUnixSeconds(absl::Now()), deps_.text->tokenizer());
  Run(std::move(call), std::move(request), std::move(encoder));
}

void HttpFront::Embeddings(HttpCall call) {
  auto parsed = ParseEmbeddings(call.http.body);
  call.http.body.clear();
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  auto& request = std::get<EmbeddingRequest>(parsed);
  if (auto error = deps_.runner->CheckModel(request.model)) return Refuse(call, *error);
  const auto model = deps_.runner->Model();
  if (!model) return Refuse(call, MakeRetryable(errors::kNotReady, "the model went away", 1));
  // Only lines of a batch come in with another class.
  request.request_class = call.request_class;
  request.metered = call.request_class == RequestClass::kOnline;
  request.record = AccessRecord::Of(call.http);
  if (request.record) request.trace = request.record->trace();
  auto done = [this, call, name = model->name(), base64 = request.base64](EmbeddingsOutcome outcome) {
    // The runner has counted it.
    if (outcome.error) return SendError(call, *outcome.error);
    call.writer->Send(200, JsonHeaders(call.id), EmbeddingsBody(outcome, name, base64));
  };
  CancelWith(*call.writer, deps_.runner->StartEmbeddings(std::move(request), call.tenant, std::move(done)));
}

void HttpFront::Responses(HttpCall call) {
  auto parsed = ParseResponses(call.http.body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  auto& responses = std::get<ResponsesRequest>(parsed);
  TakeRequestId(responses.request, call);
  const auto model = ModelFor(call, responses.request, responses.names);
  if (!model) return;
  auto encoder = std::make_unique<ResponsesAnswer>(responses, model->name(), absl::ToUnixSeconds(absl::Now()),
                                                   deps_.text->tokenizer());
  Run(std::move(call), std::move(responses.request), std::move(encoder));
}

void HttpFront::Messages(HttpCall call) {
  auto parsed = ParseMessages(call.http.body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  auto& messages = std::get<MessagesRequest>(parsed);
  TakeRequestId(messages.request, call);
  const auto model = ModelFor(call, messages.request, messages.names);
  if (!model) return;
  auto encoder = std::make_unique<MessagesAnswer>(messages, model->name(), call.id);
  Run(std::move(call), std::move(messages.request), std::move(encoder));
}

void HttpFront::CountTokens(HttpCall call) {
  auto parsed = ParseCountTokens(call.http.body);
  call.http.body.clear();
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  InPool(call, [this, call, messages = std::move(std::get<MessagesRequest>(parsed))] {
    if (!ModelFor(call, messages.request, messages.names)) return;
    const auto prompt = deps_.text->Render(std::get<ChatInput>(messages.request.input));
    if (!prompt.ok()) {
      return Refuse(call,
                    MakeError(errors::kChatTemplate, std::string(prompt.status().message()), "messages"));
    }
    const auto ids = deps_.text->Encode(*prompt, messages.request.add_special_tokens.value_or(false));
    if (!ids.ok()) {
      return Refuse(call, MakeError(errors::kInvalidRequest,
                                    "messages: " + std::string(ids.status().message()), "messages"));
    }
    Reply(call, OrderedJson{{"input_tokens", ids->size()}});
  });
}

std::optional<v1::ModelIdentity> HttpFront::ModelFor(const HttpCall& call, const InferenceRequest& request,
                                                     const FieldNames& names) {
  // Asked here already for the names that the answer carries; the runner asks again.
  auto error = deps_.runner->CheckModel(request.model);
  if (!error && request.chat) error = deps_.text->format().Check(request);
  auto model = deps_.runner->Model();
  if (!error && !model) error = MakeRetryable(errors::kNotReady, "the model went away", 1);
  if (!error) return model;
  Refuse(call, names.Own(std::move(*error)));
  return std::nullopt;
}

void HttpFront::Run(HttpCall call, InferenceRequest request, std::unique_ptr<AnswerEncoder> encoder) {
  std::optional<ParserPlan> plan;
  if (request.chat) plan = deps_.text->format().Plan(request);
  const bool stream = request.stream;
  request.record = AccessRecord::Of(call.http);
  if (request.record) request.trace = request.record->trace();
  // Only lines of a batch come in with another class.
  request.request_class = call.request_class;
  request.metered = call.request_class == RequestClass::kOnline;
  if (const std::string_view session = call.http.Header("x-session-id"); !session.empty()) {
    request.session = std::string(session);
  }
  auto answer =
      std::make_shared<HttpAnswer>(request, std::move(plan), std::move(encoder), call.id, call.writer);
  if (stream) {
    std::lock_guard lock(mu_);
    streams_.push_back(answer);
  }
  std::shared_ptr<OutputSink> sink = std::move(answer);
  if (call.on_first_token) {
    sink = std::make_shared<FirstTokenSink>(std::move(sink), std::move(call.on_first_token));
  }
  auto running = deps_.runner->Start(std::move(request), std::move(call.tenant), std::move(sink));
  CancelWith(*call.writer, std::move(running));
}

void HttpFront::Models(HttpCall call) {
  const bool one = !call.http.param.empty();
  if (auto error = deps_.runner->CheckModel(call.http.param)) return Refuse(call, *error);
  const auto model = deps_.runner->Model();
  if (!model) return Refuse(call, MakeRetryable(errors::kNotReady, "the model went away", 1));
  if (!call.http.Header("anthropic-version").empty()) {
    call.style = ApiStyle::kAnthropic;
    const OrderedJson card = {
        {"type", "model"},
        {"id", model->name()},
        {"display_name", model->name()},
        {"created_at",
         absl::FormatTime(absl::RFC3339_sec, absl::FromUnixSeconds(started_), absl::UTCTimeZone())},
        {"max_input_tokens", model->max_model_len()},
        {"max_tokens", model->max_model_len()}};
    if (one) return Reply(call, card);
    return Reply(call, {{"data", OrderedJson::array({card})},
                        {"has_more", false},
                        {"first_id", model->name()},
                        {"last_id", model->name()}});
  }
  OrderedJson card;
  card["id"] = model->name();
  card["object"] = "model";
  // When a model was made is not known here; this is since when it is served.
  card["created"] = started_;
  card["owned_by"] = "tidepool";
  card["root"] = model->name();
  card["parent"] = nullptr;
  card["max_model_len"] = model->max_model_len();
  card["permission"] = OrderedJson::array();
  Reply(call, one ? card : OrderedJson{{"object", "list"}, {"data", OrderedJson::array({card})}});
}

void HttpFront::InPool(const HttpCall& call, std::function<void()> work) {
  auto admitted = deps_.limits->Admit(call.tenant);
  if (const auto* error = std::get_if<ApiError>(&admitted)) return Refuse(call, *error);
  auto ticket = std::make_shared<TenantLimits::Ticket>(std::get<TenantLimits::Ticket>(std::move(admitted)));
  if (deps_.pool->TrySubmit([ticket = std::move(ticket), work = std::move(work)] { work(); })) return;
  Refuse(call, MakeRetryable(errors::kTooManyRequests,
                             "too many prompts are waiting to be tokenised; try again later", 1));
}

void HttpFront::Tokenize(HttpCall call) {
  auto parsed = ParseTokenize(call.http.body);
  call.http.body.clear();
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  InPool(call, [this, call, request = std::move(std::get<TokenizeRequest>(parsed))] {
    if (auto error = deps_.runner->CheckModel(request.model)) return Refuse(call, *error);
    absl::StatusOr<std::vector<int32_t>> ids;
    if (const auto* chat = std::get_if<ChatInput>(&request.input)) {
      const auto prompt = deps_.text->Render(*chat);
      if (!prompt.ok()) {
        return Refuse(call,
                      MakeError(errors::kChatTemplate, std::string(prompt.status().message()), "messages"));
      }
      ids = deps_.text->Encode(*prompt, request.add_special_tokens);
    } else {
      Tokenizer::EncodeOptions options;
      options.add_special_tokens = request.add_special_tokens;
      ids = deps_.text->tokenizer().Encode(std::get<std::string>(request.input), options);
    }
    if (!ids.ok()) {
      return Refuse(call, MakeError(errors::kInvalidRequest, "prompt: " + std::string(ids.status().message()),
                                    "prompt"));
    }
    const auto model = deps_.runner->Model();
    OrderedJson json;
    json["count"] = ids->size();
    json["max_model_len"] = model ? model->max_model_len() : 0;
    json["tokens"] = *ids;
    json["token_strs"] = nullptr;
    if (request.return_token_strs) {
      json["token_strs"] = OrderedJson::array();
      for (int32_t token : *ids) {
        json["token_strs"].push_back(std::string(deps_.text->tokenizer().TokenPiece(token).value_or("")));
      }
    }
    Reply(call, json);
  });
}

void HttpFront::Detokenize(HttpCall call) {
  auto parsed = ParseDetokenize(call.http.body);
  call.http.body.clear();
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  InPool(call, [this, call, request = std::move(std::get<DetokenizeRequest>(parsed))] {
    if (auto error = deps_.runner->CheckModel(request.model)) return Refuse(call, *error);
    for (int32_t token : request.tokens) {
      if (token < deps_.text->tokenizer().vocab_size()) continue;
      return Refuse(call,
                    MakeError(errors::kInvalidRequest,
                              absl::StrCat("tokens: id ", token, " is not below the vocabulary's size, ",
                                           deps_.text->tokenizer().vocab_size()),
                              "tokens"));
    }
    const std::string text = deps_.text->tokenizer().Decode(request.tokens, /*skip_special_tokens=*/false);
    Reply(call, OrderedJson{{"prompt", text}});
  });
}

void HttpFront::ApplyTemplate(HttpCall call) {
  auto parsed = ParseApplyTemplate(call.http.body);
  call.http.body.clear();
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(call, *error);
  InPool(call, [this, call, chat = std::move(std::get<ChatInput>(parsed))] {
    const auto prompt = deps_.text->Render(chat);
    if (!prompt.ok()) {
      return Refuse(call,
                    MakeError(errors::kChatTemplate, std::string(prompt.status().message()), "messages"));
    }
    Reply(call, OrderedJson{{"prompt", prompt->text}});
  });
}

}  // namespace tidepool
