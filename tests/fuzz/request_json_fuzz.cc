// The bodies of the API's requests: every reader gives a request whose numbers are in range, or an error of
// the catalogue that is one line. The first byte chooses the reader.
#include <algorithm>
#include <cmath>

#include "server/gateway/embeddings.h"
#include "server/gateway/messages_request.h"
#include "server/gateway/openai_request.h"
#include "server/gateway/responses_request.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

void CheckError(const ApiError& error) {
  TP_CHECK(error.status == 400);
  TP_CHECK(!error.message.empty() && error.message.size() < 4096);
  const auto catalogue = ErrorCatalogue();
  TP_CHECK(std::ranges::any_of(catalogue, [&](const ErrorKind& kind) { return kind.code == error.code; }));
  // Its body can be written whatever the client sent.
  TP_CHECK(ParseJson(ErrorBody(error)).ok());
}

template <typename T>
bool In(const std::optional<T>& value, double min, double max) {
  return !value || (std::isfinite(static_cast<double>(*value)) && *value >= min && *value <= max);
}

void CheckRequest(const InferenceRequest& r) {
  TP_CHECK(r.n >= 1 && r.best_of >= r.n && r.best_of <= kChoicesMax);
  TP_CHECK(r.choices() >= 1 && r.choices() <= 16 * kChoicesMax);
  TP_CHECK(In(r.temperature, 0, 2) && In(r.top_p, 0, 1) && In(r.min_p, 0, 1) && In(r.top_k, 0, 1 << 30));
  TP_CHECK(In(r.repetition_penalty, 0, kRepetitionPenaltyMax));
  TP_CHECK(In(std::optional(r.typical_p), 0, 1));
  TP_CHECK(In(std::optional(r.presence_penalty), -kPenaltyMax, kPenaltyMax));
  TP_CHECK(In(std::optional(r.frequency_penalty), -kPenaltyMax, kPenaltyMax));
  TP_CHECK(r.stop.size() <= kStopStringsMax && r.stop_token_ids.size() <= kStopTokenIdsMax);
  TP_CHECK(r.logit_bias.size() <= kLogitBiasCountMax && r.allowed_token_ids.size() <= kAllowedTokenIdsMax);
  TP_CHECK(r.top_logprobs >= -1 && r.top_logprobs <= kTopLogprobsMax);
  TP_CHECK(r.prompt_logprobs >= -1 && r.prompt_logprobs <= kTopLogprobsMax);
  TP_CHECK(r.tools.tools.size() <= kToolsMax && r.metadata.size() <= kMetadataPairsMax);
  for (const auto& [id, bias] : r.logit_bias) TP_CHECK(id >= 0 && std::abs(bias) <= kLogitBiasAbsMax);
  for (const int32_t id : r.stop_token_ids) TP_CHECK(id >= 0);
  for (const Tool& tool : r.tools.tools)
    TP_CHECK(!tool.name.empty() && tool.name.size() <= kToolNameBytesMax);
}

template <typename Parsed, typename Check>
void Judge(const Parsed& parsed, Check check) {
  if (const auto* error = std::get_if<ApiError>(&parsed)) return CheckError(*error);
  check(std::get<0>(parsed));
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(request_json) {
  if (input.empty()) return;
  const char which = input.front();
  const std::string_view body = input.substr(1);
  const auto nothing = [](const auto&) {};
  switch (static_cast<unsigned char>(which) % 9) {
    case 0:
      return Judge(ParseChatCompletion(body), CheckRequest);
    case 1:
      return Judge(ParseCompletion(body), CheckRequest);
    case 2:
      return Judge(ParseTokenize(body), nothing);
    case 3:
      return Judge(ParseDetokenize(body), nothing);
    case 4:
      return Judge(ParseApplyTemplate(body), nothing);
    case 5:
      return Judge(ParseResponses(body), [](const ResponsesRequest& r) { CheckRequest(r.request); });
    case 6:
      return Judge(ParseMessages(body), [](const MessagesRequest& r) { CheckRequest(r.request); });
    case 7:
      return Judge(ParseCountTokens(body), nothing);
    default:
      return Judge(ParseEmbeddings(body), nothing);
  }
}

}  // namespace tidepool
