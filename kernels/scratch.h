#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace tidepool {

// Scratch: a 64-byte aligned buffer that only grows (Handle). Kept thread_local or per worker by the
// kernels, so that steady state allocates nothing. Contents survive Get only while it need not grow; fresh
// memory is zero.
class Scratch {
 public:
  template <typename T>
  T* Get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) {
      void* p = std::aligned_alloc(64, bytes);
      if (p == nullptr) throw std::bad_alloc();
      __builtin_memset(p, 0, bytes);
      data_.reset(p);
      bytes_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t bytes_ = 0;
};

}  // namespace tidepool
