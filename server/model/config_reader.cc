#include "server/model/config_reader.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/log.h"

namespace tidepool {

uint32_t ConfigReader::Count(std::string_view field, int64_t lo, int64_t hi,
                             std::optional<int64_t> fallback) {
  const auto v = fields_.Int(field, lo, hi, fallback);
  if (!v.ok()) Add(v.status());
  return v.ok() ? static_cast<uint32_t>(*v) : 0;
}

double ConfigReader::Number(std::string_view field, double lo, double hi, double fallback) {
  const auto v = fields_.Number(field, lo, hi, fallback);
  if (!v.ok()) Add(v.status());
  return v.ok() ? *v : fallback;
}

double ConfigReader::RequiredNumber(std::string_view field, double lo, double hi) {
  const auto v = fields_.Number(field, lo, hi);
  if (!v.ok()) Add(v.status());
  return v.ok() ? *v : lo;
}

bool ConfigReader::Bool(std::string_view field, bool fallback) {
  const auto v = fields_.Bool(field, fallback);
  if (!v.ok()) Add(v.status());
  return v.ok() ? *v : fallback;
}

std::vector<double> ConfigReader::Numbers(std::string_view field, size_t size, double lo, double hi) {
  const std::string expected = absl::StrFormat("a list of %d numbers in [%g, %g]", size, lo, hi);
  const nlohmann::json* v = Find(field);
  if (v == nullptr) {
    Invalid(absl::StrCat(std::string(field), " is missing; it must be ", expected));
    return {};
  }
  std::vector<double> out;
  if (v->is_array() && v->size() == size) {
    for (const nlohmann::json& x : *v) {
      if (x.is_number() && x.get<double>() >= lo && x.get<double>() <= hi) out.push_back(x.get<double>());
    }
  }
  if (out.size() == size) return out;
  const std::string found =
      v->is_array() ? absl::StrCat("a list of ", v->size(), ": ", JsonForMessage(*v)) : JsonForMessage(*v);
  Invalid(absl::StrCat(std::string(field), " is ", found, "; it must be ", expected));
  return {};
}

void ConfigReader::Invalid(std::string_view message) {
  Add(absl::InvalidArgumentError(absl::StrCat(where(), ": ", std::string(message))));
}

void ConfigReader::Unsupported(std::string_view field, const nlohmann::json& value,
                               std::string_view supported) {
  Add(absl::UnimplementedError(absl::StrCat(where(), ": ", std::string(field), " is ", JsonForMessage(value),
                                            "; supported: ", std::string(supported))));
}

void ConfigReader::Add(const absl::Status& problem) { problems_.push_back(PrintableStatus(problem)); }

}  // namespace tidepool
