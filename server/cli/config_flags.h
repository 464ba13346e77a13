#pragma once

#include <memory>
#include <string>

#include "CLI/App.hpp"
#include "config/loader.h"

namespace tidepool {

// ConfigFlags: --config and one flag for every field of the configuration, on one subcommand. Shared by the
// command's parsing and its run.
class ConfigFlags {
 public:
  // The flags live as long as the returned object. --help shows the common ones, --help-all every field.
  static std::shared_ptr<ConfigFlags> AddTo(CLI::App& app);

  // Reads, converts and validates for `role`, over the cluster's document (null: none). Logs nothing.
  absl::StatusOr<LoadedConfig> Load(ConfigRole role,
                                    std::shared_ptr<const LoadedConfig> cluster = nullptr) const;
  // The same without the checks that need more than one field.
  absl::StatusOr<LoadedConfig> LoadUnchecked() const { return LoadConfig(input_); }

 private:
  ConfigInput input_;
};

// In a child of `serve`: the file of live fields that its parent writes when it reads its configuration
// again.
inline constexpr char kReloadedConfigEnv[] = "TIDEPOOL_RELOADED_CONFIG";

// Every field with flag, variable, default and help.
std::string FieldReference();

// 0; 2 for what the caller can mend (flags, configuration, a model's files); 1 for all else.
int ExitCode(const absl::Status& status);
// Prints a status to stderr, line by line, and returns the exit code that belongs to it.
int ReportError(const absl::Status& status);

// The model that `serve` takes where none is configured: share/tidepool/demo_model beside the executable's
// folder, else the source tree's. Empty where neither is there.
std::string DemoModelPath();

}  // namespace tidepool
