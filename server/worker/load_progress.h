#pragma once

#include <cstdint>

#include "absl/time/time.h"

namespace tidepool {

// LoadProgressPrinter: tells a person how far the weights are: a bar on a terminal, a log line every 5 s
// otherwise (so that a slow load is not taken for a hang). One thread.
class LoadProgressPrinter {
 public:
  LoadProgressPrinter();
  ~LoadProgressPrinter();
  void Update(uint64_t bytes_done, uint64_t bytes_total);

 private:
  const bool terminal_;
  const absl::Time start_;
  absl::Time last_;
  bool bar_open_ = false;
};

}  // namespace tidepool
