#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/bench/http_client.h"
#include "server/bench/load_runner.h"

namespace tidepool {

struct ServedModel {
  std::string id;
  std::string owned_by;
  uint64_t max_model_len = 0;  // 0: not told
};

// What GET /v1/models lists. Errors: Unavailable (no answer), FailedPrecondition (an answer, but not a list
// of models; the message has the server's).
absl::StatusOr<std::vector<ServedModel>> ListModels(HttpClient& client, const HttpUrl& url,
                                                    const HttpHeaders& headers);

// How many tokens the server makes of the writer's words. Sends two short requests of `shape` and reads
// usage.prompt_tokens.
struct WordTokens {
  double per_word = 1;
  double overhead = 0;  // of each prompt: a template, a begin token
};
// nullopt: the server does not say. Errors: as a request's.
absl::StatusOr<std::optional<WordTokens>> MeasureWords(HttpClient& client, const RequestShape& shape);

}  // namespace tidepool
