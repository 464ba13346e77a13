#include "server/gateway/http_front.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/digest.h"
#include "server/gateway/http_answer.h"

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

}  // namespace

HttpFront::HttpFront(Dependencies deps) : deps_(std::move(deps)) {
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
  Protected(server, "POST", "/v1/chat/completions",
            [this](HttpRequest http, std::string tenant, std::shared_ptr<ResponseWriter> writer) {
              Completion(std::move(http), std::move(tenant), std::move(writer), true);
            });
  Protected(server, "POST", "/v1/completions",
            [this](HttpRequest http, std::string tenant, std::shared_ptr<ResponseWriter> writer) {
              Completion(std::move(http), std::move(tenant), std::move(writer), false);
            });
  Protected(
      server, "GET", "/v1/models",
      [this](HttpRequest http, std::string, std::shared_ptr<ResponseWriter> w) { Models(http, *w, false); });
  Protected(
      server, "GET", "/v1/models/{id}",
      [this](HttpRequest http, std::string, std::shared_ptr<ResponseWriter> w) { Models(http, *w, true); });
  Protected(server, "POST", "/tokenize",
            [this](HttpRequest http, std::string, std::shared_ptr<ResponseWriter> w) {
              Tokenize(std::move(http), std::move(w));
            });
  Protected(server, "POST", "/detokenize",
            [this](HttpRequest http, std::string, std::shared_ptr<ResponseWriter> w) {
              Detokenize(std::move(http), std::move(w));
            });
  Protected(server, "POST", "/apply-template",
            [this](HttpRequest http, std::string, std::shared_ptr<ResponseWriter> w) {
              ApplyTemplate(std::move(http), std::move(w));
            });
  server.Handle("GET", "/version", [](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
    writer->Send(200, {{"Content-Type", "application/json"}},
                 DumpJson(OrderedJson{{"version", TIDEPOOL_VERSION}}));
  });
}

void HttpFront::Protected(HttpServer& server, std::string_view method, std::string_view path,
                          Handler handler) {
  server.Handle(
      method, path,
      [this, handler = std::move(handler)](HttpRequest http, std::shared_ptr<ResponseWriter> writer) {
        auto tenant = deps_.auth->Tenant(http.Header("authorization"));
        if (!tenant.ok()) {
          return Refuse(*writer, RequestId(http),
                        MakeError(errors::kUnauthorized, std::string(tenant.status().message())));
        }
        handler(std::move(http), *std::move(tenant), std::move(writer));
      });
}

void HttpFront::Refuse(ResponseWriter& writer, const std::string& id, const ApiError& error) {
  HttpHeaders headers = JsonHeaders(id, error.retry_after_seconds);
  if (error.status == 401) headers.emplace_back("WWW-Authenticate", "Bearer");
  writer.Send(error.status, std::move(headers), ErrorBody(error));
  deps_.probe->Request(error.status, error.code);
  deps_.probe->Rejected(error.code);
}

void HttpFront::Completion(HttpRequest http, std::string tenant, std::shared_ptr<ResponseWriter> writer,
                           bool chat) {
  const std::string id = RequestId(http);
  auto parsed = chat ? ParseChatCompletion(http.body) : ParseCompletion(http.body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(*writer, id, *error);
  auto& request = std::get<InferenceRequest>(parsed);
  // Asked here already for the names that the answer carries; the runner asks again.
  if (auto error = deps_.runner->CheckModel(request.model)) return Refuse(*writer, id, *error);
  const auto model = deps_.runner->Model();
  if (!model) return Refuse(*writer, id, MakeError(errors::kNotReady, "the model went away"));
  OpenAiAnswer body(request, model->name(), model->fingerprint(), absl::ToUnixSeconds(absl::Now()),
                    deps_.text->tokenizer());
  const bool stream = request.stream;
  auto answer = std::make_shared<HttpAnswer>(request, std::move(body), id, writer);
  if (stream) {
    std::lock_guard lock(mu_);
    streams_.push_back(answer);
  }
  auto running = deps_.runner->Start(std::move(request), std::move(tenant), std::move(answer));
  writer->OnDisconnect([running](DisconnectReason reason) {
    auto request = running.lock();
    if (request == nullptr) return;
    request->Cancel(reason == DisconnectReason::kClientGone   ? errors::kClientGone
                    : reason == DisconnectReason::kSlowClient ? errors::kSlowClient
                                                              : errors::kDraining);
  });
}

void HttpFront::Models(const HttpRequest& http, ResponseWriter& writer, bool one) {
  const std::string id = RequestId(http);
  if (auto error = deps_.runner->CheckModel(one ? http.param : "")) return Refuse(writer, id, *error);
  const auto model = deps_.runner->Model();
  OrderedJson card;
  card["id"] = model->name();
  card["object"] = "model";
  card["created"] = 0;  // when a model was made is not known here
  card["owned_by"] = "tidepool";
  card["root"] = model->name();
  card["parent"] = nullptr;
  card["max_model_len"] = model->max_model_len();
  card["permission"] = OrderedJson::array();
  OrderedJson list{{"object", "list"}, {"data", OrderedJson::array({card})}};
  writer.Send(200, JsonHeaders(id), DumpJson(one ? card : list));
}

void HttpFront::InPool(std::string id, std::shared_ptr<ResponseWriter> writer, std::function<void()> work) {
  if (deps_.pool->TrySubmit(std::move(work))) return;
  Refuse(*writer, id,
         MakeRetryable(errors::kTooManyRequests,
                       "too many prompts are waiting to be tokenised; try again later", 1));
}

void HttpFront::Tokenize(HttpRequest http, std::shared_ptr<ResponseWriter> writer) {
  const std::string id = RequestId(http);
  auto parsed = ParseTokenize(http.body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(*writer, id, *error);
  InPool(id, writer, [this, id, writer, request = std::move(std::get<TokenizeRequest>(parsed))] {
    if (auto error = deps_.runner->CheckModel(request.model)) return Refuse(*writer, id, *error);
    absl::StatusOr<std::vector<int32_t>> ids;
    if (const auto* chat = std::get_if<ChatInput>(&request.input)) {
      const auto prompt = deps_.text->Render(*chat);
      if (!prompt.ok()) {
        return Refuse(*writer, id,
                      MakeError(errors::kChatTemplate, std::string(prompt.status().message()), "messages"));
      }
      ids = deps_.text->Encode(*prompt, request.add_special_tokens);
    } else {
      Tokenizer::EncodeOptions options;
      options.add_special_tokens = request.add_special_tokens;
      ids = deps_.text->tokenizer().Encode(std::get<std::string>(request.input), options);
    }
    if (!ids.ok()) {
      return Refuse(
          *writer, id,
          MakeError(errors::kInvalidRequest, "prompt: " + std::string(ids.status().message()), "prompt"));
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
    writer->Send(200, JsonHeaders(id), DumpJson(json));
  });
}

void HttpFront::Detokenize(HttpRequest http, std::shared_ptr<ResponseWriter> writer) {
  const std::string id = RequestId(http);
  auto parsed = ParseDetokenize(http.body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(*writer, id, *error);
  InPool(id, writer, [this, id, writer, request = std::move(std::get<DetokenizeRequest>(parsed))] {
    if (auto error = deps_.runner->CheckModel(request.model)) return Refuse(*writer, id, *error);
    for (int32_t token : request.tokens) {
      if (token < deps_.text->tokenizer().vocab_size()) continue;
      return Refuse(*writer, id,
                    MakeError(errors::kInvalidRequest,
                              absl::StrCat("tokens: id ", token, " is not below the vocabulary's size, ",
                                           deps_.text->tokenizer().vocab_size()),
                              "tokens"));
    }
    const std::string text = deps_.text->tokenizer().Decode(request.tokens, /*skip_special_tokens=*/false);
    writer->Send(200, JsonHeaders(id), DumpJson(OrderedJson{{"prompt", text}}));
  });
}

void HttpFront::ApplyTemplate(HttpRequest http, std::shared_ptr<ResponseWriter> writer) {
  const std::string id = RequestId(http);
  auto parsed = ParseApplyTemplate(http.body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return Refuse(*writer, id, *error);
  InPool(id, writer, [this, id, writer, chat = std::move(std::get<ChatInput>(parsed))] {
    const auto prompt = deps_.text->Render(chat);
    if (!prompt.ok()) {
      return Refuse(*writer, id,
                    MakeError(errors::kChatTemplate, std::string(prompt.status().message()), "messages"));
    }
    writer->Send(200, JsonHeaders(id), DumpJson(OrderedJson{{"prompt", prompt->text}}));
  });
}

}  // namespace tidepool
