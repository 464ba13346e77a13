#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "kernels/numeric_mode.h"
#include "kernels/thread_pool.h"

namespace tidepool {

// Linear: y[m,n] = x[m,k] · W[n,k]ᵀ + bias[n] (Handle: owns a packed copy of W and of bias; move-only,
// immutable after Create, thread-safe).
//
// x, y are float32 row-major and dense. W is packed once into column panels; both modes read that one
// copy. With bf16 weights x is rounded to bf16 (nearest even), products are exact and sums are float32:
// |y - exact| stays below about 2^-8 * sum_k |x_k W_nk|, and against an x that was bf16 already below
// k * 2^-24 times that sum.
class Linear {
 public:
  // Which arithmetic runs a weight matrix. kAuto picks the best one that the CPU has natively; the others
  // exist for tests and comparison, and Create refuses one that the CPU lacks (FailedPrecondition).
  //   kBF16    bf16 dot products of AVX512-BF16 in our own kernel (bf16 weights only)
  //   kF32     float32 FMA in our own kernel; bf16 weights are widened to float32 (twice the memory), x
  //            still rounded to bf16
  //   kOneDnn  kBF16, but fast mode gives enough rows to oneDNN (k a multiple of 32, else InvalidArgument);
  //            kAuto does this where the CPU has AMX, which our kernels do not use
  enum class Compute : uint8_t { kAuto, kBF16, kF32, kOneDnn };

  // w: [n,k] row-major of weight_dtype (kBF16 or kF32), bias: [n] float32 or null; both borrowed for the
  // call. InvalidArgument: n or k < 1, another dtype, a product that overflows memory.
  static absl::StatusOr<Linear> Create(DType weight_dtype, int64_t n, int64_t k, const void* w,
                                       const float* bias = nullptr, Compute compute = Compute::kAuto);

  Linear(Linear&&) noexcept;
  Linear& operator=(Linear&&) noexcept;
  ~Linear();

  // y must not overlap x. m == 0 is a no-op; m < 0 InvalidArgument; Internal if the GEMM library fails.
  // Scratch lives with the threads and is reused: steady state allocates none.
  absl::Status Forward(const float* x, int64_t m, float* y, NumericMode mode, ThreadPool& pool) const;

  int64_t n() const;
  int64_t k() const;
  // Bytes of the packed copy.
  int64_t packed_bytes() const;
  // "avx512_bf16", "avx512_f32" or "avx2_f32": in batch-invariant mode two machines with equal names
  // compute equal bits.
  std::string_view kernel() const;

 private:
  struct Impl;
  explicit Linear(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The obvious triple loop in double, for tests: y[m,n] = sum_k x[m,k] * w[n,k] + bias[n]; round_x rounds
// x to bf16 first, as Linear does for bf16 weights. w as float32.
void LinearRef(const float* x, int64_t m, const float* w, int64_t n, int64_t k, const float* bias,
               bool round_x, double* y);

}  // namespace tidepool
