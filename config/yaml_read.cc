#include "config/yaml_read.h"

#include <set>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "yaml-cpp/yaml.h"

namespace tidepool {
namespace {

constexpr size_t kTenantCharsMax = 64;

}  // namespace

std::string YamlPlace(std::string_view name, const YAML::Node& node) {
  const YAML::Mark mark = node.Mark();  // 0-based
  return absl::StrCat(std::string(name), ":", mark.line + 1, ":", mark.column + 1);
}

std::vector<ApiKeyConfig> ReadApiKeyList(const YAML::Node& node, std::string_view name, std::string_view path,
                                         std::vector<std::string>& problems) {
  const auto problem = [&](const YAML::Node& at, std::string_view what) {
    problems.push_back(absl::StrCat(YamlPlace(name, at), ": ", std::string(path), " ", std::string(what)));
  };
  std::vector<ApiKeyConfig> keys;
  for (const YAML::Node& entry : node) {
    if (!entry.IsMap()) {
      problem(entry, "must hold {key_sha256: ..., tenant: ...}");
      continue;
    }
    ApiKeyConfig key;
    for (const auto& member : entry) {
      const YAML::Node &field = member.first, &value = member.second;
      const std::string text = field.IsScalar() ? field.Scalar() : "";
      if ((text != "key_sha256" && text != "tenant") || !value.IsScalar()) {
        problem(field, "knows only key_sha256 and tenant, each a single value");
        continue;
      }
      (text == "tenant" ? key.tenant : key.key_sha256) = value.Scalar();
    }
    keys.push_back(std::move(key));
  }
  return keys;
}

std::string TenantNameProblem(std::string_view tenant) {
  // Text that is none would not be the same again in a message, a metric or a file.
  if (!tenant.empty() && tenant.size() <= kTenantCharsMax && Printable(tenant) == tenant &&
      tenant.find_first_of(",:") == std::string_view::npos) {
    return "";
  }
  return absl::StrCat("must have 1 to ", kTenantCharsMax, " characters, printable UTF-8 without ',' and ':'");
}

std::vector<std::string> ApiKeyProblems(const std::vector<ApiKeyConfig>& keys) {
  std::vector<std::string> problems;
  std::set<std::string> digests;
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string entry = absl::StrCat("entry ", i + 1, " ");
    const std::string& digest = keys[i].key_sha256;
    if (digest.size() != 64 || digest.find_first_not_of("0123456789abcdef") != std::string::npos) {
      problems.push_back(entry + "needs key_sha256 of 64 lower-case hex digits: printf %s KEY | sha256sum");
    } else if (!digests.insert(digest).second) {
      problems.push_back(entry + "repeats a key; one key belongs to one tenant");
    }
    if (const std::string problem = TenantNameProblem(keys[i].tenant); !problem.empty()) {
      problems.push_back(entry + "needs a tenant; it " + problem);
    }
  }
  return problems;
}

}  // namespace tidepool
