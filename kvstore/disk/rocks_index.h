#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvstore/disk/index_entry.h"
#include "kvstore/types.h"

namespace tidepool {

// What was written on one day (days since 1970 by the wall clock): the endurance budget's memory.
struct WrittenToday {
  uint32_t day = 0;
  uint64_t bytes = 0;
};

// RocksIndex: the persistent half of the disk tier's index, in RocksDB. Every change goes through its log,
// which outlives the process but is not flushed to the disk per change. Not thread-safe; calls wait for the
// disk.
class RocksIndex {
 public:
  struct Change {
    BlockKey key;
    std::optional<IndexEntry> entry;  // none: remove the key
  };

  // Opens or makes the database in `directory`. DataLoss: what is there cannot be read (Destroy it).
  // ResourceExhausted: no space. Unavailable: anything else, such as another process that holds it.
  static absl::StatusOr<std::unique_ptr<RocksIndex>> Open(const std::string& directory);
  // Removes everything in `directory`.
  static absl::Status Destroy(const std::string& directory);
  ~RocksIndex();

  // Calls `found` for every entry; those that do not decode are removed and counted in `damaged`. Errors as
  // Open.
  absl::Status Load(const std::function<void(IndexEntry)>& found, uint64_t& damaged);
  absl::StatusOr<WrittenToday> LoadWritten();

  // All or nothing, in order. `sync`: on the disk when it returns. Errors as Open; afterwards the index is
  // not to be used but to be opened again.
  absl::Status Apply(std::span<const Change> changes, const WrittenToday& written, bool sync);

 private:
  struct State;
  explicit RocksIndex(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace tidepool
