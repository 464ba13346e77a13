#include "server/model/text/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/unicode.h"
#include "server/model/text/utf8.h"

namespace tidepool {

using nlohmann::json;

namespace {

// Unicode normalisation. utf8proc's own driver orders combining marks by adjacent swaps, which is quadratic
// in a run of them: a megabyte of marks would take minutes. So decomposition and ordering are done here, with
// a stable sort per run, and only the (linear) composition is left to utf8proc.
std::string Normalize(const std::string& text, bool compose, bool compat) {
  if (std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; })) {
    return text;
  }
  const auto options =
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compat ? UTF8PROC_COMPAT : 0));
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size() + 1);
  size_t pos = 0;
  while (pos < text.size()) {
    utf8proc_int32_t buffer[32];  // the longest decomposition of one character has 18 (U+FDFA)
    const auto cp = static_cast<utf8proc_int32_t>(utf8::Next(text, pos));
    int last_class = 0;
    const auto n = utf8proc_decompose_char(cp, buffer, 32, options, &last_class);
    if (n <= 0 || n > 32) {
      points.push_back(cp);
    } else {
      points.insert(points.end(), buffer, buffer + n);
    }
  }
  const auto combining = [](utf8proc_int32_t cp) { return utf8proc_get_property(cp)->combining_class; };
  for (size_t i = 0; i < points.size();) {
    if (combining(points[i]) == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < points.size() && combining(points[end]) != 0) ++end;
    std::stable_sort(points.begin() + static_cast<ptrdiff_t>(i), points.begin() + static_cast<ptrdiff_t>(end),
                     [&](auto a, auto b) { return combining(a) < combining(b); });
    i = end;
  }
  size_t length = points.size();
  if (compose) {
    const auto n =
        utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(length),
                                 static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
    if (n >= 0) length = static_cast<size_t>(n);
  }
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < length; ++i) utf8::Append(static_cast<uint32_t>(points[i]), out);
  return out;
}

}  // namespace

absl::StatusOr<Regex> ParsePattern(const json& node, std::string_view key, const std::string& where) {
  const json* pattern = json_reader::Member(node, key);
  const std::string path = absl::StrCat(where, ".", absl::string_view(key.data(), key.size()));
  if (pattern == nullptr || !pattern->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, R"( must be {"String": ...} or {"Regex": ...})"));
  }
  if (json_reader::Member(*pattern, "Regex") != nullptr) {
    TP_ASSIGN_OR_RETURN(const std::string text, json_reader::GetString(*pattern, "Regex", path));
    auto regex = Regex::Compile(text);
    if (!regex.ok()) return Annotate(regex.status(), absl::StrCat(path, ".Regex"));
    return regex;
  }
  TP_ASSIGN_OR_RETURN(std::string text, json_reader::GetString(*pattern, "String", path));
  auto regex = Regex::Literal(std::move(text));
  if (!regex.ok()) return Annotate(regex.status(), absl::StrCat(path, ".String"));
  return regex;
}

absl::StatusOr<Normalizer> Normalizer::Parse(const json& node, const std::string& where) {
  Normalizer normalizer;
  TP_RETURN_IF_ERROR(Append(node, where, normalizer.steps_));
  return normalizer;
}

absl::Status Normalizer::Append(const json& node, const std::string& where, std::vector<Step>& steps) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(node, where));
  TP_ASSIGN_OR_RETURN(const std::string type, json_reader::GetString(node, "type", where));
  if (type == "Sequence") {
    const json* list = json_reader::Member(node, "normalizers");
    if (list == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".normalizers is missing"));
    TP_RETURN_IF_ERROR(json_reader::RequireArray(*list, where + ".normalizers"));
    for (size_t i = 0; i < list->size(); ++i) {
      TP_RETURN_IF_ERROR(Append((*list)[i], absl::StrCat(where, ".normalizers[", i, "]"), steps));
    }
    return absl::OkStatus();
  }
  Step step{};
  if (type == "Prepend") {
    step.kind = Kind::kPrepend;
    TP_ASSIGN_OR_RETURN(step.content, json_reader::GetString(node, "prepend", where));
  } else if (type == "Replace") {
    step.kind = Kind::kReplace;
    TP_ASSIGN_OR_RETURN(step.content, json_reader::GetString(node, "content", where));
    TP_ASSIGN_OR_RETURN(Regex regex, ParsePattern(node, "pattern", where));
    step.pattern.push_back(std::move(regex));
  } else if (type == "Strip") {
    step.kind = Kind::kStrip;
    TP_ASSIGN_OR_RETURN(step.left, json_reader::GetBool(node, "strip_left", where, true));
    TP_ASSIGN_OR_RETURN(step.right, json_reader::GetBool(node, "strip_right", where, true));
  } else if (type == "NFC") {
    step.kind = Kind::kNfc;
  } else if (type == "NFD") {
    step.kind = Kind::kNfd;
  } else if (type == "NFKC") {
    step.kind = Kind::kNfkc;
  } else if (type == "NFKD") {
    step.kind = Kind::kNfkd;
  } else {
    return absl::UnimplementedError(absl::StrCat(where, ": normalizer ", type, " is not supported"));
  }
  steps.push_back(std::move(step));
  return absl::OkStatus();
}

absl::StatusOr<std::string> Normalizer::Apply(std::string text) const {
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kPrepend:
        if (!text.empty()) text.insert(0, step.content);
        break;
      case Kind::kReplace: {
        TP_ASSIGN_OR_RETURN(text, step.pattern[0].ReplaceAll(text, step.content));
        break;
      }
      case Kind::kStrip: {
        const std::string_view stripped = unicode::StripWhiteSpace(text, step.left, step.right);
        text = std::string(stripped);
        break;
      }
      case Kind::kNfc:
        text = Normalize(text, true, false);
        break;
      case Kind::kNfd:
        text = Normalize(text, false, false);
        break;
      case Kind::kNfkc:
        text = Normalize(text, true, true);
        break;
      case Kind::kNfkd:
        text = Normalize(text, false, true);
        break;
    }
  }
  return text;
}

}  // namespace tidepool
