#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/batch/line.h"
#include "server/gateway/json.h"

namespace tidepool {

enum class BatchStatus : uint8_t {
  kValidating,
  kInProgress,
  kFinalizing,
  kCompleted,
  kFailed,  // the input was refused, or its files could not be kept
  kExpired,
  kCancelling,
  kCancelled,
};
std::string_view BatchStatusName(BatchStatus status);
// Nothing more happens to it.
bool IsTerminal(BatchStatus status);

// BatchRecord: one batch, as it is kept and shown. Times are Unix seconds, 0: not yet.
struct BatchRecord {
  std::string id;  // batch_HEX
  std::string endpoint, input_file_id;
  BatchStatus status = BatchStatus::kValidating;
  std::vector<std::pair<std::string, std::string>> metadata;
  std::vector<BatchError> errors;  // of a failed one
  int64_t created_at = 0, expires_at = 0;
  int64_t created_ns = 0;  // Unix nanoseconds: the order of those of one second
  int64_t in_progress_at = 0, finalizing_at = 0, completed_at = 0, failed_at = 0, expired_at = 0;
  int64_t cancelling_at = 0, cancelled_at = 0;
  uint64_t total = 0, completed = 0, failed = 0;  // lines
  int64_t output_ttl_seconds = 0;                 // of the files it makes; 0: as all files
  // Files that lines go to, from in_progress on. Shown once they are complete, where they hold a line.
  std::string output_id, error_id;
  bool output_shown = false, error_shown = false;
};

// OpenAI's batch object.
OrderedJson BatchJson(const BatchRecord& record);

// The record as it is kept: one line of JSON, version 1. Errors: DataLoss, InvalidArgument.
std::string SerialiseBatch(const BatchRecord& record);
absl::StatusOr<BatchRecord> ParseBatch(std::string_view text);

}  // namespace tidepool
