// `tidepool model`: looks at model directories, makes them, and runs their text halves.
#include "server/cli/model_commands.h"

namespace tidepool {

void AddModelCommand(CLI::App& app, Command& run) {
  CLI::App* model = app.add_subcommand("model", "Inspect, synthesize, tokenize, render");
  model->require_subcommand(1);
  AddModelInspectCommand(*model, run);
  AddModelSynthesizeCommand(*model, run);
  AddModelTokenizeCommand(*model, run);
  AddModelRenderCommand(*model, run);
}

}  // namespace tidepool
