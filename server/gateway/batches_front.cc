#include "server/gateway/batches_front.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "server/gateway/field_reader.h"
#include "server/gateway/files_front.h"

namespace tidepool {
namespace {

constexpr size_t kListDefault = 20, kListMax = 100;  // OpenAI's
constexpr int64_t kTtlSecondsMin = 3600, kTtlSecondsMax = 30 * 24 * 3600;
constexpr std::string_view kCancel = "/cancel";

absl::Status ReadMetadata(const OrderedJson& json, BatchesService::NewBatch& batch) {
  if (!json.is_object()) return FieldError("metadata", "must be an object of texts");
  if (json.size() > kMetadataPairsMax) {
    return FieldError("metadata", absl::StrCat("must have at most ", kMetadataPairsMax, " entries"));
  }
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string() || CountCodePoints(key) > kMetadataKeyChars ||
        CountCodePoints(value.get_ref<const std::string&>()) > kMetadataValueChars) {
      return FieldError("metadata",
                        absl::StrCat("keys must be texts of at most ", kMetadataKeyChars,
                                     " characters, values texts of at most ", kMetadataValueChars));
    }
    batch.metadata.emplace_back(key, value.get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status ReadExpiry(const OrderedJson& json, BatchesService::NewBatch& batch) {
  if (!json.is_object()) return FieldError("output_expires_after", "must be an object");
  const FieldReader fields(json);
  TP_ASSIGN_OR_RETURN(const auto anchor, fields.String("anchor", 64));
  if (anchor != "created_at") return FieldError("output_expires_after.anchor", "must be created_at");
  TP_ASSIGN_OR_RETURN(const auto seconds, fields.Int("seconds", kTtlSecondsMin, kTtlSecondsMax));
  if (!seconds) return FieldError("output_expires_after.seconds", "is missing");
  batch.output_ttl_seconds = *seconds;
  return absl::OkStatus();
}

absl::Status ReadNewBatch(const OrderedJson& json, BatchesService::NewBatch& batch) {
  const FieldReader fields(json);
  TP_ASSIGN_OR_RETURN(const auto input, fields.String("input_file_id", 64));
  if (!input || input->empty()) return FieldError("input_file_id", "is missing: the id of an uploaded file");
  batch.input_file_id = *input;
  TP_ASSIGN_OR_RETURN(const auto endpoint, fields.String("endpoint", 64));
  const auto urls = BatchUrls();
  if (std::ranges::find(urls, endpoint.value_or("")) == urls.end()) {
    return FieldError(
        "endpoint", "must be one of " + absl::StrJoin(urls, ", ", [](std::string* out, std::string_view url) {
                      out->append(url);
                    }));
  }
  batch.endpoint = *endpoint;
  TP_ASSIGN_OR_RETURN(const auto window, fields.String("completion_window", 64));
  if (window != "24h") return FieldError("completion_window", "must be 24h");
  if (const OrderedJson* metadata = fields.Find("metadata"))
    TP_RETURN_IF_ERROR(ReadMetadata(*metadata, batch));
  if (const OrderedJson* expiry = fields.Find("output_expires_after"))
    TP_RETURN_IF_ERROR(ReadExpiry(*expiry, batch));
  return absl::OkStatus();
}

}  // namespace

OrError<BatchesService::NewBatch> ParseNewBatch(std::string_view body) {
  const auto json = ParseJson(body);
  if (!json.ok()) return MakeError(errors::kInvalidJson, std::string(json.status().message()));
  if (!json->is_object()) return MakeError(errors::kInvalidJson, "the body must be a JSON object");
  BatchesService::NewBatch batch;
  if (const absl::Status status = ReadNewBatch(*json, batch); !status.ok()) {
    return FromFieldError(errors::kInvalidRequest, status);
  }
  return batch;
}

void BatchesFront::AddRoutes(HttpServer& server) {
  const auto own = [this](void (BatchesFront::*handler)(HttpCall)) {
    return [this, handler](HttpCall call) { (this->*handler)(std::move(call)); };
  };
  front_->Add(server, {"POST", "/v1/batches", own(&BatchesFront::Create)});
  front_->Add(server, {"GET", "/v1/batches", own(&BatchesFront::List)});
  front_->Add(server, {"GET", "/v1/batches/{id}", own(&BatchesFront::One)});
  front_->Add(server, {"POST", "/v1/batches/{id}", own(&BatchesFront::Cancel)});
}

void BatchesFront::Create(HttpCall call) {
  auto parsed = ParseNewBatch(call.http.body);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return front_->Refuse(call, *error);
  InService(*front_, *service_, call, [this, call, batch = std::get<BatchesService::NewBatch>(parsed)] {
    const auto record = service_->Create(call.tenant, batch);
    if (absl::IsAborted(record.status())) {
      return front_->Refuse(
          call, MakeRetryable(errors::kTooManyRequests, std::string(record.status().message()), 60));
    }
    if (absl::IsFailedPrecondition(record.status())) {
      return front_->Refuse(call, MakeError(errors::kStorageLimit, std::string(record.status().message())));
    }
    if (!record.ok()) return front_->Refuse(call, ServiceError(record.status(), "input_file_id"));
    front_->Reply(call, BatchJson(*record));
  });
}

void BatchesFront::List(HttpCall call) {
  auto page = ReadPage(call.http, kListDefault, kListMax);
  if (const auto* error = std::get_if<ApiError>(&page)) return front_->Refuse(call, *error);
  InService(*front_, *service_, call, [this, call, page = std::get<PageRequest>(page)] {
    std::vector<OrderedJson> entries;
    for (const BatchRecord& record : service_->List(call.tenant)) entries.push_back(BatchJson(record));
    const auto json = PageJson(entries, page);
    if (const auto* error = std::get_if<ApiError>(&json)) return front_->Refuse(call, *error);
    front_->Reply(call, std::get<OrderedJson>(json));
  });
}

void BatchesFront::One(HttpCall call) {
  InService(*front_, *service_, call, [this, call] {
    const auto record = service_->Get(call.tenant, call.http.param);
    if (!record.ok()) return front_->Refuse(call, ServiceError(record.status(), "id"));
    front_->Reply(call, BatchJson(*record));
  });
}

void BatchesFront::Cancel(HttpCall call) {
  std::string id = call.http.param;
  if (!id.ends_with(kCancel)) {
    return front_->Refuse(call,
                          MakeError(errors::kNotFound,
                                    "there is nothing to POST to but /v1/batches and /v1/batches/ID/cancel"));
  }
  id.resize(id.size() - kCancel.size());
  InService(*front_, *service_, call, [this, call, id] {
    const auto record = service_->Cancel(call.tenant, id);
    if (!record.ok()) return front_->Refuse(call, ServiceError(record.status(), "id"));
    front_->Reply(call, BatchJson(*record));
  });
}

}  // namespace tidepool
