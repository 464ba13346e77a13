#include "kernels/embedding.h"

#include "tests/kernels/testing.h"

namespace tidepool {
namespace {

TEST(Embedding, GathersRowsExactly) {
  ThreadPool pool(2);
  for (const int64_t hidden : {1, 7, 64}) {
    const std::vector<float> f32 = ToFloats(ToBF16s(RandomFloats(50 * hidden, 1)));
    const std::vector<BF16> bf16 = ToBF16s(f32);
    const std::vector<int32_t> ids = {49, 0, 7, 7};
    for (const bool half : {false, true}) {
      std::vector<float> y(ids.size() * static_cast<size_t>(hidden));
      Embedding(half ? DType::kBF16 : DType::kF32, half ? static_cast<const void*>(bf16.data()) : f32.data(),
                hidden, ids, 1.0f, y.data(), pool);
      for (size_t t = 0; t < ids.size(); ++t) {
        EXPECT_TRUE(
            SameBits(y.data() + static_cast<int64_t>(t) * hidden, f32.data() + ids[t] * hidden, hidden));
      }
    }
  }
}

TEST(Embedding, ScalesInFloat32) {
  ThreadPool pool(1);
  const std::vector<BF16> table = ToBF16s({1.5f, -3.0f});
  const std::vector<int32_t> ids = {1, 0};
  std::vector<float> y(2);
  Embedding(DType::kBF16, table.data(), 1, ids, 55.4256f, y.data(), pool);
  EXPECT_EQ(y, (std::vector<float>{-3.0f * 55.4256f, 1.5f * 55.4256f}));
}

TEST(Embedding, WidensHalfPrecision) {
  ThreadPool pool(1);
  const std::vector<uint16_t> table = {0x3c00, 0xc000};  // 1, -2
  const std::vector<int32_t> ids = {1, 0};
  std::vector<float> y(2);
  Embedding(DType::kF16, table.data(), 1, ids, 1.0f, y.data(), pool);
  EXPECT_EQ(y, (std::vector<float>{-2.0f, 1.0f}));
}

TEST(Embedding, NoIdsIsANoOp) {
  ThreadPool pool(1);
  Embedding(DType::kF32, nullptr, 4, {}, 2.0f, nullptr, pool);
}

}  // namespace
}  // namespace tidepool
