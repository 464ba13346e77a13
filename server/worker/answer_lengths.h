#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "scheduler/predict_len.h"

namespace tidepool {

// AnswerLengths: how long a tenant's answers become on this worker: a LengthQuantiles that any thread may
// ask.
class AnswerLengths {
 public:
  // One of a tenant's answers ended, or was cut, after so many tokens.
  void Observe(const std::string& tenant, uint32_t tokens);
  // What 9 of 10 of them do not exceed. nullopt: too few were seen.
  std::optional<uint32_t> High(const std::string& tenant) const;

 private:
  mutable std::mutex mu_;
  LengthQuantiles lengths_{0};
};

}  // namespace tidepool
