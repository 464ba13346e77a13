#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/batch/transport.h"
#include "server/bench/http_client.h"

namespace tidepool {

// HttpBatchTransport: lines answered by an OpenAI-compatible endpoint over HTTP/1.1, TLS where the URL says
// so. It cannot know when a prompt is computed: `ahead` is never called, and a line that others wait for is
// waited for to its end.
class HttpBatchTransport final : public BatchTransport {
 public:
  struct Options {
    // As http://host:8000 or http://host:8000/v1; a trailing /v1 is the lines' own.
    std::string endpoint;
    std::string api_key;                         // empty: none is sent
    absl::Duration timeout = absl::Minutes(30);  // of one line, whatever it has to wait for
    std::string ca_file;                         // PEM; empty: the system's
  };

  // Errors: InvalidArgument (the URL).
  static absl::StatusOr<std::unique_ptr<HttpBatchTransport>> Create(Options options);

  // Whether the endpoint answers and takes our key. Errors: Unavailable (nobody answers yet),
  // PermissionDenied (401 or 403). Other answers are as good as any: not every server has /v1/models.
  absl::Status Check(absl::Duration timeout);

  std::shared_ptr<InFlight> Send(BatchCall call, Callbacks callbacks) override;

 private:
  HttpBatchTransport(Options options, HttpUrl url);
  HttpHeaders Headers() const;

  const Options options_;
  const HttpUrl url_;
  HttpClient client_;
};

}  // namespace tidepool
