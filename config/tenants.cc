#include "config/tenants.h"

#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "config/fields.h"
#include "config/yaml_read.h"
#include "yaml-cpp/yaml.h"

namespace tidepool {
namespace {

struct Setting {
  const char* name;
  uint32_t* (*in)(TenantSettings&);
};
constexpr Setting kSettings[] = {
    {"requests_per_minute", [](TenantSettings& t) { return &t.limits.requests_per_minute; }},
    {"tokens_per_minute", [](TenantSettings& t) { return &t.limits.tokens_per_minute; }},
    {"max_inflight", [](TenantSettings& t) { return &t.limits.max_inflight; }},
    {"max_queued_requests", [](TenantSettings& t) { return &t.limits.max_queued_requests; }},
    {"max_queued_tokens", [](TenantSettings& t) { return &t.limits.max_queued_tokens; }},
    {"cache_epoch", [](TenantSettings& t) { return &t.cache_epoch; }},
};

// TenantReader: walks one document; collects problems instead of stopping.
class TenantReader {
 public:
  TenantReader(std::string_view name, TenantTable& out, std::vector<std::string>& problems)
      : name_(name), out_(out), problems_(problems) {}

  void Read(const YAML::Node& root) {
    if (!root.IsMap()) return Problem(root, "must be a mapping with `keys:` and, if need be, `tenants:`");
    std::set<std::string> seen;
    for (const auto& entry : root) {
      const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : "";
      const bool list = entry.second.IsSequence();
      if (!seen.insert(key).second) {
        Problem(entry.first, key + " is given twice; remove one");
      } else if (key != "keys" && key != "tenants") {
        Problem(entry.first, "unknown key '" + key + "'; known here: keys, tenants");
      } else if (!list) {
        Problem(entry.first, key + " must be a list");
      } else if (key == "keys") {
        ReadKeys(entry.second);
      } else {
        for (const YAML::Node& tenant : entry.second) ReadTenant(tenant);
      }
    }
    if (seen.count("keys") == 0) Problem(root, "has no `keys:`; nobody could call");
  }

 private:
  void Problem(const YAML::Node& node, std::string_view what) {
    problems_.push_back(absl::StrCat(YamlPlace(name_, node), ": ", std::string(what)));
  }

  void ReadKeys(const YAML::Node& node) {
    out_.keys = ReadApiKeyList(node, name_, "keys", problems_);
    if (out_.keys.empty()) Problem(node, "keys is empty; nobody could call");
    for (const std::string& problem : ApiKeyProblems(out_.keys)) Problem(node, "keys " + problem);
  }

  void ReadTenant(const YAML::Node& node) {
    if (!node.IsMap()) return Problem(node, "tenants must hold {name: ..., ...}");
    TenantSettings tenant;
    tenant.limits = out_.defaults;
    for (const auto& member : node) {
      const std::string key = member.first.IsScalar() ? member.first.Scalar() : "";
      if (!member.second.IsScalar()) {
        Problem(member.first, "tenants: " + key + " must be a single value");
      } else if (key == "name") {
        tenant.name = member.second.Scalar();
      } else {
        ReadSetting(member.first, key, member.second, tenant);
      }
    }
    if (const std::string problem = TenantNameProblem(tenant.name); !problem.empty()) {
      return Problem(node, "tenants: name " + problem);
    }
    for (const TenantSettings& other : out_.tenants) {
      if (other.name == tenant.name) return Problem(node, "tenants: '" + tenant.name + "' is given twice");
    }
    out_.tenants.push_back(std::move(tenant));
  }

  void ReadSetting(const YAML::Node& place, const std::string& key, const YAML::Node& value,
                   TenantSettings& tenant) {
    std::vector<std::string> known = {"name"};
    for (const Setting& setting : kSettings) {
      known.emplace_back(setting.name);
      if (key != setting.name) continue;
      const std::string& text = value.Scalar();
      const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
      if (!digits || !absl::SimpleAtoi(text, setting.in(tenant))) {
        Problem(value,
                absl::StrCat("tenants: ", key, " '", text, "' is not a whole number from 0 to 4294967295"));
      }
      return;
    }
    const std::string nearest = NearestOf(key, known);
    Problem(place, absl::StrCat("tenants: unknown key '", key, "'; ",
                                nearest.empty() ? "known here: " + absl::StrJoin(known, ", ")
                                                : "did you mean '" + nearest + "'?"));
  }

  const std::string name_;
  TenantTable& out_;
  std::vector<std::string>& problems_;
};

}  // namespace

TenantSettings TenantTable::Settings(std::string_view tenant) const {
  for (const TenantSettings& settings : tenants) {
    if (settings.name == tenant) return settings;
  }
  TenantSettings settings;
  settings.name = std::string(tenant);
  settings.limits = defaults;
  return settings;
}

absl::StatusOr<TenantTable> ParseTenants(std::string_view yaml, std::string_view name,
                                         const TenantLimitsConfig& defaults) {
  TenantTable table;
  table.defaults = defaults;
  std::vector<std::string> problems;
  try {
    TenantReader(name, table, problems).Read(YAML::Load(std::string(yaml)));
  } catch (const YAML::Exception& e) {
    problems.push_back(
        absl::StrCat(std::string(name), ":", e.mark.line + 1, ":", e.mark.column + 1, ": not YAML: ", e.msg));
  }
  if (!problems.empty()) return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
  return table;
}

absl::StatusOr<TenantTable> LoadTenants(const GatewayConfig& config) {
  if (!config.api_keys_file.empty()) {
    TP_ASSIGN_OR_RETURN(const std::string text,
                        ReadConfigFile(config.api_keys_file, "gateway.api_keys_file"));
    return ParseTenants(text, config.api_keys_file, config.tenant_limits);
  }
  TenantTable table;
  table.keys = config.api_keys;
  table.defaults = config.tenant_limits;
  std::vector<std::string> problems = ApiKeyProblems(table.keys);
  for (std::string& problem : problems) problem = "gateway.api_keys: " + problem;
  if (!problems.empty()) return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
  return table;
}

}  // namespace tidepool
