#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/structured/grammar_cache.h"
#include "server/structured/mask_cache.h"
#include "tests/server/structured/grammar_testing.h"

namespace tidepool {
namespace {

Grammar Literal(int i) { return *CompileRegex(absl::StrCat("value ", i)); }

TEST(GrammarCache, KeysTellSaltAndSourceApart) {
  EXPECT_EQ(GrammarCache::Key("s", "x"), GrammarCache::Key("s", "x"));
  EXPECT_NE(GrammarCache::Key("s", "x"), GrammarCache::Key("t", "x"));
  EXPECT_NE(GrammarCache::Key("s", "xy"), GrammarCache::Key("sx", "y"));
}

TEST(GrammarCache, HoldsItsByteCapAndDropsTheOldest) {
  const size_t one = Literal(1)->memory_bytes();
  GrammarCache cache(one * 4);
  for (int i = 0; i < 10; ++i) {
    cache.Put(GrammarCache::Key("", absl::StrCat(i)), Literal(i));
    EXPECT_LE(cache.stats().bytes, one * 4);
    EXPECT_NE(cache.Find(GrammarCache::Key("", "0")) == nullptr, i < 10 && cache.stats().entries > 0)
        << "used last";
  }
  EXPECT_GT(cache.stats().evictions, 0u);
  EXPECT_NE(cache.Find(GrammarCache::Key("", "0")), nullptr) << "it was looked for each time";
  EXPECT_EQ(cache.Find(GrammarCache::Key("", "1")), nullptr);
}

TEST(GrammarCache, MakesOnceAndKeepsNoErrors) {
  GrammarCache cache(1 << 20);
  int made = 0;
  const auto make = [&]() -> absl::StatusOr<Grammar> {
    if (++made == 1) return absl::InvalidArgumentError("no");
    return Literal(1);
  };
  EXPECT_FALSE(cache.FindOrMake("k", make).ok());
  EXPECT_TRUE(cache.FindOrMake("k", make).ok());
  EXPECT_TRUE(cache.FindOrMake("k", make).ok());
  EXPECT_EQ(made, 2);
  GrammarCache tiny(10);
  EXPECT_TRUE(tiny.FindOrMake("k", make).ok());
  EXPECT_EQ(tiny.stats().entries, 0u) << "larger than the cache";
}

TEST(MaskCache, HoldsItsByteCap) {
  MaskCache cache(10'000);
  for (uint64_t i = 0; i < 100; ++i) {
    cache.PutMask({i, i}, std::make_shared<const std::vector<uint32_t>>(200, 1u));
    EXPECT_LE(cache.stats().bytes, 10'000u);
  }
  EXPECT_GT(cache.stats().evictions, 0u);
  EXPECT_NE(cache.FindMask({99, 99}), nullptr);
  EXPECT_EQ(cache.FindMask({0, 0}), nullptr);
  cache.PutMask({7, 8}, std::make_shared<const std::vector<uint32_t>>(20'000, 1u));
  EXPECT_EQ(cache.FindMask({7, 8}), nullptr) << "larger than the cache";
}

TEST(MaskCache, ScopesDoNotMeet) {
  // A grammar whose classes are its own: the second tenant computes them again, the second request does not.
  const Grammar grammar = *CompileSchema(R"({"type": "string", "pattern": "^[a-z ]*x[a-z ]*$"})");
  MaskCache cache(size_t{8} << 20);
  std::vector<uint32_t> mask(SmallTable()->mask_words());
  const auto classes = [&](std::string_view scope) {
    Matcher matcher(grammar, SmallTable(), &cache, scope);
    EXPECT_TRUE(matcher.AcceptBytes("\"").ok());
    EXPECT_TRUE(matcher.FillMask(mask).ok());
    return matcher.stats().classes;
  };
  EXPECT_GT(classes("a"), 0u);
  EXPECT_EQ(classes("a"), 0u);
  EXPECT_GT(classes("b"), 0u);
}

TEST(MaskCache, ManyThreadsShareOne) {
  const Grammar grammar = *CompileSchema(R"({"type": "object"})");
  MaskCache cache(200'000);
  Matcher::Warm(*SmallTable(), cache);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      std::vector<uint32_t> mask(SmallTable()->mask_words());
      for (int round = 0; round < 20; ++round) {
        Matcher matcher(grammar, SmallTable(), &cache, "s");
        for (const char c : std::string_view(R"({"name":[1,2.5,{"a":"b\n"}],"z":null})")) {
          ASSERT_TRUE(matcher.FillMask(mask).ok());
          ASSERT_TRUE(mask[static_cast<uint8_t>(c) / 32] >> (static_cast<uint8_t>(c) % 32) & 1);
          ASSERT_TRUE(matcher.Accept(static_cast<uint8_t>(c)).ok());
        }
        ASSERT_TRUE(matcher.MustEnd());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace tidepool
