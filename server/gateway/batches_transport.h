#pragma once

#include <memory>
#include <string>

#include "server/batch/transport.h"

namespace tidepool {

class HttpFront;

// FrontTransport: lines answered by the gateway's own HTTP front, in the process: the same checks, the same
// JSON, as requests of class batch. Thread-safe.
class FrontTransport final : public BatchTransport {
 public:
  // `front` is borrowed.
  FrontTransport(HttpFront* front, std::string tenant) : front_(front), tenant_(std::move(tenant)) {}

  std::shared_ptr<InFlight> Send(BatchCall call, Callbacks callbacks) override;

 private:
  HttpFront* const front_;
  const std::string tenant_;
};

}  // namespace tidepool
