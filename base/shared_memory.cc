#include "base/shared_memory.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "base/log.h"

namespace tidepool {
namespace {

// Huge pages are mapped as such only at an address that is as well aligned as they are.
constexpr size_t kHugePage = 2 << 20;

absl::Status Failed(std::string_view what) {
  return absl::UnavailableError(
      absl::StrCat("shared memory: ", std::string(what), ": ", std::generic_category().message(errno)));
}

// `lazy`: without setting memory aside for all of it. Reserved huge pages are set aside, or a touch too many
// would end the process.
std::byte* MapAligned(int fd, size_t bytes, int protection, bool lazy = true) {
  const size_t reserve = bytes + kHugePage;
  if (reserve < bytes) return nullptr;
  void* hole = mmap(nullptr, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (hole == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(hole);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  void* at =
      mmap(begin + head, bytes, protection, MAP_SHARED | MAP_FIXED | (lazy ? MAP_NORESERVE : 0), fd, 0);
  if (at == MAP_FAILED) {
    const int why = errno;
    munmap(hole, reserve);
    errno = why;
    return nullptr;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t used = (bytes + page - 1) / page * page;
  if (head > 0) munmap(begin, head);
  if (head + used < reserve) munmap(begin + head + used, reserve - head - used);
  return static_cast<std::byte*>(at);
}

}  // namespace

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) close(fd_);
}

SharedMemory::~SharedMemory() {
  if (base_ != nullptr && munmap(base_, bytes_) != 0)
    spdlog::error("shared memory: munmap: {}", std::generic_category().message(errno));
}

absl::StatusOr<std::pair<SharedMemory, FileDescriptor>> SharedMemory::Create(const char* name, size_t bytes,
                                                                             bool peer_writes,
                                                                             bool reserved_huge_pages) {
  unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  if (reserved_huge_pages) flags |= MFD_HUGETLB | MFD_HUGE_2MB;
  FileDescriptor fd(memfd_create(name, flags));
  if (fd.get() < 0) return Failed("memfd_create");
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) return Failed("ftruncate");
  SharedMemory memory(MapAligned(fd.get(), bytes, PROT_READ | PROT_WRITE, !reserved_huge_pages), bytes);
  if (memory.base_ == nullptr) return Failed("mmap");
  // After the mapping: the one for reading only forbids any that is writable from here on.
  int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  if (!peer_writes) seals |= F_SEAL_FUTURE_WRITE;
  if (fcntl(fd.get(), F_ADD_SEALS, seals) != 0) return Failed("sealing");
  return std::make_pair(std::move(memory), std::move(fd));
}

absl::StatusOr<SharedMemory> SharedMemory::Open(int fd, uint64_t bytes, bool writable) {
  struct stat st = {};
  if (fstat(fd, &st) != 0) return Failed("fstat");
  if (bytes == 0 || static_cast<uint64_t>(st.st_size) != bytes) {
    return absl::DataLossError(
        absl::StrCat("shared memory: it has ", st.st_size, " bytes, the peer says ", bytes));
  }
  const int seals = fcntl(fd, F_GET_SEALS);
  const bool fixed = seals >= 0 && (seals & F_SEAL_SHRINK) != 0;
  if (!fixed || (!writable && (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) == 0)) {
    return absl::DataLossError("shared memory: it is not sealed against shrinking and writing");
  }
  SharedMemory memory(MapAligned(fd, bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ), bytes);
  if (memory.base_ == nullptr) return Failed("mmap");
  return memory;
}

}  // namespace tidepool
