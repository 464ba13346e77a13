#include "server/cli/config_flags.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/log.h"
#include "base/small_file.h"
#include "config/cluster_document.h"
#include "config/fields.h"

namespace tidepool {
namespace {

// What people type most, beside the name that follows from the path.
std::string FlagNames(const Field& field) {
  std::string names = field.flag();
  if (field.path == "model.path") names += ",--model";
  if (field.path == "worker.role") names += ",--role";
  return names;
}

std::string Default(const Field& field) {
  const std::string text = DisplayField(field, Config());
  return text.empty() ? "(empty)" : text;
}

std::string SectionOf(const Field& field) { return std::string(field.path.substr(0, field.path.find('.'))); }

}  // namespace

std::shared_ptr<ConfigFlags> ConfigFlags::AddTo(CLI::App& app) {
  auto flags = std::make_shared<ConfigFlags>();
  app.add_option("-c,--config", flags->input_.file, "YAML file (see config/tidepool.yaml)")
      ->type_name("FILE");
  app.add_flag_callback(
      "--help-all",
      [] {
        std::fputs(FieldReference().c_str(), stdout);
        throw CLI::Success();
      },
      "Every flag with its variable and default");
  for (const Field& field : Fields()) {
    if (field.secret) continue;  // a command line is readable by everyone
    const std::string path(field.path);
    CLI::Option* option = app.add_option_function<std::string>(
        FlagNames(field),
        [flags, path](const std::string& text) { flags->input_.flags.emplace_back(path, text); },
        absl::StrCat(std::string(field.help), " [", Default(field), "] ", field.env()));
    option->type_name("")->take_last();
    option->group(field.common ? "Configuration, most used" : "");
  }
  for (const RenamedField& renamed : RenamedFields()) {
    const std::string old_flag = Field{.path = renamed.old_path}.flag();
    const std::string now = FindField(renamed.path)->flag();
    app.add_option_function<std::string>(old_flag,
                                         [old_flag, now](const std::string&) {
                                           throw CLI::ValidationError(old_flag, "is now called " + now);
                                         })
        ->group("");
  }
  return flags;
}

absl::StatusOr<LoadedConfig> ConfigFlags::Load(ConfigRole role,
                                               std::shared_ptr<const LoadedConfig> cluster) const {
  ConfigInput input = input_;
  input.cluster = std::move(cluster);
  std::error_code error;
  if (const char* path = std::getenv(kReloadedConfigEnv);
      path != nullptr && std::filesystem::exists(path, error)) {
    TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kClusterDocumentBytesMax));
    // Of `serve` itself: with the rest of this process's values it is valid, with the defaults it may not be.
    TP_ASSIGN_OR_RETURN(LoadedConfig reloaded, LoadConfigText(text, path));
    input.reloaded = std::make_shared<const LoadedConfig>(std::move(reloaded));
  }
  TP_ASSIGN_OR_RETURN(LoadedConfig loaded, LoadConfig(input));
  TP_RETURN_IF_ERROR(Validate(loaded, role));
  return loaded;
}

std::string FieldReference() {
  std::string out = "Precedence: flag > environment > cluster's document (etcd) > file > default.\n";
  std::string section;
  for (const Field& field : Fields()) {
    if (SectionOf(field) != section) {
      section = SectionOf(field);
      absl::StrAppend(&out, "\n", section, ":\n");
    }
    absl::StrAppend(&out, "  ", field.secret ? "(no flag: secret)" : field.flag(), "  ", field.env(),
                    "\n      ", std::string(field.help), field.choices.empty() ? "" : "; one of ",
                    std::string(field.choices), " [", Default(field), "]\n");
  }
  return out;
}

int ExitCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kDataLoss:  // a file that is cut or damaged
      return 2;
    default:
      return 1;
  }
}

int ReportError(const absl::Status& status) {
  if (status.ok()) return 0;
  for (const std::string& line :
       std::vector<std::string>(absl::StrSplit(std::string(status.message()), '\n'))) {
    std::fprintf(stderr, "tidepool: %s\n", Printable(line).c_str());
  }
  return ExitCode(status);
}

std::string DemoModelPath() {
  std::error_code error;
  const std::filesystem::path executable = std::filesystem::read_symlink("/proc/self/exe", error);
  const std::filesystem::path candidates[] = {
      executable.parent_path().parent_path() / "share/tidepool/demo_model",
      std::filesystem::path(TIDEPOOL_SOURCE_DIR) / "tools/demo_model/model",
  };
  for (const auto& path : candidates) {
    if (std::filesystem::exists(path / "config.json", error)) return path.string();
  }
  return "";
}

}  // namespace tidepool
