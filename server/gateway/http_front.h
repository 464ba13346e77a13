#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/gateway/openai_request.h"
#include "server/gateway/request_runner.h"
#include "server/gateway/responses_conversion.h"
#include "server/http/http_server.h"

namespace tidepool {

class AnswerEncoder;
class HttpAnswer;

// In whose JSON the errors of a route are written.
enum class ApiStyle : uint8_t { kOpenAi, kAnthropic };

// HttpCall: one authenticated request, as handlers get it. Plain data; all copies share the one answer.
struct HttpCall {
  HttpRequest http;
  std::string id;  // X-Request-Id: the client's, or one of ours
  std::string tenant;
  ApiStyle style = ApiStyle::kOpenAi;
  std::shared_ptr<ResponseWriter> writer;
  RequestClass request_class = RequestClass::kOnline;
  // Called once, when the first token of the answer is there; may be empty.
  std::function<void()> on_first_token;
};

// HttpRoute: a line of the front's table. `path` as HttpServer::Handle takes it.
struct HttpRoute {
  std::string_view method, path;
  std::function<void(HttpCall)> handler;
  ApiStyle style = ApiStyle::kOpenAi;
};

// HttpFront: the HTTP half of the front door: routes, authentication, OpenAI's JSON and server-sent events.
// Owns one thread, which sends `: ping` comments on streams that have nothing to say. Thread-safe.
class HttpFront {
 public:
  struct Dependencies {  // borrowed, except where shared
    const Config* config = nullptr;
    std::shared_ptr<const TextModel> text;
    const Authenticator* auth = nullptr;
    RequestRunner* runner = nullptr;
    GatewayProbe* probe = nullptr;
    WorkPool* pool = nullptr;
    TenantLimits* limits = nullptr;
    absl::Duration ping_interval = absl::Seconds(10);
  };

  explicit HttpFront(Dependencies deps);
  ~HttpFront();

  // All of the front's own routes.
  void AddRoutes(HttpServer& server);
  // One more route, its handler behind the API keys. Every route but the short list of open ones (metrics,
  // probes, version) goes through here. Before the server starts.
  void Add(HttpServer& server, HttpRoute route);
  // A request of our own, from inside the process, to one of the endpoints that batches may name
  // (BatchUrls()); as if it had come over HTTP, for a tenant that is known.
  void Serve(HttpCall call);
  // After the server was shut down. Idempotent.
  void Stop();

  // Whose API key a request carries. Errors: Unauthenticated.
  absl::StatusOr<std::string> TenantOf(const HttpRequest& http) const;

  // For handlers. Refuse answers and counts an error of a request that never reached the runner; Reply sends
  // 200 with a JSON body; InPool runs `work` in the pool as one request of the tenant's, or refuses with
  // 429.
  void Refuse(const HttpCall& call, const ApiError& error);
  void Reply(const HttpCall& call, const OrderedJson& body);
  void InPool(const HttpCall& call, std::function<void()> work);

 private:
  void ChatCompletion(HttpCall call);
  void Completion(HttpCall call);
  void Models(HttpCall call);
  void Tokenize(HttpCall call);
  void Detokenize(HttpCall call);
  void ApplyTemplate(HttpCall call);
  void Embeddings(HttpCall call);
  void Responses(HttpCall call);
  void Messages(HttpCall call);
  void CountTokens(HttpCall call);
  void OpenAi(HttpCall call, OrError<InferenceRequest> (*parse)(std::string_view));
  // The model that the request asks for, if it can do what is asked; else the call is refused, by the
  // client's `names`.
  std::optional<v1::ModelIdentity> ModelFor(const HttpCall& call, const InferenceRequest& request,
                                            const FieldNames& names = {});
  void SendError(const HttpCall& call, const ApiError& error);
  // Starts a request whose fields are checked.
  void Run(HttpCall call, InferenceRequest request, std::unique_ptr<AnswerEncoder> encoder);
  void PingLoop();

  const Dependencies deps_;
  const int64_t started_;  // Unix seconds
  std::mutex mu_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::vector<std::weak_ptr<HttpAnswer>> streams_;
  std::thread pinger_;
};

}  // namespace tidepool
