#pragma once

#include "server/cli/commands.h"

// The subcommands of `tidepool model`, each in a file of its own.
namespace tidepool {

void AddModelInspectCommand(CLI::App& model, Command& run);
void AddModelSynthesizeCommand(CLI::App& model, Command& run);
void AddModelTokenizeCommand(CLI::App& model, Command& run);
void AddModelRenderCommand(CLI::App& model, Command& run);

}  // namespace tidepool
