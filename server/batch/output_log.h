#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/batch/file_io.h"
#include "server/batch/line.h"

namespace tidepool {

// OutputLog: an append-only file of whole lines (Driver; one writer thread). Lines are written in groups,
// each group with one write and one fsync; what a crash leaves of a last line is cut off at the next Open.
// The file is locked: a second writer is refused.
class OutputLog {
 public:
  // Opens or creates `path` (mode 0600), cuts a torn last line off, and shows every line that is there with
  // its offset. Errors: FailedPrecondition (another process writes it), InvalidArgument (a line is none of
  // ours), NotFound, PermissionDenied, ResourceExhausted, Unavailable.
  static absl::StatusOr<std::unique_ptr<OutputLog>> Open(
      const std::string& path, const std::function<absl::Status(const DoneLine&, const FileLine&)>& on_line);
  // Writes what was appended.
  ~OutputLog();

  // Queues a whole line with its end; never waits. After a failed write nothing more is written.
  void Append(std::string line);
  // Appended and not yet durable.
  size_t backlog_bytes() const;
  // Of the file, backlog included.
  uint64_t bytes() const;
  // Waits until everything appended is durable, or a write failed.
  absl::Status Flush();
  // The first failure: ResourceExhausted where the disk is full.
  absl::Status status() const;

 private:
  OutputLog(std::string path, FileHandle file, uint64_t bytes);
  void Run();

  const std::string path_;
  const FileHandle file_;
  mutable std::mutex mu_;
  std::condition_variable wake_, durable_;
  std::string queued_;
  size_t writing_bytes_ = 0;
  uint64_t bytes_;
  absl::Status status_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace tidepool
