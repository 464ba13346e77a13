#pragma once

#include <functional>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"

// The subcommands of `tidepool`. Each Add* declares one on `app`; the chosen one sets `run`, which main calls
// once everything is parsed. Its result is the exit code: 0 fine, 1 failed, 2 usage or configuration error.
namespace tidepool {

using Command = std::function<int()>;

void AddServeCommand(CLI::App& app, Command& run);
void AddRoleCommands(CLI::App& app, Command& run);  // gateway, scheduler, worker, store
void AddCtlCommand(CLI::App& app, Command& run);
void AddCheckConfigCommand(CLI::App& app, Command& run);
void AddBenchCommand(CLI::App& app, Command& run);
void AddBenchKvCommand(CLI::App& bench, Command& run);  // of AddBenchCommand
void AddDoctorCommand(CLI::App& app, Command& run);
void AddKeyCommand(CLI::App& app, Command& run);
void AddModelCommand(CLI::App& app, Command& run);
void AddRunBatchCommand(CLI::App& app, Command& run);

}  // namespace tidepool
