#pragma once

#include <memory>

#include "server/cli/commands.h"
#include "server/cli/ctl_client.h"

namespace tidepool {

// Adds `show`, `diff` and `apply` below `ctl config`: the document in etcd that holds for a whole cluster.
// `options` is shared with the caller's commands and lives as long as `run`.
void AddCtlConfigCommands(CLI::App& config, const std::shared_ptr<CtlOptions>& options, Command& run);

}  // namespace tidepool
