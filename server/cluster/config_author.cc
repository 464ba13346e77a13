#include "server/cluster/config_author.h"

#include "base/log.h"
#include "nlohmann/json.hpp"

namespace tidepool {
namespace {

constexpr size_t kBytesMax = 1024;

}  // namespace

std::string EncodeConfigAuthor(const ConfigAuthor& author) {
  const nlohmann::ordered_json json = {
      {"who", author.who}, {"when", absl::FormatTime(absl::RFC3339_sec, author.when, absl::UTCTimeZone())}};
  return json.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::ordered_json::error_handler_t::replace);
}

absl::StatusOr<ConfigAuthor> DecodeConfigAuthor(std::string_view text) {
  const absl::Status bad = absl::InvalidArgumentError("is not {\"who\": ..., \"when\": RFC 3339}");
  if (text.size() > kBytesMax) return bad;
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return bad;
  const auto who = json.find("who"), when = json.find("when");
  if (who == json.end() || when == json.end() || !who->is_string() || !when->is_string()) return bad;
  ConfigAuthor author{.who = Printable(who->get<std::string>()), .when = {}};
  std::string error;
  if (!absl::ParseTime(absl::RFC3339_full, when->get<std::string>(), &author.when, &error)) return bad;
  return author;
}

}  // namespace tidepool
