#pragma once

#include <map>
#include <string>
#include <string_view>

#include "server/gateway/batches_service.h"
#include "server/gateway/http_front.h"

namespace tidepool {

// FilesFront: /v1/files as OpenAI has it: upload, list, retrieve, content, delete. Thread-safe; every call
// that touches the disk runs on the service's threads.
class FilesFront {
 public:
  // Both borrowed. `config`: the limits.
  FilesFront(HttpFront* front, BatchesService* service, const GatewayConfig& config);
  void AddRoutes(HttpServer& server);

 private:
  // Where an upload's body goes; null: nowhere, and Upload says why.
  std::shared_ptr<HttpBodySink> Open(const HttpRequest& head);
  void Upload(HttpCall call);
  void List(HttpCall call);
  void One(HttpCall call);
  void Delete(HttpCall call);
  void SendContent(const HttpCall& call, const StoredFile& file);

  HttpFront* const front_;
  BatchesService* const service_;
  const uint64_t upload_bytes_max_;
  const size_t chunk_bytes_;
};

// What FilesFront and BatchesFront share.

// Runs `work` on the service's threads, or says why not: files and batches are off, or too much is queued.
void InService(HttpFront& front, BatchesService& service, const HttpCall& call, std::function<void()> work);
// NotFound, ResourceExhausted, ... of the service as a client sees them; `param`: of what is not found.
ApiError ServiceError(const absl::Status& status, std::string_view param);
// Query parameters, decoded; the last of a name counts.
std::map<std::string, std::string, std::less<>> QueryOf(const HttpRequest& http);

// One page of a list.
struct PageRequest {
  std::string after;  // id of the last entry of the page before; empty: the first page
  size_t limit = 20;
};
OrError<PageRequest> ReadPage(const HttpRequest& http, size_t limit_default, size_t limit_max);
// {"object": "list", "data", "first_id", "last_id", "has_more"}, of entries from `after` on.
OrError<OrderedJson> PageJson(const std::vector<OrderedJson>& entries, const PageRequest& page);

}  // namespace tidepool
