#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/gateway/openai_request.h"
#include "server/gateway/request_runner.h"
#include "server/http/http_server.h"

namespace tidepool {

class HttpAnswer;

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
    absl::Duration ping_interval = absl::Seconds(10);
  };

  explicit HttpFront(Dependencies deps);
  ~HttpFront();

  void AddRoutes(HttpServer& server);
  // After the server was shut down. Idempotent.
  void Stop();

 private:
  using Handler = std::function<void(HttpRequest, std::string tenant, std::shared_ptr<ResponseWriter>)>;

  // Adds a route that asks for an API key, where keys are configured: every route goes through here that is
  // not on the short list of open ones.
  void Protected(HttpServer& server, std::string_view method, std::string_view path, Handler handler);
  void Completion(HttpRequest http, std::string tenant, std::shared_ptr<ResponseWriter> writer, bool chat);
  void Models(const HttpRequest& http, ResponseWriter& writer, bool one);
  void Tokenize(HttpRequest http, std::shared_ptr<ResponseWriter> writer);
  void Detokenize(HttpRequest http, std::shared_ptr<ResponseWriter> writer);
  void ApplyTemplate(HttpRequest http, std::shared_ptr<ResponseWriter> writer);
  // Runs `work` in the pool, or answers 429.
  void InPool(std::string id, std::shared_ptr<ResponseWriter> writer, std::function<void()> work);
  // Answers and counts an error of a request that never reached the runner.
  void Refuse(ResponseWriter& writer, const std::string& id, const ApiError& error);
  void PingLoop();

  const Dependencies deps_;
  std::mutex mu_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::vector<std::weak_ptr<HttpAnswer>> streams_;
  std::thread pinger_;
};

}  // namespace tidepool
