#include "kernels/kv_write.h"

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

class KvWriteTest : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Dtypes, KvWriteTest, testing::Values(DType::kF32, DType::kBF16));

TEST_P(KvWriteTest, ScattersEachTokenToItsSlotAndTouchesNothingElse) {
  ThreadPool pool(2);
  for (const uint32_t dim : {1u, 5u, 8u, 64u}) {
    const BlockLayout layout{
        .layers = 3, .kv_heads = 2, .head_dim = dim, .block_tokens = 4, .dtype = GetParam()};
    std::vector<std::byte> a(layout.block_bytes(), std::byte{0xcd}), b = a;
    const std::vector<KvSlot> slots = {{a.data(), 3}, {b.data(), 0}, {a.data(), 1}};
    const int64_t stride = 2 * dim + 3;
    const std::vector<float> k = RandomFloats(3 * stride, 1), v = RandomFloats(3 * stride, 2);
    ASSERT_TRUE(KvWrite(layout, 1, slots, k.data(), v.data(), stride, pool).ok());

    std::vector<std::byte> want_a(layout.block_bytes(), std::byte{0xcd}), want_b = want_a;
    for (size_t t = 0; t < slots.size(); ++t) {
      for (uint32_t h = 0; h < 2; ++h) {
        for (uint32_t d = 0; d < dim; ++d) {
          for (const bool is_v : {false, true}) {
            const float value = (is_v ? v : k)[t * static_cast<size_t>(stride) + h * dim + d];
            std::byte* to = (slots[t].block == a.data() ? want_a : want_b).data() +
                            layout.Offset(1, is_v, h, slots[t].offset) + d * DTypeBytes(GetParam());
            if (GetParam() == DType::kF32) {
              std::memcpy(to, &value, 4);
            } else {
              const BF16 rounded = ToBF16(value);
              std::memcpy(to, &rounded, 2);
            }
          }
        }
      }
    }
    EXPECT_EQ(a, want_a);
    EXPECT_EQ(b, want_b);
    std::vector<float> read(dim);
    KvRead(layout, 1, true, 1, b.data(), 0, read.data());
    EXPECT_NEAR(read[0], v[static_cast<size_t>(stride) + dim], 0.005);
  }
}

TEST(KvWrite, RefusesBadSlotsAndWritesNothing) {
  ThreadPool pool(1);
  const BlockLayout layout{
      .layers = 1, .kv_heads = 1, .head_dim = 2, .block_tokens = 4, .dtype = DType::kF32};
  std::vector<std::byte> block(layout.block_bytes()), before = block;
  const std::vector<float> x(4, 1.0f);
  const auto code = [&](BlockLayout l, uint32_t layer, KvSlot bad, int64_t stride) {
    const std::vector<KvSlot> slots = {{block.data(), 0}, bad};
    return KvWrite(l, layer, slots, x.data(), x.data(), stride, pool).code();
  };
  EXPECT_EQ(code(layout, 0, {block.data(), 4}, 2), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(layout, 0, {nullptr, 0}, 2), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(layout, 1, {block.data(), 1}, 2), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(layout, 0, {block.data(), 1}, 1), absl::StatusCode::kInvalidArgument);
  BlockLayout half = layout;
  half.dtype = DType::kF16;
  EXPECT_EQ(code(half, 0, {block.data(), 1}, 2), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(block, before);
  EXPECT_TRUE(KvWrite(layout, 0, {}, nullptr, nullptr, 2, pool).ok());
}

}  // namespace
}  // namespace tidepool
