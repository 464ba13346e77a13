#include "kernels/paged_attention.h"

#include <limits>
#include <memory>

#include "kernels/cpu_features.h"
#include "kernels/kv_write.h"
#include "kernels/paged_attention_cpu.h"
#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

constexpr uint32_t kLayer = 1;

// Sequences of random KV in blocks whose unwritten rest is NaN.
class Kv {
 public:
  Kv(BlockLayout layout, uint64_t seed) : layout_(layout), seed_(seed) {}

  // Adds a sequence of `context` tokens; queries are its last q_len, in rows from q_start on.
  AttentionSeq Add(int32_t context, int32_t q_start, int32_t q_len) {
    ThreadPool pool(1);
    auto& blocks = blocks_.emplace_back(std::make_unique<std::vector<const std::byte*>>());
    const size_t count = (static_cast<size_t>(context) + layout_.block_tokens - 1) / layout_.block_tokens;
    std::vector<std::byte*> writable;
    for (size_t b = 0; b < count; ++b) {
      const float nan = std::nanf("");
      auto& memory =
          memory_.emplace_back(std::make_unique<std::vector<float>>(layout_.block_bytes() / 4 + 1, nan));
      std::byte* base = reinterpret_cast<std::byte*>(memory->data());
      std::memset(base, 0xff, layout_.block_bytes());  // NaN in bf16 too
      writable.push_back(base);
      blocks->push_back(base);
    }
    const int64_t width = int64_t{layout_.kv_heads} * layout_.head_dim;
    const std::vector<float> k = RandomFloats(context * width, seed_++),
                             v = RandomFloats(context * width, seed_++);
    std::vector<KvSlot> slots;
    for (uint32_t t = 0; t < static_cast<uint32_t>(context); ++t) {
      slots.push_back({writable[t / layout_.block_tokens], t % layout_.block_tokens});
    }
    EXPECT_TRUE(KvWrite(layout_, kLayer, slots, k.data(), v.data(), width, pool).ok());
    return {blocks->data(), context, q_start, q_len};
  }

 private:
  BlockLayout layout_;
  uint64_t seed_;
  std::vector<std::unique_ptr<std::vector<float>>> memory_;
  std::vector<std::unique_ptr<std::vector<const std::byte*>>> blocks_;
};

struct Result {
  std::vector<float> out, lse;
};

AttentionOptions ScaledFor(const BlockLayout& layout, int32_t window = 0, float softcap = 0) {
  return {
      .scale = 1.0f / std::sqrt(static_cast<float>(layout.head_dim)), .window = window, .softcap = softcap};
}

Result Attend(const BlockLayout& layout, std::span<const AttentionSeq> seqs, const std::vector<float>& q,
              int heads, int64_t rows, NumericMode mode, ThreadPool& pool, int32_t window = 0,
              float softcap = 0) {
  const int64_t width = heads * int64_t{layout.head_dim};
  Result r{std::vector<float>(static_cast<size_t>(rows * width)),
           std::vector<float>(static_cast<size_t>(rows * heads))};
  const absl::Status status =
      PagedAttention(layout, kLayer, seqs, q.data(), width, heads, ScaledFor(layout, window, softcap),
                     r.out.data(), r.lse.data(), mode, pool);
  EXPECT_TRUE(status.ok()) << status;
  return r;
}

BlockLayout Layout(uint32_t kv_heads, uint32_t dim, uint32_t block_tokens, DType dtype) {
  return {.layers = 2, .kv_heads = kv_heads, .head_dim = dim, .block_tokens = block_tokens, .dtype = dtype};
}

TEST(PagedAttention, MatchesReferenceForMixedBatchesAndOddShapes) {
  ThreadPool pool(2);
  uint64_t seed = 1;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const uint32_t dim : {1u, 8u, 20u, 48u, 64u, 128u, 256u, 272u}) {
      for (const int group : {1, 3, 8}) {
        for (const uint32_t block_tokens : {1u, 5u, 16u, 32u}) {
          if (block_tokens != 32 && dim > 64) continue;
          const BlockLayout layout = Layout(2, dim, block_tokens, dtype);
          const int heads = 2 * group;
          Kv kv(layout, seed++);
          const std::vector<AttentionSeq> seqs = {kv.Add(1, 0, 1), kv.Add(70, 1, 1), kv.Add(41, 2, 41),
                                                  kv.Add(5, 43, 0), kv.Add(100, 43, 13)};
          const int64_t rows = 56, width = heads * int64_t{dim};
          const std::vector<float> q = RandomFloats(rows * width, seed++, 3.0f);
          std::vector<double> want(static_cast<size_t>(rows * width)),
              want_lse(static_cast<size_t>(rows * heads));
          PagedAttentionRef(layout, kLayer, seqs, q.data(), width, heads, ScaledFor(layout), want.data(),
                            want_lse.data());
          const Result got = Attend(layout, seqs, q, heads, rows, NumericMode::kFast, pool);
          SCOPED_TRACE(testing::Message() << layout.ToString() << " group " << group);
          ExpectNear(got.out, want, 1e-5, 0);
          ExpectNear(got.lse, want_lse, 1e-5, 1e-6);
        }
      }
    }
  }
}

TEST(PagedAttention, QueryBitsDoNotDependOnChunkingBatchOrThreads) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const uint32_t dim : {8u, 40u, 128u}) {
      const BlockLayout layout = Layout(2, dim, 32, dtype);
      const int heads = 6;
      const int32_t context = 300;
      const int64_t width = heads * int64_t{dim};
      Kv kv(layout, 17);
      const AttentionSeq whole = kv.Add(context, 0, context), other = kv.Add(90, context, 1);
      const std::vector<float> q = RandomFloats((context + 1) * width, 18, 2.0f);
      ThreadPool one(1), three(3);
      const std::vector<AttentionSeq> together = {other, whole};
      const Result want =
          Attend(layout, together, q, heads, context + 1, NumericMode::kBatchInvariant, three);

      for (const int32_t chunk : {1, 2, 7, 33, 150}) {
        for (ThreadPool* pool : {&one, &three}) {
          for (int32_t begin = 0; begin < context; begin += chunk) {
            const int32_t rows = std::min(chunk, context - begin);
            const AttentionSeq part{whole.blocks, begin + rows, 0, rows};
            const std::vector<float> part_q(q.begin() + begin * width, q.begin() + (begin + rows) * width);
            const Result got =
                Attend(layout, std::span(&part, 1), part_q, heads, rows, NumericMode::kBatchInvariant, *pool);
            ASSERT_TRUE(SameBits(got.out.data(), want.out.data() + begin * width, rows * width))
                << "chunk " << chunk << " at " << begin << " dim " << dim;
            ASSERT_TRUE(
                SameBits(got.lse.data(), want.lse.data() + int64_t{begin} * heads, int64_t{rows} * heads));
          }
        }
      }
    }
  }
}

TEST(PagedAttention, LaterKeysChangeNoBitOfEarlierQueries) {
  // The same sequence, 40 tokens long and 64: queries 0..39 must not feel keys 40..63 in their last block.
  const BlockLayout layout = Layout(1, 64, 32, DType::kBF16);
  Kv kv(layout, 3);
  const AttentionSeq full = kv.Add(64, 0, 64), cut{full.blocks, 40, 0, 40};
  const std::vector<float> q = RandomFloats(64 * 2 * 64, 4);
  ThreadPool pool(1);
  const Result a = Attend(layout, std::span(&full, 1), q, 2, 64, NumericMode::kBatchInvariant, pool);
  const Result b = Attend(layout, std::span(&cut, 1), q, 2, 64, NumericMode::kBatchInvariant, pool);
  EXPECT_TRUE(SameBits(a.out.data(), b.out.data(), 40 * 2 * 64));
}

TEST(PagedAttention, FastModeSplitsALongDecodeContextWithinTolerance) {
  const BlockLayout layout = Layout(1, 64, 32, DType::kBF16);
  Kv kv(layout, 5);
  const std::vector<AttentionSeq> seqs = {kv.Add(1000, 1, 1)};
  const int heads = 4;
  const std::vector<float> q = RandomFloats(2 * heads * 64, 6, 2.0f);
  ThreadPool one(1), three(3);
  const Result whole = Attend(layout, seqs, q, heads, 2, NumericMode::kBatchInvariant, three);
  const Result split = Attend(layout, seqs, q, heads, 2, NumericMode::kFast, three);
  for (size_t i = 0; i < whole.out.size(); ++i) EXPECT_NEAR(split.out[i], whole.out[i], 1e-6);
  for (size_t i = 0; i < whole.lse.size(); ++i) EXPECT_NEAR(split.lse[i], whole.lse[i], 1e-5);
  // It did split (else this test shows nothing), and one thread has nothing to split for.
  EXPECT_FALSE(SameBits(split.out.data(), whole.out.data(), static_cast<int64_t>(whole.out.size())));
  const Result single = Attend(layout, seqs, q, heads, 2, NumericMode::kFast, one);
  EXPECT_TRUE(SameBits(single.out.data(), whole.out.data(), static_cast<int64_t>(whole.out.size())));
}

TEST(PagedAttention, WindowsAndSoftCapsMatchReference) {
  ThreadPool pool(2);
  uint64_t seed = 100;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const uint32_t dim : {8u, 20u, 64u}) {
      for (const int group : {1, 3}) {
        for (const uint32_t block_tokens : {5u, 16u, 32u}) {
          for (const int32_t window : {0, 1, 2, 7, 16, 33, 99, 100, 4000}) {
            for (const float softcap : {0.0f, 2.0f}) {
              const BlockLayout layout = Layout(2, dim, block_tokens, dtype);
              const int heads = 2 * group;
              Kv kv(layout, seed++);
              const std::vector<AttentionSeq> seqs = {kv.Add(1, 0, 1), kv.Add(70, 1, 1), kv.Add(41, 2, 41),
                                                      kv.Add(100, 43, 40)};
              const int64_t rows = 83, width = heads * int64_t{dim};
              const std::vector<float> q = RandomFloats(rows * width, seed++, 3.0f);
              std::vector<double> want(static_cast<size_t>(rows * width)),
                  want_lse(static_cast<size_t>(rows * heads));
              PagedAttentionRef(layout, kLayer, seqs, q.data(), width, heads,
                                ScaledFor(layout, window, softcap), want.data(), want_lse.data());
              const Result got =
                  Attend(layout, seqs, q, heads, rows, NumericMode::kFast, pool, window, softcap);
              SCOPED_TRACE(testing::Message() << layout.ToString() << " group " << group << " window "
                                              << window << " cap " << softcap);
              ExpectNear(got.out, want, 1e-5, 0);
              ExpectNear(got.lse, want_lse, 1e-5, 1e-6);
            }
          }
        }
      }
    }
  }
}

TEST(PagedAttention, WindowedQueryBitsDoNotDependOnChunkingBatchOrThreads) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int32_t window : {1, 3, 40, 64, 290}) {
      const BlockLayout layout = Layout(2, 40, 32, dtype);
      const int heads = 6;
      const int32_t context = 300;
      const int64_t width = heads * 40;
      Kv kv(layout, 17);
      const AttentionSeq whole = kv.Add(context, 0, context), other = kv.Add(90, context, 1);
      const std::vector<float> q = RandomFloats((context + 1) * width, 18, 2.0f);
      ThreadPool one(1), three(3);
      const std::vector<AttentionSeq> together = {other, whole};
      const Result want =
          Attend(layout, together, q, heads, context + 1, NumericMode::kBatchInvariant, three, window, 5.0f);
      for (const int32_t chunk : {1, 2, 7, 33, 150}) {
        for (int32_t begin = 0; begin < context; begin += chunk) {
          const int32_t rows = std::min(chunk, context - begin);
          const AttentionSeq part{whole.blocks, begin + rows, 0, rows};
          const std::vector<float> part_q(q.begin() + begin * width, q.begin() + (begin + rows) * width);
          const Result got = Attend(layout, std::span(&part, 1), part_q, heads, rows,
                                    NumericMode::kBatchInvariant, chunk == 7 ? three : one, window, 5.0f);
          ASSERT_TRUE(SameBits(got.out.data(), want.out.data() + begin * width, rows * width))
              << "chunk " << chunk << " at " << begin << " window " << window;
          ASSERT_TRUE(
              SameBits(got.lse.data(), want.lse.data() + int64_t{begin} * heads, int64_t{rows} * heads));
        }
      }
    }
  }
}

TEST(PagedAttention, KeysBeforeTheWindowAreNotReadAndAWideWindowIsNone) {
  const BlockLayout layout = Layout(1, 64, 32, DType::kF32);
  Kv kv(layout, 31);
  const AttentionSeq seq = kv.Add(100, 0, 3);
  const std::vector<float> q = RandomFloats(3 * 2 * 64, 32);
  ThreadPool pool(1);
  const Result all = Attend(layout, std::span(&seq, 1), q, 2, 3, NumericMode::kBatchInvariant, pool);
  const Result wide = Attend(layout, std::span(&seq, 1), q, 2, 3, NumericMode::kBatchInvariant, pool, 100);
  EXPECT_EQ(all.out, wide.out);
  const Result before = Attend(layout, std::span(&seq, 1), q, 2, 3, NumericMode::kBatchInvariant, pool, 10);
  // Ruins everything before key 88, the first that any query sees: blocks 0 and 1 and part of block 2.
  for (uint32_t key = 0; key < 88; ++key) {
    for (const bool v : {false, true}) {
      std::byte* at = const_cast<std::byte*>(seq.blocks[key / 32]) + layout.Offset(kLayer, v, 0, key % 32);
      std::memset(at, 0xff, 64 * sizeof(float));
    }
  }
  const Result after = Attend(layout, std::span(&seq, 1), q, 2, 3, NumericMode::kBatchInvariant, pool, 10);
  EXPECT_TRUE(SameBits(before.out.data(), after.out.data(), static_cast<int64_t>(after.out.size())));
}

TEST(PagedAttention, FastModeSplitsAWindowTooWithinTolerance) {
  const BlockLayout layout = Layout(1, 64, 32, DType::kBF16);
  Kv kv(layout, 5);
  const std::vector<AttentionSeq> seqs = {kv.Add(2000, 0, 1)};
  const std::vector<float> q = RandomFloats(4 * 64, 6, 2.0f);
  ThreadPool three(3);
  const Result whole = Attend(layout, seqs, q, 4, 1, NumericMode::kBatchInvariant, three, 999);
  const Result split = Attend(layout, seqs, q, 4, 1, NumericMode::kFast, three, 999);
  for (size_t i = 0; i < whole.out.size(); ++i) EXPECT_NEAR(split.out[i], whole.out[i], 1e-6);
  EXPECT_FALSE(SameBits(split.out.data(), whole.out.data(), static_cast<int64_t>(whole.out.size())));
}

TEST(PagedAttention, LargeScoresStayFinite) {
  const BlockLayout layout = Layout(1, 16, 32, DType::kF32);
  Kv kv(layout, 7);
  const std::vector<AttentionSeq> seqs = {kv.Add(100, 0, 3)};
  const std::vector<float> q = RandomFloats(3 * 16, 8, 1e4f);
  ThreadPool pool(1);
  std::vector<double> want(3 * 16), want_lse(3);
  PagedAttentionRef(layout, kLayer, seqs, q.data(), 16, 1, ScaledFor(layout), want.data(), want_lse.data());
  const Result got = Attend(layout, seqs, q, 1, 3, NumericMode::kFast, pool);
  // Scores of about 1e4 carry an error of 1e4 * 2^-24 * a few in the exponent.
  ExpectNear(got.out, want, 2e-2, 0);
  ExpectNear(got.lse, want_lse, 0, 1e-5);
}

TEST(PagedAttention, ReadsQueriesFromAFusedBufferAndLseMayBeNull) {
  const BlockLayout layout = Layout(2, 8, 32, DType::kF32);
  Kv kv(layout, 9);
  const std::vector<AttentionSeq> seqs = {kv.Add(33, 0, 5)};
  const std::vector<float> q = RandomFloats(5 * 32, 10);
  std::vector<float> fused(5 * 50, 99.0f), out(5 * 32);
  for (size_t r = 0; r < 5; ++r) std::memcpy(&fused[r * 50], &q[r * 32], 32 * sizeof(float));
  ThreadPool pool(1);
  ASSERT_TRUE(PagedAttention(layout, kLayer, seqs, fused.data(), 50, 4, ScaledFor(layout), out.data(),
                             nullptr, NumericMode::kFast, pool)
                  .ok());
  const Result want = Attend(layout, seqs, q, 4, 5, NumericMode::kFast, pool);
  EXPECT_EQ(out, want.out);
}

TEST(PagedAttention, RefusesBadArguments) {
  const BlockLayout layout = Layout(2, 8, 32, DType::kF32);
  Kv kv(layout, 11);
  const AttentionSeq good = kv.Add(40, 0, 2);
  std::vector<float> q(2 * 32), out(2 * 32);
  ThreadPool pool(1);
  const auto code = [&](BlockLayout l, uint32_t layer, AttentionSeq seq, int64_t stride, int heads) {
    return PagedAttention(l, layer, std::span(&seq, 1), q.data(), stride, heads, {}, out.data(), nullptr,
                          NumericMode::kFast, pool)
        .code();
  };
  EXPECT_EQ(code(layout, 0, good, 32, 4), absl::StatusCode::kOk);
  EXPECT_EQ(code(layout, 2, good, 32, 4), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(layout, 0, good, 32, 3), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(layout, 0, good, 31, 4), absl::StatusCode::kInvalidArgument);
  AttentionSeq bad = good;
  bad.context = 1;
  EXPECT_EQ(code(layout, 0, bad, 32, 4), absl::StatusCode::kInvalidArgument);
  bad = good;
  bad.q_len = -1;
  EXPECT_EQ(code(layout, 0, bad, 32, 4), absl::StatusCode::kInvalidArgument);
  const std::byte* holes[2] = {good.blocks[0], nullptr};
  bad = good;
  bad.blocks = holes;
  EXPECT_EQ(code(layout, 0, bad, 32, 4), absl::StatusCode::kInvalidArgument);
  for (const AttentionOptions& options :
       {AttentionOptions{.window = -1}, AttentionOptions{.softcap = -1}, AttentionOptions{.softcap = NAN}}) {
    EXPECT_EQ(PagedAttention(layout, 0, std::span(&good, 1), q.data(), 32, 4, options, out.data(), nullptr,
                             NumericMode::kFast, pool)
                  .code(),
              absl::StatusCode::kInvalidArgument);
  }
  BlockLayout half = layout;
  half.dtype = DType::kF16;
  EXPECT_EQ(code(half, 0, good, 32, 4), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(
      PagedAttention(layout, 0, {}, nullptr, 32, 4, {}, nullptr, nullptr, NumericMode::kFast, pool).ok());
}

TEST(PagedAttention, Avx2AndAvx512AgreeBitForBit) {
  if (!Cpu().avx512) GTEST_SKIP() << "this CPU has no AVX-512";
  for (const int dim : {16, 48, 128}) {
    const BlockLayout layout = Layout(1, static_cast<uint32_t>(dim), 32, DType::kBF16);
    Kv kv(layout, 21);
    const int rows = 13;
    const AttentionSeq seq = kv.Add(77, 0, rows);
    const std::vector<float> q = RandomFloats(rows * dim, 22);
    std::vector<int32_t> visible, start;
    for (int r = 0; r < rows; ++r) visible.push_back(77 - rows + r + 1);
    for (int r = 0; r < rows; ++r) start.push_back(visible[r] - 35);
    const auto run = [&](void (*kernel)(const AttentionTile&), bool window) {
      const size_t d = static_cast<size_t>(dim);
      std::vector<float> k(32 * d), v(32 * d), scores(rows * 32), correction(rows), max(rows), sum(rows),
          out(rows * d), lse(rows);
      AttentionTile t;
      t.blocks = seq.blocks;
      t.k_offset = layout.Offset(kLayer, false, 0, 0);
      t.v_offset = layout.Offset(kLayer, true, 0, 0);
      t.block_tokens = 32;
      t.head_dim = t.padded_dim = dim;
      t.end_block = 3;
      t.rows = rows;
      t.visible = visible.data();
      if (window) {
        t.start = start.data();
        t.softcap = 1.5f;
      }
      t.q = q.data();
      t.k_tile = k.data();
      t.v_tile = v.data();
      t.scores = scores.data();
      t.correction = correction.data();
      t.max = max.data();
      t.sum = sum.data();
      t.out = out.data();
      t.lse = lse.data();
      kernel(t);
      out.insert(out.end(), lse.begin(), lse.end());
      return out;
    };
    for (const bool window : {false, true}) {
      EXPECT_EQ(run(RunAttentionTileAvx2, window), run(RunAttentionTileAvx512, window)) << "dim " << dim;
    }
  }
}

}  // namespace
}  // namespace tidepool
