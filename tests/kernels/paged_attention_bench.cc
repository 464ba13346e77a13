// Rate of PagedAttention: GFLOP/s for prefill, GB/s of KV for decode. Args: context, q_len, kv heads,
// query heads, threads, window (0: none); head_dim 128, blocks of 32 tokens,
// bf16.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <vector>

#include "kernels/paged_attention.h"

namespace tidepool {
namespace {

void BM_PagedAttention(benchmark::State& state) {
  const int32_t context = static_cast<int32_t>(state.range(0)), q_len = static_cast<int32_t>(state.range(1));
  const BlockLayout layout{.layers = 1, .kv_heads = static_cast<uint32_t>(state.range(2)), .head_dim = 128};
  const int heads = static_cast<int>(state.range(3));
  ThreadPool pool(static_cast<int>(state.range(4)));
  const size_t blocks = (static_cast<size_t>(context) + 31) / 32;
  std::vector<BF16> kv(blocks * layout.block_bytes() / 2, ToBF16(0.25f));
  std::vector<const std::byte*> pointers;
  for (size_t b = 0; b < blocks; ++b) {
    pointers.push_back(reinterpret_cast<const std::byte*>(kv.data()) + b * layout.block_bytes());
  }
  const AttentionSeq seq{pointers.data(), context, 0, q_len};
  const size_t width = static_cast<size_t>(heads) * 128;
  std::vector<float> q(static_cast<size_t>(q_len) * width, 0.5f), out(q.size());
  for (auto _ : state) {
    const absl::Status status =
        PagedAttention(layout, 0, std::span(&seq, 1), q.data(), static_cast<int64_t>(width), heads,
                       {.scale = 0.1f, .window = static_cast<int32_t>(state.range(5))}, out.data(), nullptr,
                       NumericMode::kFast, pool);
    if (!status.ok()) return state.SkipWithError(std::string(status.message()).c_str());
    benchmark::DoNotOptimize(out.data());
  }
  const double calls = static_cast<double>(state.iterations());
  // Causal: query i sees context - q_len + i + 1 keys, two dot products of 128 each.
  double pairs = q_len * (context - q_len + (q_len + 1) / 2.0);
  if (state.range(5) > 0) pairs = q_len * std::min<double>(state.range(5), pairs / q_len);
  state.counters["GFLOP/s"] =
      benchmark::Counter(4e-9 * 128 * pairs * heads * calls, benchmark::Counter::kIsRate);
  state.counters["kv_GB/s"] =
      benchmark::Counter(1e-9 * static_cast<double>(kv.size()) * 2 * calls, benchmark::Counter::kIsRate);
}
BENCHMARK(BM_PagedAttention)
    ->Args({1024, 1, 1, 1, 1, 0})
    ->Args({4096, 1, 8, 8, 1, 0})
    ->Args({4096, 1, 8, 32, 1, 0})
    ->Args({4096, 1, 8, 32, 2, 0})
    ->Args({512, 512, 8, 32, 1, 0})
    ->Args({4096, 512, 8, 32, 1, 0})
    ->Args({4096, 512, 8, 32, 2, 0})
    ->Args({4096, 1, 8, 32, 1, 1024})
    ->Args({4096, 512, 8, 32, 1, 1024})
    ->UseRealTime();

}  // namespace
}  // namespace tidepool
