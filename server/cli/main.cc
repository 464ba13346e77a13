// tidepool: one binary, `tidepool ROLE`.
#include <cstdio>

#include "absl/synchronization/mutex.h"
#include "server/cli/commands.h"
#include "server/cli/simulate_command.h"

int main(int argc, char** argv) {
  // Debian builds Abseil with assertions: each of gRPC's locks would be checked against a graph of all lock
  // orders, a cost on every message.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  CLI::App app(
      "Tidepool: disaggregated LLM serving. Prefill and decode run in separate processes that share one\n"
      "pool of KV blocks; clients see an OpenAI-compatible HTTP and gRPC front door.",
      "tidepool");
  app.require_subcommand(1);
  app.set_version_flag("--version", TIDEPOOL_VERSION);
  tidepool::Command run;
  tidepool::AddServeCommand(app, run);
  tidepool::AddRoleCommands(app, run);
  tidepool::AddCtlCommand(app, run);
  tidepool::AddRunBatchCommand(app, run);
  tidepool::AddKeyCommand(app, run);
  tidepool::AddModelCommand(app, run);
  tidepool::AddBenchCommand(app, run);
  tidepool::AddSimulateCommand(app, run);
  tidepool::AddCheckConfigCommand(app, run);
  tidepool::AddDoctorCommand(app, run);
  app.add_subcommand("version", "Print the version")->callback([&run] {
    run = [] {
      std::puts("tidepool " TIDEPOOL_VERSION);
      return 0;
    };
  });
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  return run();
}
