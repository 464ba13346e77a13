// The hand-written scanners against the regexes that they stand for, run by PCRE2 on random text.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/rng.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/pretokenizer_scan.h"
#include "server/model/text/regex.h"
#include "server/model/text/unicode_classes.h"

namespace tidepool {
namespace {

std::string Llama3(const std::string& digits) {
  return R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})" + digits +
         R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
}

std::string RandomText(Rng& rng) {
  static const char* const kParts[] = {" ",
                                       "  ",
                                       "\n",
                                       "\r\n",
                                       "\r",
                                       "\t",
                                       "\v",
                                       "\x1c",
                                       "\u00a0",
                                       "\u3000",
                                       "\u2028",
                                       "\u180e",
                                       "\u200b",
                                       "'",
                                       "'s",
                                       "'S",
                                       "'t",
                                       "'Re",
                                       "'lL",
                                       "'ll",
                                       "'ve",
                                       "'d",
                                       "'\u017f",
                                       "a",
                                       "Z",
                                       "é",
                                       "ß",
                                       "中",
                                       "ア",
                                       "한",
                                       "١",
                                       "½",
                                       "²",
                                       "Ⅷ",
                                       "1",
                                       "23",
                                       "4567",
                                       "!",
                                       "...",
                                       "_",
                                       "<|x|>",
                                       "😀",
                                       "👨‍👩‍👧",
                                       "\u0301",
                                       "\u093e",
                                       "\u0e31",
                                       "the",
                                       "\U000105c0",
                                       "\U0001ccf0"};
  std::string text;
  for (uint64_t i = 0, n = rng.Below(14); i < n; ++i) {
    if (rng.Below(8) == 0) {
      const auto cp = static_cast<uint32_t>(rng.Below(2) == 0 ? rng.Below(0x3000) : rng.Below(0x32000));
      utf8::Append(cp >= 0xD800 && cp < 0xE000 ? 'x' : cp, text);
    } else {
      text += kParts[rng.Below(std::size(kParts))];
    }
  }
  return text;
}

TEST(SplitScanner, MatchesWhatTheRegexMatches) {
  for (const std::string& pattern :
       {std::string(SplitScanner::kGpt2Pattern), Llama3(""), Llama3("{1,2}"), Llama3("{1,3}")}) {
    const auto scanner = SplitScanner::For(pattern);
    ASSERT_TRUE(scanner) << pattern;
    const auto regex = Regex::Compile(pattern);
    ASSERT_TRUE(regex.ok()) << regex.status();
    Rng rng(3);
    for (int round = 0; round < 100'000; ++round) {
      const std::string text = RandomText(rng);
      std::vector<Regex::Span> want, got;
      ASSERT_TRUE(regex->FindAll(text, want).ok());
      scanner->Scan(text, 0, got);
      bool equal = want.size() == got.size();
      for (size_t i = 0; equal && i < got.size(); ++i) {
        equal = got[i].begin == want[i].begin && got[i].end == want[i].end;
      }
      ASSERT_TRUE(equal) << pattern << " on " << nlohmann::json(text);
    }
  }
}

TEST(SplitScanner, CoversTheText) {
  const auto scanner = SplitScanner::For(Llama3("{1,3}"));
  Rng rng(4);
  for (int round = 0; round < 1000; ++round) {
    const std::string text = RandomText(rng);
    std::vector<Regex::Span> spans;
    scanner->Scan(text, 7, spans);
    uint32_t done = 7;
    for (const Regex::Span& span : spans) {
      EXPECT_EQ(span.begin, done);
      EXPECT_LT(span.begin, span.end);
      done = span.end;
    }
    EXPECT_EQ(done, 7 + text.size());
  }
}

TEST(SplitScanner, KnowsOnlyExactSpellings) {
  EXPECT_FALSE(SplitScanner::For(""));
  EXPECT_FALSE(SplitScanner::For(Llama3("{1,4}")));
  EXPECT_FALSE(SplitScanner::For(Llama3("+")));
  EXPECT_FALSE(SplitScanner::For(R"(\p{L}+)"));
}

// --- the regex engine as the library's ---

std::string Cut(const std::string& pattern, const std::string& text) {
  const auto regex = Regex::Compile(pattern);
  EXPECT_TRUE(regex.ok()) << regex.status();
  std::vector<Regex::Span> spans;
  EXPECT_TRUE(regex->FindAll(text, spans).ok());
  std::string out;
  for (const Regex::Span& s : spans) out += text.substr(s.begin, s.end - s.begin) + "|";
  return out;
}

TEST(Regex, PropertiesAreThoseOfTheLibrarysEngine) {
  // Unicode 16: PCRE2 10.42 does not know these letters and digits.
  EXPECT_EQ(Cut(R"(\p{L}+)", "a\U000105C0b"), "a\U000105C0b|");
  EXPECT_EQ(Cut(R"([^\p{L}]+)", "1\U000105C0"), "1|");
  EXPECT_EQ(Cut(R"(\p{N})", "\U0001CCF0"), "\U0001CCF0|");
  EXPECT_EQ(Cut(R"(\P{L}+)", "1\U000105C0"), "1|");
  // U+180E is white space to PCRE2 only; marks are word characters to Oniguruma only.
  EXPECT_EQ(Cut(R"(\s+)", " \u180E\u3000"), " |\u3000|");
  EXPECT_EQ(Cut(R"([\S]+)", "a\u180E b"), "a\u180E|b|");
  EXPECT_EQ(Cut(R"(\w+)", "e\u0301①"), "e\u0301|");
  EXPECT_EQ(Cut(R"([^\S\n]+)", "a \n\t"), " |\t|");
  EXPECT_EQ(Cut(R"(\h+)", "xfaceg"), "face|");
  EXPECT_EQ(Cut("^a", "a\na"), "a|a|");  // Ruby's ^ is a line's
}

TEST(Regex, RefusesWhatWouldMeanSomethingElse) {
  EXPECT_EQ(Regex::Compile("[a&&b]").status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(Regex::Compile("[a[bc]]").status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(Regex::Compile("(").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Regex::Compile(std::string(20'000, 'a')).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Regex::Compile(std::string(1000, '(') + std::string(1000, ')')).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(Regex, CatastrophicPatternsEndInAnError) {
  const auto regex = Regex::Compile("(a+)+$");
  ASSERT_TRUE(regex.ok());
  std::vector<Regex::Span> spans;
  const auto status = regex->FindAll(std::string(40, 'a') + "b", spans);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("too hard"), std::string::npos) << status;
}

}  // namespace
}  // namespace tidepool
