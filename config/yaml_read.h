#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "config/config.h"

namespace YAML {
class Node;
}

// What the readers of this room's YAML files share; not for other rooms.
namespace tidepool {

// "name:line:column", both from 1.
std::string YamlPlace(std::string_view name, const YAML::Node& node);

// [{key_sha256: ..., tenant: ...}]; problems are appended, one a line, each with its place. `node` is a
// sequence.
std::vector<ApiKeyConfig> ReadApiKeyList(const YAML::Node& node, std::string_view name, std::string_view path,
                                         std::vector<std::string>& problems);

// A whole file of at most 1 MiB. `from`: what named it. Errors: NotFound, InvalidArgument, with the path.
absl::StatusOr<std::string> ReadConfigFile(const std::string& path, std::string_view from);

// What is wrong with the keys, one problem an entry; empty: nothing. Digests of 64 lower-case hex digits, one
// tenant a key, tenants of 1 to 64 characters, printable UTF-8 without ',' and ':'.
std::vector<std::string> ApiKeyProblems(const std::vector<ApiKeyConfig>& keys);
// The same of a tenant's name; empty: fine.
std::string TenantNameProblem(std::string_view tenant);

}  // namespace tidepool
