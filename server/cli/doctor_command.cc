// `tidepool doctor`: will `serve` work on this machine, and if not, why.
#include <cstdio>

#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/doctor.h"
#include "server/cli/output.h"

namespace tidepool {

void AddDoctorCommand(CLI::App& app, Command& run) {
  CLI::App* command =
      app.add_subcommand("doctor", "Check CPU, memory, limits, ports and model of this machine");
  const auto flags = ConfigFlags::AddTo(*command);
  const auto output = std::make_shared<std::string>("table");
  command->add_option("-o,--output", *output, "table or json")->check(CLI::IsMember({"table", "json"}));
  command->callback([&run, flags, output] {
    run = [=]() -> int {
      auto loaded = flags->Load(ConfigRole::kServe);
      if (!loaded.ok()) return ReportError(loaded.status());
      if (loaded->config.model.path.empty()) loaded->config.model.path = DemoModelPath();
      nlohmann::ordered_json rows = nlohmann::ordered_json::array();
      bool failed = false;
      for (const Finding& finding : Diagnose(loaded->config)) {
        failed |= finding.level == Finding::kFail;
        rows.push_back(
            {{"check", finding.check}, {"result", LevelName(finding.level)}, {"detail", finding.detail}});
      }
      if (*output == "json") {
        PrintJson(rows);
      } else {
        std::fputs(FormatTable(rows).c_str(), stdout);
      }
      return failed ? 1 : 0;
    };
  });
}

}  // namespace tidepool
