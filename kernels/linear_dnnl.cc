#include "kernels/linear_dnnl.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>

#include "dnnl.hpp"
#include "kernels/scratch.h"

namespace tidepool {
namespace {

const dnnl::engine& CpuEngine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

absl::Status FromDnnl(const dnnl::error& e) {
  return absl::InternalError("oneDNN matmul: " + std::string(e.what()) + " (status " +
                             std::to_string(static_cast<int>(e.status)) + ")");
}

}  // namespace

struct DnnlMatmul::Impl {
  explicit Impl(const dnnl::matmul::primitive_desc& desc)
      : src(desc.src_desc()),
        weights(desc.weights_desc()),
        dst(desc.dst_desc()),
        scratchpad(desc.scratchpad_desc()),
        matmul(desc) {}

  dnnl::memory::desc src, weights, dst, scratchpad;
  dnnl::matmul matmul;
};

absl::StatusOr<const DnnlMatmul*> DnnlMatmul::Get(int64_t m, int64_t k, int64_t cols) {
  using dnnl::memory;
  static std::mutex mu;
  // Never destroyed: other threads may still compute while the process exits.
  static auto& cache = *new std::map<std::tuple<int64_t, int64_t, int64_t>, std::unique_ptr<DnnlMatmul>>;
  std::lock_guard lock(mu);
  std::unique_ptr<DnnlMatmul>& slot = cache[{m, k, cols}];
  if (slot != nullptr) return slot.get();
  try {
    const memory::desc src({m, k}, memory::data_type::bf16, memory::format_tag::ab);
    const memory::desc weights({k, cols}, memory::data_type::bf16, memory::format_tag::BA16a64b2a);
    const memory::desc dst({m, cols}, memory::data_type::f32, memory::format_tag::ab);
    // The library's own scratchpad belongs to the thread that creates a primitive; ours run on any.
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    slot.reset(new DnnlMatmul(
        new Impl(dnnl::matmul::primitive_desc(dnnl::matmul::desc(src, weights, dst), attr, CpuEngine()))));
    return slot.get();
  } catch (const dnnl::error& e) {
    return FromDnnl(e);
  }
}

absl::Status DnnlMatmul::Run(const void* x, const void* panels, float* y) const {
  thread_local Scratch scratch;
  try {
    thread_local dnnl::stream stream(CpuEngine());
    const auto wrap = [](const dnnl::memory::desc& desc, const void* data) {
      return dnnl::memory(desc, CpuEngine(), const_cast<void*>(data));
    };
    impl_->matmul.execute(
        stream,
        {{DNNL_ARG_SRC, wrap(impl_->src, x)},
         {DNNL_ARG_WEIGHTS, wrap(impl_->weights, panels)},
         {DNNL_ARG_DST, wrap(impl_->dst, y)},
         {DNNL_ARG_SCRATCHPAD, wrap(impl_->scratchpad, scratch.Get<char>(impl_->scratchpad.get_size()))}});
    return absl::OkStatus();
  } catch (const dnnl::error& e) {
    return FromDnnl(e);
  }
}

bool DnnlMatmul::HasAmx() {
  static const bool has = [] {
    const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
    const auto amx = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_amx);
    return (isa & amx) == amx;
  }();
  return has;
}

}  // namespace tidepool
