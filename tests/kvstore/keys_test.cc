#include "kvstore/keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <set>

namespace tidepool {
namespace {

const BlockLayout kLayout{.layers = 2, .kv_heads = 2, .head_dim = 8, .block_tokens = 4, .dtype = DType::kF32};

std::vector<int32_t> Tokens(size_t n) {
  std::vector<int32_t> out(n);
  std::iota(out.begin(), out.end(), 100);
  return out;
}

TEST(Keys, RootIsSha256OverLengthPrefixedFields) {
  Sha256 h;
  const std::string layout = "l2 h2 d8 b4 float32";
  h.UpdateU64(2).Update(std::string_view("fp")).UpdateU64(layout.size()).Update(std::string_view(layout));
  h.UpdateU64(4).Update(std::string_view("salt"));
  EXPECT_EQ(RootKey("fp", kLayout, "salt", "").bytes, h.Finish());
}

TEST(Keys, ChildIsSha256OverParentCountAndLittleEndianTokens) {
  const BlockKey root = RootKey("fp", kLayout, "salt", "");
  const int32_t tokens[] = {1, 0x01020304, -1};
  Sha256 h;
  h.Update(root.bytes).UpdateU64(3);
  const uint8_t le[] = {1, 0, 0, 0, 4, 3, 2, 1, 255, 255, 255, 255};
  h.Update(std::span<const uint8_t>(le));
  EXPECT_EQ(ChildKey(root, tokens).bytes, h.Finish());
}

TEST(Keys, LongBlocksAreHashedWhole) {
  // More tokens than the encoder's buffer holds: the last one still counts.
  const BlockKey root = RootKey("fp", kLayout, "", "");
  auto a = Tokens(1000), b = a;
  b.back() ^= 1;
  EXPECT_NE(ChildKey(root, a), ChildKey(root, b));
  b = a;
  b.front() ^= 1;
  EXPECT_NE(ChildKey(root, a), ChildKey(root, b));
}

TEST(Keys, RootsDifferByModelLayoutTenantAndCodec) {
  std::set<BlockKey> roots;
  roots.insert(RootKey("fp", kLayout, "salt", ""));
  roots.insert(RootKey("fp2", kLayout, "salt", ""));
  roots.insert(RootKey("fp", kLayout, "salt2", ""));
  roots.insert(RootKey("fp", kLayout, "", ""));
  roots.insert(RootKey("fp", kLayout, "salt", "int8"));
  roots.insert(RootKey("fp", kLayout, "salt", "fp8"));
  for (auto change : {+[](BlockLayout& l) { l.layers++; }, +[](BlockLayout& l) { l.kv_heads++; },
                      +[](BlockLayout& l) { l.head_dim++; }, +[](BlockLayout& l) { l.block_tokens++; },
                      +[](BlockLayout& l) { l.dtype = DType::kBF16; }}) {
    BlockLayout l = kLayout;
    change(l);
    roots.insert(RootKey("fp", l, "salt", ""));
  }
  EXPECT_EQ(roots.size(), 11u);
  // Keys of exact blocks are what they were before there were codecs.
  EXPECT_EQ(RootKey("fp", kLayout, "salt", "none"), RootKey("fp", kLayout, "salt", ""));
}

TEST(Keys, FieldBoundariesCannotBeShifted) {
  EXPECT_NE(RootKey("ab", kLayout, "c", ""), RootKey("a", kLayout, "bc", ""));
  EXPECT_NE(RootKey("a", kLayout, "", ""), RootKey("", kLayout, "a", ""));
}

TEST(Keys, OnlySealedBlocksAreNamed) {
  const BlockKey root = RootKey("fp", kLayout, "", "");
  EXPECT_THAT(BlockKeys(root, Tokens(0), 4), testing::IsEmpty());
  EXPECT_THAT(BlockKeys(root, Tokens(3), 4), testing::IsEmpty());
  EXPECT_THAT(BlockKeys(root, Tokens(4), 4), testing::SizeIs(1));
  EXPECT_THAT(BlockKeys(root, Tokens(11), 4), testing::SizeIs(2));
  EXPECT_THAT(BlockKeys(root, Tokens(11), 0), testing::IsEmpty());
}

TEST(Keys, EachKeyChainsItsPredecessor) {
  const BlockKey root = RootKey("fp", kLayout, "", "");
  const auto tokens = Tokens(12);
  const auto keys = BlockKeys(root, tokens, 4);
  ASSERT_EQ(keys.size(), 3u);
  BlockKey parent = root;
  for (size_t i = 0; i < 3; ++i) {
    parent = ChildKey(parent, std::span(tokens).subspan(4 * i, 4));
    EXPECT_EQ(keys[i], parent);
  }
}

TEST(Keys, EqualPrefixesShareKeysAndDivergeForGood) {
  const BlockKey root = RootKey("fp", kLayout, "", "");
  auto a = Tokens(16), b = a;
  b[5] = 7;  // in the second block
  const auto ka = BlockKeys(root, a, 4), kb = BlockKeys(root, b, 4);
  EXPECT_EQ(ka[0], kb[0]);
  for (size_t i = 1; i < 4; ++i) EXPECT_NE(ka[i], kb[i]) << "block " << i;
}

TEST(Keys, TailKeyDiffersFromSealedKeyOfTheSameTokensPadded) {
  const BlockKey root = RootKey("fp", kLayout, "", "");
  const int32_t tail[] = {5, 0}, sealed[] = {5, 0, 0, 0};
  EXPECT_NE(ChildKey(root, tail), ChildKey(root, sealed));
}

}  // namespace
}  // namespace tidepool
