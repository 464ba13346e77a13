#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tidepool {

// DiskIo: reads and writes of one open file that go on by themselves. One thread submits and waits (the
// driver); Wake may be called by any. Buffers belong to the operation until its completion was returned.
class DiskIo {
 public:
  struct Op {
    bool write = false;
    uint64_t offset = 0;
    std::span<std::byte> buffer;  // page-aligned, as are offset and length where the file is direct
    uint64_t tag = 0;             // any number but kNoTag: comes back with the completion
  };
  struct Completion {
    uint64_t tag = 0;
    int error = 0;  // errno; a transfer that ended early is EIO
  };
  static constexpr uint64_t kNoTag = ~uint64_t{1};  // not ~0: that marks the timeouts of liburing itself

  // Operations that have not begun are dropped; those that hang may go on (their buffers stay theirs).
  virtual ~DiskIo() = default;

  // The file of the operations from now on; the caller keeps it open until the last of them is complete, also
  // beyond the end of this object.
  virtual void Attach(int fd) = 0;
  // At most as many under way as the depth it was made with.
  virtual void Submit(const Op& op) = 0;
  // Appends completions to `out`, waiting for the first, for Wake, or for `timeout`.
  virtual void Wait(absl::Duration timeout, std::vector<Completion>& out) = 0;
  // Ends the present Wait, or the next.
  virtual void Wake() = 0;
  // For logs: "io_uring", "4 threads".
  virtual std::string Describe() const = 0;
};

// io_uring; Unavailable where the kernel refuses it (old, or switched off by the administrator).
absl::StatusOr<std::unique_ptr<DiskIo>> MakeUringDiskIo(size_t depth);
// pread and pwrite on threads of its own.
std::unique_ptr<DiskIo> MakeThreadDiskIo(size_t depth, size_t threads);
// io_uring, or else threads.
absl::StatusOr<std::unique_ptr<DiskIo>> MakeDiskIo(size_t depth);

}  // namespace tidepool
