#include "server/structured/compiled_grammar.h"

#include <cstring>
#include <span>

#include "base/digest.h"
#include "base/rng.h"
#include "tests/server/structured/grammar_testing.h"

namespace tidepool {
namespace {

constexpr size_t kHeader = 16, kChecksumAt = 8;

void FixChecksum(std::string& bytes) {
  const uint64_t sum = PayloadChecksum(std::as_bytes(std::span(bytes).subspan(kHeader)));
  std::memcpy(bytes.data() + kChecksumAt, &sum, sizeof sum);
}

Grammar Sample() {
  return *CompileSchema(R"({"type": "object", "properties": {"a": {"type": "string", "maxLength": 9},
    "b": {"type": "array", "items": {"$ref": "#"}}, "c": {"type": "number", "minimum": 1}}})");
}

TEST(CompiledGrammar, SurvivesItsJourney) {
  const Grammar made = Sample();
  const auto parsed = CompiledGrammar::Parse(made->bytes());
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ((*parsed)->bytes(), made->bytes());
  EXPECT_EQ((*parsed)->digest(), made->digest());
  EXPECT_EQ((*parsed)->state_count(), made->state_count());
  EXPECT_GE((*parsed)->memory_bytes(), made->bytes().size());
  EXPECT_TRUE(Matches(*parsed, R"({"a":"x","b":[{}],"c":2})"));
  EXPECT_FALSE(Matches(*parsed, R"({"a":"0123456789"})"));
  EXPECT_EQ(Sample()->bytes(), made->bytes()) << "equal sources give equal bytes";
}

TEST(CompiledGrammar, DamageIsNoticed) {
  const std::string good = Sample()->bytes();
  for (const size_t length : {size_t{0}, size_t{3}, size_t{15}, size_t{16}, good.size() - 1}) {
    EXPECT_EQ(CompiledGrammar::Parse(good.substr(0, length)).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
  for (size_t at = 0; at < good.size(); at += 7) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x10);
    EXPECT_FALSE(CompiledGrammar::Parse(bad).ok()) << at;
  }
}

TEST(CompiledGrammar, HostileBytesAreRefusedOrSound) {
  // The checksum is no secret: bytes that a stranger made with care.
  const std::string good = Sample()->bytes();
  Rng rng(5);
  int accepted = 0;
  std::vector<uint32_t> mask(SmallTable()->mask_words());
  for (int round = 0; round < 3000; ++round) {
    std::string bad = good;
    const uint64_t changes = 1 + rng.Below(3);
    for (uint64_t i = 0; i < changes; ++i) {
      const size_t at = kHeader + rng.Below(bad.size() - kHeader);
      bad[at] = static_cast<char>(rng.Chance(0.5) ? rng.Below(256) : (rng.Chance(0.5) ? 0xFF : bad[at] ^ 1));
    }
    if (rng.Chance(0.1)) bad.resize(kHeader + rng.Below(bad.size() - kHeader));
    FixChecksum(bad);
    const auto parsed = CompiledGrammar::Parse(bad);
    if (!parsed.ok()) continue;
    ++accepted;
    Matcher matcher(*parsed, SmallTable(), nullptr, "");
    for (int step = 0; step < 20 && !matcher.MustEnd(); ++step) {
      ASSERT_TRUE(matcher.FillMask(mask).ok()) << "a dead end";
      int32_t first = 0;
      const auto start = static_cast<int32_t>(rng.Below(static_cast<uint64_t>(SmallTable()->vocab_size())));
      for (int32_t i = 0; i < SmallTable()->vocab_size(); ++i) {
        first = (start + i) % SmallTable()->vocab_size();
        if ((mask[static_cast<size_t>(first) / 32] >> (first % 32) & 1) != 0) break;
      }
      ASSERT_TRUE(matcher.Accept(first).ok() || matcher.CanEnd());
    }
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace tidepool
