#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace tidepool {

// RunOwner: the mapping of another process's memory that a BlockRun reads in. It outlives every run in it.
// Thread-safe.
class RunOwner {
 public:
  virtual ~RunOwner() = default;
  virtual std::span<const std::byte> SlotBytes(uint32_t slot) const = 0;
  // One run fewer.
  virtual void Drop() = 0;
};

// BlockRun: the right to read blocks of another process that were handed over together, where they lie. One
// lease stands for all of them, and they are given back together: what grows with their number is a list of
// slots. While it is held, none of them is written to or moves on to another generation. Handle, move-only;
// any thread may hold or drop it, also after the other process has died.
class BlockRun {
 public:
  BlockRun() = default;
  // Takes over one lease that `owner` has counted already.
  BlockRun(RunOwner* owner, std::vector<uint32_t> slots) : owner_(owner), slots_(std::move(slots)) {}
  BlockRun(BlockRun&& other) noexcept
      : owner_(std::exchange(other.owner_, nullptr)), slots_(std::exchange(other.slots_, {})) {}
  BlockRun& operator=(BlockRun&& other) noexcept {
    BlockRun old(std::move(*this));  // dropped last: `other` may hold what it needs
    owner_ = std::exchange(other.owner_, nullptr);
    slots_ = std::exchange(other.slots_, {});
    return *this;
  }
  ~BlockRun() { Drop(); }

  bool empty() const { return slots_.empty(); }
  size_t size() const { return slots_.size(); }
  // Of block `i` < size(): layout().block_bytes() bytes, 64-byte aligned.
  std::span<const std::byte> data(size_t i) const { return owner_->SlotBytes(slots_[i]); }
  // Only the first `n` <= size() are wanted any more. 0: drops the lease.
  void Shorten(size_t n) {
    slots_.resize(n);
    if (n == 0) Drop();
  }

 private:
  void Drop() {
    slots_.clear();
    if (RunOwner* const owner = std::exchange(owner_, nullptr)) owner->Drop();
  }

  RunOwner* owner_ = nullptr;
  std::vector<uint32_t> slots_;
};

}  // namespace tidepool
