#pragma once

#include <string>
#include <vector>

#include "config/config.h"

namespace tidepool {

// One thing that `tidepool doctor` looked at on this machine.
struct Finding {
  enum Level { kOk, kWarn, kFail };
  std::string check;
  Level level = kOk;
  std::string detail;  // what was found; where not fine, what to do
};

// Looks at CPU, memory, limits, ports, interfaces and the model directory, for `serve` with this
// configuration. Ports are bound and released again. Nothing is changed.
std::vector<Finding> Diagnose(const Config& config);

const char* LevelName(Finding::Level level);

}  // namespace tidepool
