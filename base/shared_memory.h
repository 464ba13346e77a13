#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/statusor.h"

namespace tidepool {

// FileDescriptor: Handle of one; move-only.
class FileDescriptor {
 public:
  explicit FileDescriptor(int fd = -1) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileDescriptor();
  int get() const { return fd_; }
  int Release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

// SharedMemory: Handle of a mapping of memory that two processes have; move-only.
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  SharedMemory& operator=(SharedMemory&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~SharedMemory();

  std::byte* data() const { return base_; }
  size_t size() const { return bytes_; }
  // The mapping is somebody else's to unmap.
  std::byte* Release() { return std::exchange(base_, nullptr); }

  // Zeroed memory of a fixed size, mapped writable, and the descriptor for the peer: which may map it
  // writable too, or (`peer_writes` false) only to read. `reserved_huge_pages`: of 2 MiB each, of which
  // `bytes` is a multiple. Unavailable: the machine cannot.
  static absl::StatusOr<std::pair<SharedMemory, FileDescriptor>> Create(const char* name, size_t bytes,
                                                                        bool peer_writes,
                                                                        bool reserved_huge_pages = false);
  // A peer's memory. It is trusted to stay mapped only because it cannot shrink, which is checked. Writable
  // or not, as asked for; read-only memory must be such that nobody can get to write to it who could not
  // before. DataLoss: it is not `bytes` long, or lacks those seals. Unavailable: it cannot be mapped.
  static absl::StatusOr<SharedMemory> Open(int fd, uint64_t bytes, bool writable);

 private:
  SharedMemory(std::byte* base, size_t bytes) : base_(base), bytes_(bytes) {}

  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace tidepool
