#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tidepool {

// DnnlMatmul: y[m, cols] = x[m, k] · panels by oneDNN on the calling thread, over linear_cpu.h's packed
// bf16 panels (immutable, thread-safe). x: bf16, y: float32, both dense: oneDNN 2.6 answers a leading
// dimension of its own with its reference loops, a thousand times slower. k: a multiple of 32. Internal to
// linear; oneDNN's types and exceptions end here.
class DnnlMatmul {
 public:
  // The compiled shape, from a cache of the process: the caller bounds the number of shapes. The first call
  // of a shape takes milliseconds. Lives until the process ends. Errors: Internal, with oneDNN's message.
  static absl::StatusOr<const DnnlMatmul*> Get(int64_t m, int64_t k, int64_t cols);

  absl::Status Run(const void* x, const void* panels, float* y) const;

  // True where oneDNN has matrix instructions (AMX) that our own kernels lack.
  static bool HasAmx();

 private:
  struct Impl;
  explicit DnnlMatmul(Impl* impl) : impl_(impl) {}
  Impl* impl_;
};

}  // namespace tidepool
