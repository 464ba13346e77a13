#include "kvstore/arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "base/log.h"

namespace tidepool {

namespace {
constexpr size_t kCacheLine = 64;
constexpr size_t kPage = 4096;

absl::Status TooBig(size_t slot_bytes, uint32_t slots, std::string_view why) {
  return absl::ResourceExhaustedError("host tier: cannot map " + std::to_string(slots) + " slots of " +
                                      std::to_string(slot_bytes) + " bytes: " + std::string(why) +
                                      "; lower kv.host_bytes");
}
}  // namespace

absl::StatusOr<SlotArena> SlotArena::Map(size_t slot_bytes, uint32_t slots) {
  const size_t align = slot_bytes >= kPage ? kPage : kCacheLine;
  size_t stride = 0, bytes = 0;
  if (__builtin_add_overflow(slot_bytes, align - 1, &stride)) return TooBig(slot_bytes, slots, "overflow");
  stride = stride / align * align;
  if (__builtin_mul_overflow(stride, size_t{slots}, &bytes)) return TooBig(slot_bytes, slots, "overflow");

  void* base =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    absl::Status status = TooBig(slot_bytes, slots, std::generic_category().message(errno));
    spdlog::error("{}", status.ToString());
    return status;
  }
  // Best effort: kernels without transparent huge pages answer EINVAL, and 4 KiB pages work as well.
  if (madvise(base, bytes, MADV_HUGEPAGE) != 0) spdlog::debug("host tier: no transparent huge pages");
  return SlotArena(static_cast<std::byte*>(base), bytes, stride, slot_bytes);
}

SlotArena::~SlotArena() {
  if (base_ != nullptr && munmap(base_, bytes_) != 0)
    spdlog::error("host tier: munmap: {}", std::generic_category().message(errno));
}

}  // namespace tidepool
