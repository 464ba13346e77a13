#pragma once

#include <cstdio>
#include <string>

#include "server/bench/load_runner.h"

namespace tidepool {

// ProgressLine: how a load goes on, on stderr: a bar that is drawn over itself on a terminal, a line each
// five seconds elsewhere. Not thread-safe.
class ProgressLine {
 public:
  // quiet: writes nothing. label: in front of each line.
  ProgressLine(std::string label, bool quiet);
  ~ProgressLine();

  void Show(const LoadProgress& progress);

  // As shown, without the bar's control characters. duration: the run's limit, or infinite.
  static std::string Bar(const LoadProgress& progress, absl::Duration duration);
  void SetDuration(absl::Duration duration) { duration_ = duration; }

 private:
  const std::string label_;
  const bool quiet_, terminal_;
  absl::Duration duration_ = absl::InfiniteDuration();
  absl::Duration last_ = -absl::InfiniteDuration();
  bool open_ = false;  // the terminal's line has no end yet
};

}  // namespace tidepool
