#pragma once

#include <string>

#include "absl/time/time.h"
#include "server/batch/batch_run.h"

namespace tidepool {

// BatchProgress: how far a batch is: a line on a terminal that is moved on, else a log line every 5 s. Not
// thread-safe.
class BatchProgress {
 public:
  BatchProgress();
  ~BatchProgress();

  void Reading(uint64_t bytes, uint64_t bytes_total);
  void Running(const BatchCounts& counts);
  // Ends the terminal's line.
  void Clear();

 private:
  bool Due();
  void Show(double part, const std::string& text);

  const bool terminal_;
  absl::Time next_;
  absl::Time began_ = absl::InfiniteFuture();  // of the first Running
  uint64_t done_before_ = 0;                   // lines that an earlier run had answered
  bool shown_ = false;
};

// "1200 of 50000 lines (2.4%), 3 failed, 32 in flight, 12.3 lines/s, 1h6m left".
std::string ProgressText(const BatchCounts& counts, uint64_t done_before, absl::Duration elapsed);

}  // namespace tidepool
