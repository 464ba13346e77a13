#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "config/config.h"

namespace tidepool {

struct LoadedConfig;

// What the configuration is read from. Precedence: flag > environment > cluster's document > file > default.
// The document is the cluster's operator's word and later than any file that a machine was set up with; what
// somebody gives one process by hand, by variable or flag, is meant for that one alone.
struct ConfigInput {
  std::string file;  // YAML; empty: none
  // Of a process in a cluster: the document in etcd (cluster_document.h); null: none.
  std::shared_ptr<const LoadedConfig> cluster;
  // Looks a variable up; std::nullopt where it is not set. Default: the process's environment.
  std::function<std::optional<std::string>(const std::string&)> env;
  std::vector<std::pair<std::string, std::string>> flags;  // (field path, text), in the order given
  // Of a child of `tidepool serve`, whose environment is as old as its parent: what the parent has read again
  // since. Above all the others; null: nothing.
  std::shared_ptr<const LoadedConfig> reloaded;
};

struct LoadedConfig {
  Config config;
  // Field path -> where its value came from: "tidepool.yaml:12", "TIDEPOOL_LOG_LEVEL", "--log-level".
  // A field that is not here has its default.
  std::map<std::string, std::string, std::less<>> sources;

  bool IsDefault(std::string_view path) const { return sources.find(path) == sources.end(); }
  // "gateway.http_listen (tidepool.yaml:12)", for messages.
  std::string Describe(std::string_view path) const;
};

// Reads, converts and range-checks. Errors: InvalidArgument listing every problem, one a line, each with
// its place (file:line:column, variable or flag), the field, the limit and the fix; NotFound where `file`
// cannot be read. Unknown YAML keys are errors with the nearest known name.
absl::StatusOr<LoadedConfig> LoadConfig(const ConfigInput& input);

// The same from YAML text, for tests and fuzzing; `name` stands in messages.
absl::StatusOr<LoadedConfig> LoadConfigText(std::string_view yaml, std::string_view name);

// Who is going to use the configuration: what must be set differs.
enum class ConfigRole { kServe, kGateway, kScheduler, kWorker, kStore };

// Checks that need more than one field. Errors: InvalidArgument listing every problem, one a line.
absl::Status Validate(const LoadedConfig& loaded, ConfigRole role);

}  // namespace tidepool
