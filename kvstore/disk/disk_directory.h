#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tidepool {

// DiskDirectory: one tier's directory, held by this process. Handle, move-only.
//
//   PATH/NAME, or NAME-1, NAME-2, ... where processes of one name share PATH: the first that nobody holds,
//   so that a worker started again finds what the one before it left
//     LOCK     held with flock: gone with the process, however it ends
//     FORMAT   what the other files are written for
//     blocks   the extents
//     index/   RocksDB
class DiskDirectory {
 public:
  struct Options {
    std::string path, name;
    uint64_t record_bytes = 0;
    uint64_t file_bytes = 0;
    bool preallocate = true;
    absl::Duration lock_wait;
    size_t max_tiers = 1;
  };

  // Waits up to lock_wait for the first directory. Unavailable, FailedPrecondition (another format),
  // ResourceExhausted (no room): the message names the path and the way out.
  static absl::StatusOr<DiskDirectory> Open(const Options& options);

  DiskDirectory() = default;
  DiskDirectory(DiskDirectory&& other) noexcept;
  DiskDirectory& operator=(DiskDirectory&& other) noexcept;
  ~DiskDirectory();
  // The files stay open, and the directory held, for as long as the process lives: somebody may still use
  // them.
  void LeaveOpen() { lock_fd_ = blocks_fd_ = -1; }

  const std::string& path() const { return path_; }
  std::string index_path() const { return path_ + "/index"; }
  int blocks_fd() const { return blocks_fd_; }
  bool direct() const { return direct_; }
  // No index of before goes with this file of extents: it is new, or for records of another size.
  bool fresh() const { return fresh_; }

 private:
  absl::Status Lock(const Options& options);
  absl::Status CheckFormat(const Options& options);
  absl::Status OpenBlocks(const Options& options);

  std::string path_;
  int lock_fd_ = -1;
  int blocks_fd_ = -1;
  bool direct_ = false;
  bool fresh_ = false;
};

}  // namespace tidepool
