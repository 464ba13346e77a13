// Apart from the other tests of Transformer, because the counting allocator below replaces what sanitizers
// watch.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <numeric>

#include "server/model/model.h"
#include "tests/server/model/tiny_families.h"

namespace {
std::atomic<uint64_t> g_allocations{0};
}

// Not inlined: g++ would take the pair for a mismatch of new and free.
__attribute__((noinline)) void* operator new(size_t n) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(n == 0 ? 1 : n)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace tidepool {
namespace {

TEST(Transformer, SteadyStateAllocatesNothing) {
  for (const auto& [family, config] : TinyFamilies()) {
    TempDir dir;
    WriteRandomModel(dir.path(), config);
    const auto loaded = LoadModel({.path = dir.path(), .dtype = "bfloat16"}, "", {});
    ASSERT_TRUE(loaded.ok()) << family << ": " << loaded.status();
    const auto model = *loaded;
    const BlockLayout layout = model->Layout(16);
    ThreadPool pool(1);
    Workspace ws(model->spec, 40, 1);
    std::vector<std::vector<std::byte>> storage(3, std::vector<std::byte>(layout.block_bytes()));
    std::vector<std::byte*> blocks;
    for (auto& b : storage) blocks.push_back(b.data());
    std::vector<int32_t> tokens(40), positions(40), rows = {39};
    std::iota(tokens.begin(), tokens.end(), 5);
    std::iota(positions.begin(), positions.end(), 0);
    std::vector<float> logits(96);
    const ForwardSequence sequence{.blocks = blocks.data(), .context = 40, .first_row = 0, .q_len = 40};
    const ForwardBatch batch{
        .tokens = tokens, .positions = positions, .sequences = {&sequence, 1}, .logit_rows = rows};
    const auto step = [&] {
      return model->transformer.Forward(batch, layout, NumericMode::kBatchInvariant, pool, ws, logits.data());
    };
    ASSERT_TRUE(step().ok());
    const uint64_t before = g_allocations.load();
    const bool ok = step().ok();
    const uint64_t made = g_allocations.load() - before;
    EXPECT_TRUE(ok);
    EXPECT_EQ(made, 0u) << family;
  }
}

}  // namespace
}  // namespace tidepool
