#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tidepool {

// BlobReference: values in RocksDB's blob files with direct I/O, for the benchmark: what the disk tier would
// be without extents of its own.
class BlobReference {
 public:
  static absl::StatusOr<std::unique_ptr<BlobReference>> Open(const std::string& directory);
  ~BlobReference();

  absl::Status Put(size_t key, std::span<const std::byte> value);
  // Everything put is in blob files when it returns.
  absl::Status Flush();
  absl::Status Get(size_t key, std::span<std::byte> dst);

 private:
  struct State;
  explicit BlobReference(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tidepool
