#include "server/http/admin_server.h"

#include <nlohmann/json.hpp>

#include "server/http/origin_policy.h"

namespace tidepool {

bool ReadyReport::ready() const {
  for (const auto& [name, why_not] : checks) {
    if (!why_not.empty()) return false;
  }
  return true;
}

std::string ReadyReport::ToJson() const {
  nlohmann::ordered_json json, by_name = nlohmann::ordered_json::object();
  std::string reason;
  for (const auto& [name, why_not] : checks) {
    by_name[name] = why_not.empty() ? "ok" : why_not;
    if (!why_not.empty()) reason += (reason.empty() ? "" : "; ") + name + ": " + why_not;
  }
  json["status"] = ready() ? "ready" : "not ready";
  json["reason"] = reason;
  json["checks"] = by_name;
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

void AddAdminRoutes(HttpServer& server, MetricRegistry& metrics, std::function<ReadyReport()> ready) {
  server.Handle("GET", "/metrics", [&metrics](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
    writer->Send(200, {{"Content-Type", "text/plain; version=0.0.4; charset=utf-8"}}, metrics.Render());
  });
  AddHealthRoutes(server, std::move(ready));
}

void AddHealthRoutes(HttpServer& server, std::function<ReadyReport()> ready) {
  server.Handle("GET", "/livez", [](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
    writer->Send(200, {{"Content-Type", "application/json"}}, "{\"status\":\"alive\"}\n");
  });
  auto readyz = [ready = std::move(ready)](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
    const ReadyReport report = ready();
    HttpHeaders headers = {{"Content-Type", "application/json"}};
    if (!report.ready()) headers.emplace_back("Retry-After", "1");
    writer->Send(report.ready() ? 200 : 503, std::move(headers), report.ToJson());
  };
  server.Handle("GET", "/readyz", readyz);
  server.Handle("GET", "/health", readyz);
}

absl::StatusOr<std::unique_ptr<HttpServer>> StartAdminServer(std::string listen, MetricRegistry& metrics,
                                                             std::function<ReadyReport()> ready) {
  HttpServer::Options options;
  options.listen = std::move(listen);
  // Scrapers and probes only.
  options.limits.connections_max = 64;
  options.limits.body_bytes_max = 64u << 10;
  OriginPolicy::Options origins;
  origins.loopback = options.listen.starts_with("127.") || options.listen.starts_with("localhost:") ||
                     options.listen.starts_with("[::1]:");
  options.filter = [policy = OriginPolicy(std::move(origins))](HttpRequest& request) {
    return policy.Filter(request);
  };
  auto server = std::make_unique<HttpServer>(std::move(options));
  AddAdminRoutes(*server, metrics, std::move(ready));
  if (auto status = server->Start(); !status.ok()) return status;
  return server;
}

}  // namespace tidepool
