// GFLOP/s and GB/s of weights of Linear against plain oneDNN in the same run:
//   linear_bench --benchmark_filter=... ; args: m, k (n = k), threads.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <unordered_map>
#include <vector>

#include "base/dtype.h"
#include "base/rng.h"
#include "dnnl.hpp"
#include "kernels/linear.h"

namespace tidepool {
namespace {

std::vector<BF16> Weights(int64_t count) {
  std::vector<BF16> w(static_cast<size_t>(count));
  uint32_t seed = 1;
  for (BF16& v : w) v = ToBF16(static_cast<float>(seed = seed * 1664525u + 1013904223u) * 0x1p-36f);
  return w;
}

void Report(benchmark::State& state, int64_t m, int64_t n, int64_t k, double weight_bytes) {
  const double calls = static_cast<double>(state.iterations());
  state.counters["GFLOP/s"] =
      benchmark::Counter(2e-9 * static_cast<double>(m * n * k) * calls, benchmark::Counter::kIsRate);
  state.counters["weights_GB/s"] =
      benchmark::Counter(1e-9 * weight_bytes * calls, benchmark::Counter::kIsRate);
}

void RunLinear(benchmark::State& state, NumericMode mode, Linear::Compute compute) {
  const int64_t m = state.range(0), k = state.range(1), n = k;
  ThreadPool pool(static_cast<int>(state.range(2)));
  auto linear = Linear::Create(DType::kBF16, n, k, Weights(n * k).data(), nullptr, compute);
  if (!linear.ok()) return state.SkipWithError(std::string(linear.status().message()).c_str());
  std::vector<float> x(static_cast<size_t>(m * k), 0.5f), y(static_cast<size_t>(m * n));
  for (auto _ : state) {
    if (!linear->Forward(x.data(), m, y.data(), mode, pool).ok())
      return state.SkipWithError("Forward failed");
    benchmark::DoNotOptimize(y.data());
  }
  Report(state, m, n, k, static_cast<double>(linear->packed_bytes()));
}

void BM_Fast(benchmark::State& state) { RunLinear(state, NumericMode::kFast, Linear::Compute::kAuto); }
void BM_FastOneDnn(benchmark::State& state) {
  RunLinear(state, NumericMode::kFast, Linear::Compute::kOneDnn);
}
void BM_BatchInvariant(benchmark::State& state) {
  RunLinear(state, NumericMode::kBatchInvariant, Linear::Compute::kAuto);
}
void BM_FastF32(benchmark::State& state) { RunLinear(state, NumericMode::kFast, Linear::Compute::kF32); }

// One matmul with weights in the layout that oneDNN chooses, its own OpenMP threads, x in bf16 already.
void BM_PlainOneDnn(benchmark::State& state) {
  using dnnl::memory;
  const int64_t m = state.range(0), k = state.range(1), n = k;
  omp_set_num_threads(static_cast<int>(state.range(2)));
  try {
    dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    dnnl::stream stream(engine);
    const memory::desc src({m, k}, memory::data_type::bf16, memory::format_tag::ab);
    const memory::desc any({k, n}, memory::data_type::bf16, memory::format_tag::any);
    const memory::desc dst({m, n}, memory::data_type::f32, memory::format_tag::ab);
    dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(src, any, dst), engine);
    memory packed(desc.weights_desc(), engine);
    std::vector<BF16> w = Weights(n * k), x(static_cast<size_t>(m * k), ToBF16(0.5f));
    std::vector<float> y(static_cast<size_t>(m * n));
    memory plain({{k, n}, memory::data_type::bf16, memory::format_tag::ba}, engine, w.data());
    dnnl::reorder(plain, packed).execute(stream, plain, packed);
    dnnl::matmul matmul(desc);
    memory src_memory(src, engine, x.data()), dst_memory(dst, engine, y.data());
    for (auto _ : state) {
      matmul.execute(stream,
                     {{DNNL_ARG_SRC, src_memory}, {DNNL_ARG_WEIGHTS, packed}, {DNNL_ARG_DST, dst_memory}});
      stream.wait();
    }
  } catch (const dnnl::error& e) {
    return state.SkipWithError(e.what());
  }
  Report(state, m, n, k, 2.0 * static_cast<double>(n * k));
}

void Shapes(benchmark::internal::Benchmark* b) {
  for (const int64_t threads : {1, 2}) {
    for (const int64_t m : {1, 2, 4, 8, 16, 32, 64, 128, 512}) b->Args({m, 4096, threads});
  }
  b->UseRealTime()->MinTime(0.2);
}
BENCHMARK(BM_PlainOneDnn)->Apply(Shapes);
BENCHMARK(BM_Fast)->Apply(Shapes);
BENCHMARK(BM_FastOneDnn)->Apply(Shapes);
BENCHMARK(BM_BatchInvariant)->Apply(Shapes);
BENCHMARK(BM_FastF32)->Args({1, 4096, 2})->Args({64, 4096, 2})->Args({512, 4096, 2})->UseRealTime();

}  // namespace
}  // namespace tidepool
