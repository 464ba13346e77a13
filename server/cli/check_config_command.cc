// `tidepool check-config`: reads the configuration, says what is wrong with it or what holds.
#include <cstdio>
#include <map>

#include "absl/strings/str_cat.h"
#include "config/fields.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/output.h"

namespace tidepool {
namespace {

struct Options {
  std::string role = "serve";
  std::string output = "table";
  bool effective = false;
};

const std::map<std::string, ConfigRole>& Roles() {
  static const std::map<std::string, ConfigRole> roles = {{"serve", ConfigRole::kServe},
                                                          {"gateway", ConfigRole::kGateway},
                                                          {"scheduler", ConfigRole::kScheduler},
                                                          {"worker", ConfigRole::kWorker},
                                                          {"store", ConfigRole::kStore}};
  return roles;
}

void PrintEffective(const LoadedConfig& loaded, const Options& options) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Field& field : Fields()) {
    const auto source = loaded.sources.find(field.path);
    rows.push_back({{"field", field.path},
                    {"value", DisplayField(field, loaded.config)},
                    {"source", source == loaded.sources.end() ? "default" : source->second}});
  }
  if (options.output == "json") {
    PrintJson(rows);
  } else {
    std::fputs(FormatTable(rows).c_str(), stdout);
  }
}

}  // namespace

void AddCheckConfigCommand(CLI::App& app, Command& run) {
  CLI::App* command = app.add_subcommand("check-config", "Check the configuration and end");
  const auto flags = ConfigFlags::AddTo(*command);
  const auto options = std::make_shared<Options>();
  command->add_option("--for", options->role, "For which role: serve, gateway, scheduler, worker, store")
      ->check(CLI::IsMember({"serve", "gateway", "scheduler", "worker", "store"}))
      ->type_name("ROLE");
  command->add_flag("--effective", options->effective, "Print every value and where it came from");
  command->add_option("-o,--output", options->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}));
  command->callback([&run, flags, options] {
    run = [=]() -> int {
      const auto loaded = flags->LoadUnchecked();
      if (!loaded.ok()) return ReportError(loaded.status());
      if (options->effective) PrintEffective(*loaded, *options);
      const absl::Status status = Validate(*loaded, Roles().at(options->role));
      if (status.ok() && !options->effective) std::puts("the configuration is fine");
      return ReportError(status);
    };
  });
}

}  // namespace tidepool
