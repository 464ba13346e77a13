#pragma once

#include "server/cli/commands.h"

namespace tidepool {

// `tidepool simulate`: a cluster that does not exist, under a load that did (tools/simulate).
void AddSimulateCommand(CLI::App& app, Command& run);

}  // namespace tidepool
