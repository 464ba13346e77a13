#include "server/gateway/batches_record.h"

#include <array>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

constexpr int kVersion = 1;
constexpr size_t kTextMax = 64 << 10;
constexpr std::array<std::string_view, 8> kNames = {"validating", "in_progress", "finalizing", "completed",
                                                    "failed",     "expired",     "cancelling", "cancelled"};

OrderedJson TimeJson(int64_t seconds) { return seconds == 0 ? OrderedJson() : OrderedJson(seconds); }
OrderedJson IdJson(const std::string& id, bool shown) { return shown ? OrderedJson(id) : OrderedJson(); }

OrderedJson ErrorsJson(const std::vector<BatchError>& errors) {
  OrderedJson data = OrderedJson::array();
  for (const BatchError& error : errors) {
    OrderedJson one;
    one["code"] = error.code;
    one["message"] = error.message;
    one["param"] = error.param.empty() ? OrderedJson() : OrderedJson(error.param);
    one["line"] = error.line == 0 ? OrderedJson() : OrderedJson(error.line);
    data.push_back(std::move(one));
  }
  return data;
}

OrderedJson MetadataJson(const BatchRecord& record) {
  if (record.metadata.empty()) return nullptr;
  OrderedJson out = OrderedJson::object();
  for (const auto& [key, value] : record.metadata) out[key] = value;
  return out;
}

absl::Status ReadErrors(const OrderedJson& json, std::vector<BatchError>& errors) {
  if (!json.is_array()) return absl::DataLossError("errors: is no list");
  for (const OrderedJson& one : json) {
    if (!one.is_object()) return absl::DataLossError("errors: holds no objects");
    const FieldReader fields(one);
    BatchError error;
    TP_ASSIGN_OR_RETURN(const auto code, fields.String("code", kTextMax));
    TP_ASSIGN_OR_RETURN(const auto message, fields.String("message", kTextMax));
    TP_ASSIGN_OR_RETURN(const auto param, fields.String("param", kTextMax));
    TP_ASSIGN_OR_RETURN(const auto line, fields.Int("line", 0, INT64_MAX));
    errors.push_back({code.value_or(""), message.value_or(""), param.value_or(""),
                      static_cast<uint64_t>(line.value_or(0))});
  }
  return absl::OkStatus();
}

// Every member with its name, for both ways.
template <typename Record, typename Text, typename Time, typename Count>
void ForEachField(Record& r, Text text, Time time, Count count) {
  text("id", r.id);
  text("endpoint", r.endpoint);
  text("input_file_id", r.input_file_id);
  text("output_id", r.output_id);
  text("error_id", r.error_id);
  time("created_at", r.created_at);
  time("created_ns", r.created_ns);
  time("expires_at", r.expires_at);
  time("in_progress_at", r.in_progress_at);
  time("finalizing_at", r.finalizing_at);
  time("completed_at", r.completed_at);
  time("failed_at", r.failed_at);
  time("expired_at", r.expired_at);
  time("cancelling_at", r.cancelling_at);
  time("cancelled_at", r.cancelled_at);
  time("output_ttl_seconds", r.output_ttl_seconds);
  count("total", r.total);
  count("completed", r.completed);
  count("failed", r.failed);
}

}  // namespace

std::string_view BatchStatusName(BatchStatus status) { return kNames[static_cast<size_t>(status)]; }

bool IsTerminal(BatchStatus status) {
  return status == BatchStatus::kCompleted || status == BatchStatus::kFailed ||
         status == BatchStatus::kExpired || status == BatchStatus::kCancelled;
}

OrderedJson BatchJson(const BatchRecord& r) {
  OrderedJson out;
  out["id"] = r.id;
  out["object"] = "batch";
  out["endpoint"] = r.endpoint;
  out["errors"] = nullptr;
  if (!r.errors.empty()) out["errors"] = {{"object", "list"}, {"data", ErrorsJson(r.errors)}};
  out["input_file_id"] = r.input_file_id;
  out["completion_window"] = "24h";
  out["status"] = BatchStatusName(r.status);
  out["output_file_id"] = IdJson(r.output_id, r.output_shown);
  out["error_file_id"] = IdJson(r.error_id, r.error_shown);
  out["created_at"] = r.created_at;
  out["in_progress_at"] = TimeJson(r.in_progress_at);
  out["expires_at"] = TimeJson(r.expires_at);
  out["finalizing_at"] = TimeJson(r.finalizing_at);
  out["completed_at"] = TimeJson(r.completed_at);
  out["failed_at"] = TimeJson(r.failed_at);
  out["expired_at"] = TimeJson(r.expired_at);
  out["cancelling_at"] = TimeJson(r.cancelling_at);
  out["cancelled_at"] = TimeJson(r.cancelled_at);
  out["request_counts"] = {{"total", r.total}, {"completed", r.completed}, {"failed", r.failed}};
  out["metadata"] = MetadataJson(r);
  return out;
}

std::string SerialiseBatch(const BatchRecord& r) {
  OrderedJson out;
  out["version"] = kVersion;
  out["status"] = BatchStatusName(r.status);
  const auto put = [&](const char* name, const auto& value) { out[name] = value; };
  ForEachField(r, put, put, put);
  out["output_shown"] = r.output_shown;
  out["error_shown"] = r.error_shown;
  out["errors"] = ErrorsJson(r.errors);
  out["metadata"] = MetadataJson(r);
  return DumpJson(out) + "\n";
}

absl::StatusOr<BatchRecord> ParseBatch(std::string_view text) {
  TP_ASSIGN_OR_RETURN(const OrderedJson json, ParseJson(text));
  if (!json.is_object()) return absl::DataLossError("is no object");
  const FieldReader fields(json);
  TP_ASSIGN_OR_RETURN(const auto version, fields.Int("version", 0, INT32_MAX));
  if (version != kVersion) {
    return absl::DataLossError(
        absl::StrCat("version ", version.value_or(0), " where ", kVersion, " is known"));
  }
  BatchRecord r;
  absl::Status status;
  const auto note = [&](const absl::Status& s) {
    if (status.ok()) status = s;
  };
  ForEachField(
      r,
      [&](const char* name, std::string& value) {
        auto read = fields.String(name, kTextMax);
        note(read.status());
        if (read.ok()) value = read->value_or("");
      },
      [&](const char* name, int64_t& value) {
        auto read = fields.Int(name, 0, INT64_MAX);
        note(read.status());
        if (read.ok()) value = read->value_or(0);
      },
      [&](const char* name, uint64_t& value) {
        auto read = fields.Int(name, 0, INT64_MAX);
        note(read.status());
        if (read.ok()) value = static_cast<uint64_t>(read->value_or(0));
      });
  TP_RETURN_IF_ERROR(status);
  TP_ASSIGN_OR_RETURN(const auto name, fields.String("status", 64));
  const auto it = std::find(kNames.begin(), kNames.end(), name.value_or(""));
  if (it == kNames.end()) return absl::DataLossError("status: is none that is known");
  r.status = static_cast<BatchStatus>(it - kNames.begin());
  TP_ASSIGN_OR_RETURN(const auto output_shown, fields.Bool("output_shown"));
  TP_ASSIGN_OR_RETURN(const auto error_shown, fields.Bool("error_shown"));
  r.output_shown = output_shown.value_or(false);
  r.error_shown = error_shown.value_or(false);
  if (const OrderedJson* errors = fields.Find("errors")) TP_RETURN_IF_ERROR(ReadErrors(*errors, r.errors));
  if (const OrderedJson* metadata = fields.Find("metadata"); metadata != nullptr && metadata->is_object()) {
    for (const auto& [key, value] : metadata->items()) {
      if (value.is_string()) r.metadata.emplace_back(key, value.get<std::string>());
    }
  }
  if (r.id.empty() || r.endpoint.empty()) return absl::DataLossError("lacks a field");
  return r;
}

}  // namespace tidepool
