#include "kernels/linear.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <utility>

#include "base/status.h"
#include "kernels/cpu_features.h"
#include "kernels/linear_cpu.h"
#include "kernels/linear_dnnl.h"
#include "kernels/scratch.h"

namespace tidepool {
namespace {

// Most rows that one pass holds in scratch: a longer prompt chunk is cut, which costs one more read of the
// weights per this many rows.
constexpr int64_t kRowsPerPass = 512;
// Rows of one task of our own GEMM.
constexpr int64_t kRowsPerTask = 96;
// oneDNN's share, in fast mode with kOneDnn: at least this many rows (below, weights come in no faster than
// our kernel takes them), in calls of 256 columns (2 MiB of bf16 weights at k = 4096), the number of rows
// rounded up so that few shapes are compiled.
constexpr int64_t kDnnlRowsMin = 16;
constexpr int64_t kDnnlRowsMultiple = 16;
constexpr int64_t kDnnlPanels = 4;

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<char, AlignedFree>;

AlignedBytes AllocateZeroed(int64_t bytes) {
  const size_t rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64;
  AlignedBytes p(static_cast<char*>(std::aligned_alloc(64, rounded)));
  if (p != nullptr) std::memset(p.get(), 0, rounded);
  return p;
}

float WeightAt(DType dtype, const void* w, int64_t i) {
  return dtype == DType::kBF16 ? ToFloat(static_cast<const BF16*>(w)[i]) : static_cast<const float*>(w)[i];
}

}  // namespace

struct Linear::Impl {
  int64_t n = 0, k = 0;
  int64_t panels = 0;
  int64_t panel_k = 0;  // k rounded up to a whole block of the packed format
  int64_t panel_bytes = 0;
  int64_t x_stride = 0;  // of x as the kernels see it
  bool bf16 = false;     // packed as bf16
  bool round_x = false;  // x goes through bf16
  void (*run)(const GemmPanel&) = nullptr;
  std::string_view kernel;
  AlignedBytes packed;
  AlignedBytes bias;     // [panels * 64] float32 or null
  bool one_dnn = false;  // fast mode may use oneDNN

  void Pack(DType dtype, const void* w);
  const void* PrepareX(const float* x, int64_t m, int64_t rows, Scratch& scratch, ThreadPool& pool) const;
  void RunOwn(const void* x, int64_t m, float* y, ThreadPool& pool) const;
  absl::Status RunDnnl(const void* x, int64_t m, int64_t rows, float* y, ThreadPool& pool) const;

  const float* BiasOf(int64_t panel) const {
    return bias == nullptr ? nullptr : reinterpret_cast<const float*>(bias.get()) + panel * kPanelCols;
  }
};

void Linear::Impl::Pack(DType dtype, const void* w) {
  for (int64_t j = 0; j < n; ++j) {
    char* panel = packed.get() + j / kPanelCols * panel_bytes;
    const int64_t col = j % kPanelCols;
    if (bf16) {
      BF16* out = reinterpret_cast<BF16*>(panel);
      const BF16* row = static_cast<const BF16*>(w) + j * k;
      for (int64_t i = 0; i < k; ++i) out[(i / 2 * kPanelCols + col) * 2 + i % 2] = row[i];
    } else {
      float* out = reinterpret_cast<float*>(panel);
      for (int64_t i = 0; i < k; ++i) out[i * kPanelCols + col] = WeightAt(dtype, w, j * k + i);
    }
  }
}

absl::StatusOr<Linear> Linear::Create(DType weight_dtype, int64_t n, int64_t k, const void* w,
                                      const float* bias, Compute compute) {
  if (n < 1 || k < 1 || n > std::numeric_limits<int32_t>::max() || k > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError("linear: weights are [" + std::to_string(n) + ", " + std::to_string(k) +
                                      "]; both must be in [1, 2147483647]");
  }
  if (weight_dtype != DType::kBF16 && weight_dtype != DType::kF32) {
    return absl::InvalidArgumentError("linear: weight dtype is " + std::string(DTypeName(weight_dtype)) +
                                      "; it may be bfloat16 or float32");
  }
  const bool wants_bf16 = compute == Compute::kBF16 || compute == Compute::kOneDnn;
  if (wants_bf16 && weight_dtype != DType::kBF16) {
    return absl::InvalidArgumentError("linear: bf16 compute needs bfloat16 weights");
  }
  if (compute == Compute::kOneDnn && k % 32 != 0) {
    return absl::InvalidArgumentError("linear: oneDNN needs k to be a multiple of 32; it is " +
                                      std::to_string(k));
  }
  if (wants_bf16 && !Cpu().avx512_bf16) {
    return absl::FailedPreconditionError("linear: this CPU has no AVX512-BF16");
  }
  auto impl = std::make_unique<Impl>();
  impl->n = n;
  impl->k = k;
  impl->bf16 = weight_dtype == DType::kBF16 && compute != Compute::kF32 && Cpu().avx512_bf16;
  impl->round_x = weight_dtype == DType::kBF16;
  impl->panels = (n + kPanelCols - 1) / kPanelCols;
  impl->panel_k = impl->bf16 ? (k + 31) / 32 * 32 : (k + 15) / 16 * 16;
  impl->panel_bytes = impl->panel_k * kPanelCols * (impl->bf16 ? 2 : 4);
  impl->x_stride = impl->bf16 ? impl->panel_k : k;
  impl->packed = AllocateZeroed(impl->panels * impl->panel_bytes);
  if (impl->packed == nullptr) {
    return absl::ResourceExhaustedError(
        "linear: no memory for " + std::to_string(impl->panels * impl->panel_bytes) + " bytes of weights");
  }
  impl->Pack(weight_dtype, w);
  if (bias != nullptr) {
    impl->bias = AllocateZeroed(impl->panels * kPanelCols * static_cast<int64_t>(sizeof(float)));
    if (impl->bias == nullptr) return absl::ResourceExhaustedError("linear: no memory for the bias");
    std::memcpy(impl->bias.get(), bias, static_cast<size_t>(n) * sizeof(float));
  }
  impl->run = impl->bf16     ? RunGemmPanelAvx512Bf16
              : Cpu().avx512 ? RunGemmPanelAvx512F32
                             : RunGemmPanelAvx2F32;
  impl->kernel = impl->bf16 ? "avx512_bf16" : Cpu().avx512 ? "avx512_f32" : "avx2_f32";
  impl->one_dnn = compute == Compute::kOneDnn ||
                  (compute == Compute::kAuto && impl->bf16 && k % 32 == 0 && DnnlMatmul::HasAmx());
  return Linear(std::move(impl));
}

// x as the kernels take it, `rows` >= m rows of x_stride: the caller's own for float32 weights, else a copy
// in scratch rounded through bf16, rows past m and columns past k zero.
const void* Linear::Impl::PrepareX(const float* x, int64_t m, int64_t rows, Scratch& scratch,
                                   ThreadPool& pool) const {
  if (!round_x) return x;
  const int64_t grain = 16384 / x_stride + 1;
  if (bf16) {
    BF16* out = scratch.Get<BF16>(static_cast<size_t>(rows * x_stride));
    pool.ParallelFor(rows, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        BF16* row = out + r * x_stride;
        const int64_t used = r < m ? k : 0;
        for (int64_t i = 0; i < used; ++i) row[i] = ToBF16(x[r * k + i]);
        std::fill(row + used, row + x_stride, BF16{});
      }
    });
    return out;
  }
  float* out = scratch.Get<float>(static_cast<size_t>(m * k));
  pool.ParallelFor(m, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * k; i < end * k; ++i) out[i] = ToFloat(ToBF16(x[i]));
  });
  return out;
}

void Linear::Impl::RunOwn(const void* x, int64_t m, float* y, ThreadPool& pool) const {
  const int64_t row_tasks = (m + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t x_bytes = x_stride * (bf16 ? 2 : 4);
  // Small matrices stay on one thread: a hand-over costs about as much as 128 KiB of weights.
  const int64_t grain = std::max<int64_t>(1, (int64_t{128} << 10) / (panel_bytes * std::min<int64_t>(m, 8)));
  pool.ParallelFor(panels * row_tasks, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / row_tasks;
      const int64_t first = m * (task % row_tasks) / row_tasks;
      GemmPanel p;
      p.x = static_cast<const char*>(x) + first * x_bytes;
      p.x_stride = x_stride;
      p.panel = packed.get() + panel * panel_bytes;
      p.k = bf16 ? panel_k : k;
      p.y = y + first * n + panel * kPanelCols;
      p.y_stride = n;
      p.m = m * (task % row_tasks + 1) / row_tasks - first;
      p.cols = static_cast<int>(std::min<int64_t>(kPanelCols, n - panel * kPanelCols));
      p.bias = BiasOf(panel);
      run(p);
    }
  });
}

// rows: m rounded up, as x has them.
absl::Status Linear::Impl::RunDnnl(const void* x, int64_t m, int64_t rows, float* y, ThreadPool& pool) const {
  const int64_t slice_cols = kDnnlPanels * kPanelCols;
  const int64_t slices = (n + slice_cols - 1) / slice_cols;
  const int64_t last_cols = n - (slices - 1) * slice_cols;
  TP_ASSIGN_OR_RETURN(const DnnlMatmul* const last, DnnlMatmul::Get(rows, k, last_cols));
  const DnnlMatmul* whole = last;
  if (slices > 1 && last_cols != slice_cols) {
    TP_ASSIGN_OR_RETURN(whole, DnnlMatmul::Get(rows, k, slice_cols));
  }
  std::mutex mu;
  absl::Status first_error;
  pool.ParallelFor(slices, 1, [&](int64_t begin, int64_t end, int) {
    thread_local Scratch scratch;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t cols = s + 1 == slices ? last_cols : slice_cols;
      float* out = scratch.Get<float>(static_cast<size_t>(rows * slice_cols));
      const char* panel = packed.get() + s * kDnnlPanels * panel_bytes;
      const absl::Status status = (s + 1 == slices ? last : whole)->Run(x, panel, out);
      if (!status.ok()) {
        std::lock_guard lock(mu);
        first_error.Update(status);
        return;
      }
      const float* add = BiasOf(s * kDnnlPanels);
      for (int64_t r = 0; r < m; ++r) {
        float* to = y + r * n + s * slice_cols;
        for (int64_t c = 0; c < cols; ++c) to[c] = out[r * cols + c] + (add != nullptr ? add[c] : 0.0f);
      }
    }
  });
  return first_error;
}

absl::Status Linear::Forward(const float* x, int64_t m, float* y, NumericMode mode, ThreadPool& pool) const {
  if (m < 0)
    return absl::InvalidArgumentError("linear: m is " + std::to_string(m) + "; it must be at least 0");
  // Per calling thread: workers read it, and nobody writes it before this call has ended.
  thread_local Scratch x_scratch;
  for (int64_t first = 0; first < m; first += kRowsPerPass) {
    const int64_t rows = std::min(kRowsPerPass, m - first);
    const float* pass_x = x + first * impl_->k;
    float* pass_y = y + first * impl_->n;
    if (impl_->one_dnn && mode == NumericMode::kFast && rows >= kDnnlRowsMin) {
      const int64_t padded = (rows + kDnnlRowsMultiple - 1) / kDnnlRowsMultiple * kDnnlRowsMultiple;
      const void* prepared = impl_->PrepareX(pass_x, rows, padded, x_scratch, pool);
      TP_RETURN_IF_ERROR(impl_->RunDnnl(prepared, rows, padded, pass_y, pool));
    } else {
      impl_->RunOwn(impl_->PrepareX(pass_x, rows, rows, x_scratch, pool), rows, pass_y, pool);
    }
  }
  return absl::OkStatus();
}

Linear::Linear(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Linear::Linear(Linear&&) noexcept = default;
Linear& Linear::operator=(Linear&&) noexcept = default;
Linear::~Linear() = default;

int64_t Linear::n() const { return impl_->n; }
int64_t Linear::k() const { return impl_->k; }
int64_t Linear::packed_bytes() const { return impl_->panels * impl_->panel_bytes; }
std::string_view Linear::kernel() const { return impl_->kernel; }

}  // namespace tidepool
