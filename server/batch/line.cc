#include "server/batch/line.h"

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr std::array<std::string_view, 4> kUrls = {"/v1/chat/completions", "/v1/completions",
                                                   "/v1/embeddings", "/v1/responses"};

size_t CodePoints(std::string_view utf8) {
  return static_cast<size_t>(std::ranges::count_if(utf8, [](char c) { return (c & 0xC0) != 0x80; }));
}

const OrderedJson* Member(const OrderedJson& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

// The member where it is a string; null for all else.
const std::string* StringMember(const OrderedJson& object, const char* key) {
  const OrderedJson* value = Member(object, key);
  return value == nullptr ? nullptr : value->get_ptr<const std::string*>();
}

std::string OneOf(std::span<const std::string_view> names) {
  std::string out;
  for (const std::string_view name : names) absl::StrAppend(&out, out.empty() ? "" : ", ", std::string(name));
  return out;
}

// Everything but custom_id.
std::optional<BatchError> ReadRequest(OrderedJson& object, BatchLine& line) {
  const auto wrong = [](const char* param, std::string what) {
    return BatchError{"invalid_line", absl::StrCat(param, ": ", what), param};
  };
  const std::string* method = StringMember(object, "method");
  if (method == nullptr || *method != "POST") return wrong("method", "must be \"POST\"");
  const std::string* url = StringMember(object, "url");
  if (url == nullptr || std::ranges::find(kUrls, *url) == kUrls.end()) {
    return BatchError{"invalid_url", absl::StrCat("url: must be one of ", OneOf(kUrls)), "url"};
  }
  const OrderedJson* body = Member(object, "body");
  if (body == nullptr || !body->is_object())
    return wrong("body", "must be an object, the request's own JSON");
  const OrderedJson* stream = Member(*body, "stream");
  if (stream != nullptr && (!stream->is_boolean() || stream->get<bool>())) {
    return wrong("body.stream", "a batch's answers are not streamed; leave it out");
  }
  line.url = *url;
  line.body = std::move(object["body"]);
  return std::nullopt;
}

OrderedJson Head(std::string_view custom_id) {
  OrderedJson out;
  out["id"] = "batch_req_" + RandomHexId();
  out["custom_id"] = custom_id.empty() ? OrderedJson() : OrderedJson(std::string(custom_id));
  return out;
}

}  // namespace

std::span<const std::string_view> BatchUrls() { return kUrls; }

BatchLine ParseBatchLine(std::string_view text, uint64_t number) {
  BatchLine line;
  auto json = ParseJson(text);
  if (!json.ok()) {
    line.error = BatchError{"invalid_json_line", std::string(json.status().message()), "", number};
    return line;
  }
  if (!json->is_object()) {
    line.error = BatchError{"invalid_json_line", "must be a JSON object", "", number};
    return line;
  }
  const std::string* custom_id = StringMember(*json, "custom_id");
  if (custom_id == nullptr || custom_id->empty() || CodePoints(*custom_id) > kCustomIdCharsMax) {
    line.error =
        BatchError{"invalid_custom_id",
                   absl::StrCat("custom_id: must be a text of 1 to ", kCustomIdCharsMax, " characters"),
                   "custom_id", number};
    return line;
  }
  line.custom_id = *custom_id;
  line.error = ReadRequest(*json, line);
  if (line.error) line.error->line = number;
  return line;
}

std::string FormatAnswer(std::string_view custom_id, int status, std::string_view request_id,
                         std::string_view body) {
  std::string out = DumpJson(Head(custom_id));
  out.pop_back();
  absl::StrAppend(&out, ",\"response\":{\"status_code\":", status,
                  ",\"request_id\":", DumpJson(OrderedJson(std::string(request_id))), ",\"body\":");
  out.append(body);
  out.append("},\"error\":null}\n");
  return out;
}

std::string FormatFailure(std::string_view custom_id, const BatchError& error) {
  OrderedJson out = Head(custom_id);
  out["response"] = nullptr;
  OrderedJson& json = out["error"];
  json["code"] = error.code;
  json["message"] = error.message;
  if (!error.param.empty()) json["param"] = error.param;
  if (error.line != 0) json["line"] = error.line;
  return DumpJson(out) + "\n";
}

absl::StatusOr<DoneLine> ParseDoneLine(std::string_view text) {
  TP_ASSIGN_OR_RETURN(const OrderedJson json, ParseJson(text));
  const absl::Status foreign = absl::InvalidArgumentError("is no line of a batch's output");
  if (!json.is_object() || json.find("response") == json.end() || json.find("error") == json.end()) {
    return foreign;
  }
  DoneLine done;
  if (const std::string* id = StringMember(json, "custom_id")) done.custom_id = *id;
  if (const OrderedJson* response = Member(json, "response"); response != nullptr && response->is_object()) {
    const OrderedJson* status = Member(*response, "status_code");
    done.ok = status != nullptr && status->is_number_unsigned() && status->get<uint64_t>() / 100 == 2;
  }
  if (done.custom_id.empty()) {
    const OrderedJson* error = Member(json, "error");
    const OrderedJson* line = error != nullptr && error->is_object() ? Member(*error, "line") : nullptr;
    if (line == nullptr || !line->is_number_unsigned()) return foreign;
    done.line = line->get<uint64_t>();
  }
  return done;
}

}  // namespace tidepool
