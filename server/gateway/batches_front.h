#pragma once

#include "server/gateway/batches_service.h"
#include "server/gateway/http_front.h"

namespace tidepool {

// BatchesFront: /v1/batches as OpenAI has it: create, retrieve, list, cancel. Thread-safe.
class BatchesFront {
 public:
  // Both borrowed.
  BatchesFront(HttpFront* front, BatchesService* service) : front_(front), service_(service) {}
  void AddRoutes(HttpServer& server);

 private:
  void Create(HttpCall call);
  void List(HttpCall call);
  void One(HttpCall call);
  void Cancel(HttpCall call);

  HttpFront* const front_;
  BatchesService* const service_;
};

// The body of POST /v1/batches. Errors: ApiError naming the field. Pure.
OrError<BatchesService::NewBatch> ParseNewBatch(std::string_view body);

}  // namespace tidepool
