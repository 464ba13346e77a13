#include "base/block_layout.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

TEST(BlockLayout, OrdersLayerThenKvThenHeadThenToken) {
  const BlockLayout l{.layers = 3, .kv_heads = 2, .head_dim = 8, .block_tokens = 4, .dtype = DType::kBF16};
  EXPECT_EQ(l.block_bytes(), 3u * 2 * 2 * 4 * 8 * 2);
  EXPECT_EQ(l.Offset(0, false, 0, 1), 16u);
  EXPECT_EQ(l.Offset(0, false, 1, 0), 4u * 16);
  EXPECT_EQ(l.Offset(0, true, 0, 0), 2u * 4 * 16);
  EXPECT_EQ(l.Offset(1, false, 0, 0), l.layer_bytes());
  EXPECT_EQ(l.Offset(2, true, 1, 3) + 8 * 2, l.block_bytes()) << "the last vector ends the block";
}

TEST(BlockLayout, CountsBytesPerTokenOverAllLayers) {
  const BlockLayout l{
      .layers = 32, .kv_heads = 8, .head_dim = 128, .block_tokens = 32, .dtype = DType::kBF16};
  EXPECT_EQ(l.bytes_per_token(), 128u << 10) << "Llama-3.1-8B: 128 KiB of KV a token";
}

}  // namespace
}  // namespace tidepool
