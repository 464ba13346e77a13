#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "absl/status/statusor.h"

namespace tidepool {

// SlotArena: one anonymous mapping of equal slots, the memory of the host tier. Handle, move-only.
// Pages are committed when first touched, so a large arena costs nothing until it is used; huge pages
// are asked for, not required. Slots start on 64 bytes, and on 4096 where a slot is at least that big
// (so that no two blocks share a page: transports register and pin whole pages).
class SlotArena {
 public:
  // ResourceExhausted: slots * stride overflows or cannot be mapped.
  static absl::StatusOr<SlotArena> Map(size_t slot_bytes, uint32_t slots);
  SlotArena(SlotArena&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)),
        bytes_(other.bytes_),
        stride_(other.stride_),
        slot_bytes_(other.slot_bytes_) {}
  SlotArena& operator=(SlotArena&&) = delete;
  ~SlotArena();

  std::span<std::byte> slot(uint32_t i) const { return {base_ + i * stride_, slot_bytes_}; }
  size_t stride() const { return stride_; }
  // Never unmap: something outside this process's control may still write to a slot.
  void Abandon() { base_ = nullptr; }

 private:
  SlotArena(std::byte* base, size_t bytes, size_t stride, size_t slot_bytes)
      : base_(base), bytes_(bytes), stride_(stride), slot_bytes_(slot_bytes) {}

  std::byte* base_;
  size_t bytes_;
  size_t stride_;
  size_t slot_bytes_;
};

}  // namespace tidepool
