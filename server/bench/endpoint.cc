#include "server/bench/endpoint.h"

#include <simdjson.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/bench/answer_reader.h"

namespace tidepool {
namespace {

namespace dom = simdjson::dom;

constexpr size_t kFewWords = 16, kManyWords = 256;

absl::StatusOr<std::optional<uint64_t>> PromptTokens(HttpClient& client, const RequestShape& shape,
                                                     size_t words) {
  Turn turn;
  turn.messages = {{"user", PromptWriter::SomeWords(Mix64(words), words)}};
  turn.output_tokens = 1;
  RequestShape whole = shape;
  whole.extra["stream"] = false;
  whole.extra["stream_options"] = nullptr;
  OutboundCall call;
  call.url = shape.url;
  call.method = "POST";
  call.target = shape.target;
  call.headers = shape.headers;
  call.headers.emplace_back("Content-Type", "application/json");
  call.timeout = shape.timeout;
  call.body = RequestBody(whole, {}, turn);
  TP_ASSIGN_OR_RETURN(const HttpClient::Reply reply, client.Fetch(std::move(call)));
  if (reply.status != 200) {
    return absl::FailedPreconditionError(
        absl::StrCat("POST ", shape.target, ": HTTP ", reply.status, ": ", ErrorMessageOf(reply.body)));
  }
  dom::parser parser;
  uint64_t tokens = 0;
  if (parser.parse(reply.body)["usage"]["prompt_tokens"].get(tokens) != simdjson::SUCCESS || tokens == 0) {
    return std::optional<uint64_t>();
  }
  return std::optional<uint64_t>(tokens);
}

}  // namespace

absl::StatusOr<std::vector<ServedModel>> ListModels(HttpClient& client, const HttpUrl& url,
                                                    const HttpHeaders& headers) {
  OutboundCall call;
  call.url = url;
  call.target = url.path + "/v1/models";
  call.headers = headers;
  TP_ASSIGN_OR_RETURN(const HttpClient::Reply reply, client.Fetch(std::move(call)));
  if (reply.status != 200) {
    return absl::FailedPreconditionError(
        absl::StrCat("GET /v1/models: HTTP ", reply.status, ": ", ErrorMessageOf(reply.body)));
  }
  dom::parser parser;
  dom::array list;
  if (parser.parse(reply.body)["data"].get(list) != simdjson::SUCCESS) {
    return absl::FailedPreconditionError("GET /v1/models: the answer is no list of models");
  }
  std::vector<ServedModel> models;
  for (const dom::element element : list) {
    ServedModel model;
    std::string_view id, owner;
    if (element["id"].get(id) != simdjson::SUCCESS) continue;
    model.id = id;
    if (element["owned_by"].get(owner) == simdjson::SUCCESS) model.owned_by = owner;
    if (element["max_model_len"].get(model.max_model_len) != simdjson::SUCCESS) model.max_model_len = 0;
    models.push_back(std::move(model));
  }
  return models;
}

absl::StatusOr<std::optional<WordTokens>> MeasureWords(HttpClient& client, const RequestShape& shape) {
  TP_ASSIGN_OR_RETURN(const auto few, PromptTokens(client, shape, kFewWords));
  if (!few) return std::optional<WordTokens>();
  TP_ASSIGN_OR_RETURN(const auto many, PromptTokens(client, shape, kManyWords));
  if (!many || *many <= *few) return std::optional<WordTokens>();
  WordTokens out;
  out.per_word = static_cast<double>(*many - *few) / (kManyWords - kFewWords);
  out.overhead = std::max(0.0, static_cast<double>(*few) - out.per_word * kFewWords);
  return std::optional<WordTokens>(out);
}

}  // namespace tidepool
