#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/statusor.h"

namespace tidepool {

// What memory the host tier is made of. The strings are those of the configuration.
struct ArenaOptions {
  // on: huge pages reserved in the kernel, or an error; auto: those if enough are free, else transparent
  // ones, which the kernel gives to shared memory by itself or on demand (huge_pages.h); off: 4 KiB pages.
  std::string huge_pages = "auto";
  // auto: the node of the CPUs that this process may use, interleaved if they are on several; interleave:
  // over all nodes; a number: that node, if it has room. Nothing on a machine with one node.
  std::string numa_node = "auto";
  bool lock_memory = false;  // pages stay in memory from their first use on
};

// SlotArena: one mapping of equal slots, the memory of the host tier. Handle, move-only. The mapping is of a
// sealed memfd, so that other processes can be given the same memory, read-only (arena_server.h): its size
// never changes, and nobody but this process ever gets to write to it. Pages are committed when first
// touched (or, by a HugePageMaker, somewhat before that), so a large arena costs nothing until it is used.
// Slots start on 64 bytes, and on 4096 where a slot is at least that big (so that no two blocks share a page:
// transports register and pin whole pages).
class SlotArena {
 public:
  // ResourceExhausted: slots * stride overflows or cannot be mapped, or huge_pages is on and too few are
  // reserved. InvalidArgument: an option is none of the above. What else the machine lacks (NUMA policy,
  // locking, memfd) costs a line in the log: the arena works without.
  static absl::StatusOr<SlotArena> Map(size_t slot_bytes, uint32_t slots, const ArenaOptions& options = {});
  SlotArena(SlotArena&& other) noexcept;
  SlotArena& operator=(SlotArena&&) = delete;
  ~SlotArena();

  std::span<std::byte> slot(uint32_t i) const { return {base_ + i * stride_, slot_bytes_}; }
  size_t stride() const { return stride_; }
  size_t slot_bytes() const { return slot_bytes_; }
  size_t bytes() const { return bytes_; }
  // What others may map, read-only; -1: this memory cannot be shared. Borrowed.
  int fd() const { return fd_; }
  // As the kernel gives them by itself: "2 MiB, reserved", "transparent", "4 KiB".
  std::string_view pages() const { return pages_; }
  // Bytes that are on huge pages from the start.
  size_t reserved_huge_bytes() const { return reserved_huge_ ? bytes_ : 0; }
  // What may be put on huge pages piece by piece (HugePageMaker); empty: nothing, or all is already.
  std::span<std::byte> for_huge_pages() const { return {base_, ask_for_huge_ ? bytes_ : 0}; }
  // Never unmap: something outside this process's control may still write to a slot.
  void Abandon() { base_ = nullptr; }

 private:
  SlotArena() = default;

  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
  size_t stride_ = 0;
  size_t slot_bytes_ = 0;
  int fd_ = -1;
  std::string_view pages_ = "4 KiB";
  bool reserved_huge_ = false;
  bool ask_for_huge_ = false;
};

}  // namespace tidepool
