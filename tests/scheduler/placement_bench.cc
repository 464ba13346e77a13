// Time of one Place: 16 and 1000 workers (half prefill, half decode), a 512-block prompt that every eighth
// prefill worker holds, `inflight` bookings. Source of the figure in scheduler/README.md.
#include <benchmark/benchmark.h>

#include "tests/scheduler/cluster_builder.h"

namespace tidepool {
namespace {

void BM_Place(benchmark::State& state) {
  SchedulerOptions options;
  SchedulerCore core(options);
  const auto workers = static_cast<uint32_t>(state.range(0));
  for (uint32_t i = 0; i < workers; ++i) {
    auto r = TestReport("w" + std::to_string(i), i % 2 == 0 ? Role::kPrefill : Role::kDecode);
    r.model.max_model_len = 1 << 20;
    r.load.slots_total = r.load.slots_free = 1 << 20;
    if (i % 16 == 0) Holding(r, "x", 512);
    core.Report(r, kStart);
  }
  for (int64_t i = 0; i < state.range(1); ++i)
    core.Place(TestRequest("booked" + std::to_string(i), 640, "c" + std::to_string(i)), kStart);
  const PlaceRequest request = TestRequest("r", 512 * 32 + 1);
  for (auto _ : state) benchmark::DoNotOptimize(core.Place(request, kStart));
}
BENCHMARK(BM_Place)
    ->ArgNames({"workers", "inflight"})
    ->Args({16, 0})
    ->Args({16, 1000})
    ->Args({1000, 0})
    ->Args({1000, 4000})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace tidepool

BENCHMARK_MAIN();
