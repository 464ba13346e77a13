#include "server/batch/journal.h"

#include "absl/strings/str_cat.h"
#include "base/small_file.h"
#include "base/status.h"
#include "server/batch/file_io.h"
#include "server/gateway/json.h"

namespace tidepool {
namespace {

constexpr uint64_t kJournalBytesMax = 64 << 10;
constexpr int kVersion = 1;

std::string ToText(const RunIdentity& identity) {
  OrderedJson json;
  json["version"] = kVersion;
  json["input_sha256"] = identity.input_sha256;
  json["input_bytes"] = identity.input_bytes;
  json["lines"] = identity.lines;
  return DumpJson(json) + "\n";
}

absl::StatusOr<RunIdentity> FromText(std::string_view text) {
  TP_ASSIGN_OR_RETURN(const OrderedJson json, ParseJson(text));
  const auto number = [&](const char* key) -> const uint64_t* {
    const auto it = json.find(key);
    return it == json.end() ? nullptr : it->get_ptr<const uint64_t*>();
  };
  const auto digest = json.find("input_sha256");
  const uint64_t *version = number("version"), *bytes = number("input_bytes"), *lines = number("lines");
  if (version == nullptr || bytes == nullptr || lines == nullptr || digest == json.end() ||
      !digest->is_string()) {
    return absl::InvalidArgumentError("is no journal of a batch run");
  }
  if (*version != kVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat("has version ", *version, "; this program knows ", kVersion));
  }
  return RunIdentity{digest->get<std::string>(), *bytes, *lines};
}

}  // namespace

absl::StatusOr<bool> ClaimOutput(const std::string& journal_path, const RunIdentity& identity,
                                 bool output_empty) {
  const auto text = ReadSmallFile(journal_path, kJournalBytesMax);
  if (text.ok()) {
    const auto before = FromText(*text);
    if (!before.ok()) return Annotate(before.status(), journal_path);
    if (*before == identity) return true;
    if (!output_empty) {
      return absl::FailedPreconditionError(
          absl::StrCat(journal_path, ": the output was begun for another input (", before->lines,
                       " lines, sha256 ", before->input_sha256.substr(0, 12), "; now ", identity.lines,
                       " lines, ", identity.input_sha256.substr(0, 12),
                       "); give the input that it was begun with, or another output"));
    }
  } else if (!absl::IsNotFound(text.status())) {
    return text.status();
  } else if (!output_empty) {
    return absl::FailedPreconditionError(
        absl::StrCat("the output exists and ", journal_path,
                     ", which would say what it belongs to, does not; give another output or remove it"));
  }
  TP_RETURN_IF_ERROR(WriteFileAtomically(journal_path, ToText(identity)));
  return false;
}

}  // namespace tidepool
