#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/batch/file_io.h"
#include "server/batch/line.h"
#include "server/batch/line_key.h"

namespace tidepool {

struct InputLine {
  uint64_t offset = 0;
  uint32_t bytes = 0;   // without its end
  uint32_t number = 0;  // in the file, from 1
};

// InputIndex: where a batch's lines are, and who they are; some 40 bytes a line, never a body. Immutable
// after Build, apart from reads of the file, which must not change meanwhile.
class InputIndex {
 public:
  static constexpr size_t kLineBytesMax = size_t{64} << 20;

  struct Options {
    uint64_t lines_max = 100'000'000;
    size_t line_bytes_max = kLineBytesMax;
    // Called with the bytes read so far; false: give up (Cancelled).
    std::function<bool(uint64_t)> progress;
    // Sees each line as it is read; ends the index where it returns false.
    std::function<bool(const InputLine&, const BatchLine&)> on_line;
  };

  // Reads the whole file once. Errors: NotFound, PermissionDenied, Unavailable, Cancelled, InvalidArgument
  // (not a regular file, more than lines_max lines).
  static absl::StatusOr<InputIndex> Build(const std::string& path, const Options& options);

  const std::vector<InputLine>& lines() const { return lines_; }
  uint64_t bytes() const { return bytes_; }
  // SHA-256 of the file, hex.
  const std::string& digest() const { return digest_; }

  struct Duplicate {
    uint32_t number = 0, first = 0;  // lines of the file
  };
  // Lines whose custom_id an earlier one has, the first `max` of them in the file's order.
  std::vector<Duplicate> Duplicates(size_t max) const;

  // Index into lines(); -1: no such line.
  int64_t Find(const LineKey& key) const;

  // The line, parsed. Thread-safe. Errors: Unavailable, DataLoss (the file changed).
  absl::StatusOr<BatchLine> Read(size_t index) const;

 private:
  struct Key {
    LineKey key;
    uint32_t index;
    bool operator<(const Key& other) const {
      return key != other.key ? key < other.key : index < other.index;
    }
  };

  std::string path_;
  FileHandle file_;
  size_t line_bytes_max_ = 0;
  std::vector<InputLine> lines_;
  std::vector<Key> keys_;  // sorted
  uint64_t bytes_ = 0;
  std::string digest_;
};

}  // namespace tidepool
