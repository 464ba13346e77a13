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

// Looks at CPU, memory, limits, ports, transports, clocks, disk and the model directory, for `serve` with
// this configuration: what takes less than a second. Ports are bound and released again. Nothing is changed.
// (doctor_checks.h has what takes longer or needs others.)
std::vector<Finding> Diagnose(const Config& config);

const char* LevelName(Finding::Level level);

}  // namespace tidepool
