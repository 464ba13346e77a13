#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Files that must survive a crash at any moment.
namespace tidepool {

// Handle of a file descriptor; move-only, closes.
class FileHandle {
 public:
  FileHandle() = default;
  explicit FileHandle(int fd) : fd_(fd) {}
  FileHandle(FileHandle&& other) noexcept : fd_(other.Release()) {}
  FileHandle& operator=(FileHandle&& other) noexcept;
  ~FileHandle();

  int fd() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release();

 private:
  int fd_ = -1;
};

// The message begins with `path`. ResourceExhausted: no space; NotFound, PermissionDenied, else Unavailable.
absl::Status ErrnoStatus(std::string_view path, int error);

// All of `bytes`, whatever the system takes at once.
absl::Status WriteAll(int fd, std::string_view bytes, std::string_view path);
// `bytes` from `offset`. Errors: DataLoss where the file ends before.
absl::StatusOr<std::string> ReadAt(int fd, uint64_t offset, size_t bytes, std::string_view path);

// Replaces the file in one step, mode 0600: whoever reads it afterwards, also after a crash, finds the old
// text or the new one.
absl::Status WriteFileAtomically(const std::string& path, std::string_view text);
// Makes creations, renames and removals in the directory of `path` durable.
absl::Status SyncDirectoryOf(const std::string& path);

// One line of a file, without its end.
struct FileLine {
  uint64_t offset = 0;
  uint64_t number = 0;    // from 1; blank lines count
  uint64_t bytes = 0;     // as in the file, also where `text` was not kept
  std::string_view text;  // borrowed for the call; empty where the line is longer than bytes_max
  bool whole = true;      // false: the file's last line, without a line end
  bool too_long = false;
};

// Reads a file from its beginning in pieces, memory bounded by line_bytes_max. `bytes` sees every byte read,
// in order (digests, progress); `line` every line that is not blank, and returns false to stop. An empty
// function is not called.
absl::Status ForEachLine(int fd, std::string_view path, size_t line_bytes_max,
                         const std::function<void(std::string_view)>& bytes,
                         const std::function<bool(const FileLine&)>& line);

}  // namespace tidepool
