#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/probe.h"
#include "server/http/http_server.h"

namespace tidepool {

// What /readyz says. Ready when every check passes; a check is {name, "" or why not}.
struct ReadyReport {
  std::vector<std::pair<std::string, std::string>> checks;

  bool ready() const;
  // {"status":"ready"|"not ready","reason":"...","checks":{"name":"ok"|why}}
  std::string ToJson() const;
};

// Adds GET /livez (200 while the process answers), /readyz and its alias /health (200, or 503 with the
// reason). `ready` is used from the server's threads until it is shut down, and must not block.
void AddHealthRoutes(HttpServer& server, std::function<ReadyReport()> ready);

// Adds those, and GET /metrics (Prometheus text 0.0.4); `metrics` is used as `ready` is.
void AddAdminRoutes(HttpServer& server, MetricRegistry& metrics, std::function<ReadyReport()> ready);

// A server with only the admin routes, for the processes that serve no other HTTP. Errors: as
// HttpServer::Start.
absl::StatusOr<std::unique_ptr<HttpServer>> StartAdminServer(std::string listen, MetricRegistry& metrics,
                                                             std::function<ReadyReport()> ready);

}  // namespace tidepool
