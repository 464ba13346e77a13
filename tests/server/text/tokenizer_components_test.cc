// Normalizers, pre-tokenizers, models and decoders one by one, and what a hostile file may not do.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "server/model/text/charsmap.h"
#include "server/model/text/detokenizer.h"
#include "server/model/text/normalizer.h"
#include "server/model/text/pretokenizer.h"
#include "server/model/text/tokenizer.h"
#include "server/model/text/unicode_classes.h"

namespace tidepool {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;

std::string Normalized(const json& node, std::string text) {
  const auto normalizer = Normalizer::Parse(node, "normalizer");
  EXPECT_TRUE(normalizer.ok()) << normalizer.status();
  EXPECT_TRUE(normalizer->Apply(text).ok());
  return text;
}

TEST(Normalizer, FormsAreThoseOfUnicode) {
  EXPECT_EQ(Normalized({{"type", "NFC"}}, "e\u0301 \u1100\u1161\u11A8 \u0958"), "é 각 \u0915\u093C");
  EXPECT_EQ(Normalized({{"type", "NFD"}}, "é각"), "e\u0301\u1100\u1161\u11A8");
  EXPECT_EQ(Normalized({{"type", "NFKC"}}, "ﬁ①Ａ㎏ｶﾞ"), "fi1Akgガ");
  EXPECT_EQ(Normalized({{"type", "NFKD"}}, "½"), "1\u20442");
  // A mark finds its letter across marks of other classes, not across one of its own.
  EXPECT_EQ(Normalized({{"type", "NFC"}}, "a\u0323\u0302"), "\u1EAD");
  EXPECT_EQ(Normalized({{"type", "NFC"}}, "a\u0301\u0302"), "\u00E1\u0302");
  // The library's tables end before Unicode 12.1, which brought U+32FF.
  EXPECT_EQ(Normalized({{"type", "NFKC"}}, "\u32FF"), "\u32FF");
}

TEST(Normalizer, ManyMarksAreSortedInOrderOfTheirClass) {
  std::string text = "e";
  for (int i = 0; i < 100'000; ++i) text += "\u0301\u0323";
  const std::string out = Normalized({{"type", "NFD"}}, text);
  EXPECT_EQ(out.size(), text.size());
  EXPECT_EQ(out.substr(1, 4), "\u0323\u0323");
}

TEST(Normalizer, BertCleansSetsChineseOffAndStrips) {
  EXPECT_EQ(Normalized({{"type", "BertNormalizer"}, {"lowercase", true}}, "H\u00E9\x01\tÀ中x\u00A0"),
            "he a 中 x ");
  EXPECT_EQ(Normalized({{"type", "BertNormalizer"}, {"lowercase", false}}, "Hé"), "Hé");
  EXPECT_EQ(Normalized({{"type", "BertNormalizer"}, {"lowercase", false}, {"strip_accents", true}}, "Hé"),
            "He");
}

TEST(Normalizer, StripLowercaseAndAccents) {
  EXPECT_EQ(Normalized({{"type", "Strip"}, {"strip_left", true}, {"strip_right", false}}, "\u3000 a "), "a ");
  EXPECT_EQ(Normalized({{"type", "Lowercase"}}, "ÀİΣ"), "ài\u0307σ");
  EXPECT_EQ(Normalized({{"type", "StripAccents"}}, "e\u0301"), "e");
}

TEST(Normalizer, MarksFollowTheBytes) {
  const auto normalizer =
      Normalizer::Parse({{"type", "Sequence"},
                         {"normalizers",
                          {{{"type", "Prepend"}, {"prepend", ">"}},
                           {{"type", "Replace"}, {"pattern", {{"String", "b"}}}, {"content", "BB"}},
                           {{"type", "NFC"}}}}},
                        "normalizer");
  ASSERT_TRUE(normalizer.ok());
  std::string text = "abe\u0301c";
  std::vector<uint8_t> marks = {0, 1, 0, 1, 1, 0};  // b, and the accent
  Normalizer::Trace trace{&marks};
  ASSERT_TRUE(normalizer->Apply(text, trace).ok());
  EXPECT_EQ(text, ">aBBéc");
  EXPECT_EQ(marks, (std::vector<uint8_t>{0, 0, 1, 1, 1, 1, 0}));
  EXPECT_EQ(trace.front_bytes, 2u);
}

TEST(Normalizer, TellsWhetherTheFrontWasDropped) {
  const auto normalizer = Normalizer::Parse(
      {{"type", "Sequence"},
       {"normalizers", {{{"type", "Strip"}}, {{"type", "NFKC"}}, {{"type", "StripAccents"}}}}},
      "normalizer");
  ASSERT_TRUE(normalizer.ok());
  // U+0EB3 becomes a mark, which goes, and a letter: something of the front is left.
  std::string text = "\u0EB3";
  Normalizer::Trace trace;
  ASSERT_TRUE(normalizer->Apply(text, trace).ok());
  EXPECT_EQ(text, "\u0EB2");
  EXPECT_EQ(trace.front_bytes, 3u);
  text = " a";
  ASSERT_TRUE(normalizer->Apply(text, trace).ok());
  EXPECT_EQ(trace.front_bytes, 0u);
}

json Repeat(const char* list, const json& item, int times) {
  json node = {{"type", "Sequence"}, {list, json::array()}};
  for (int i = 0; i < times; ++i) node[list].push_back(item);
  return node;
}

TEST(Normalizer, GrowthIsBounded) {
  const json twice = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
  EXPECT_EQ(Normalizer::Parse(Repeat("normalizers", twice, 40), "normalizer").status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto normalizer = Normalizer::Parse(Repeat("normalizers", twice, 30), "normalizer");
  ASSERT_TRUE(normalizer.ok()) << normalizer.status();
  std::string text(1000, 'a');
  const auto status = normalizer->Apply(text);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("normalizer makes more than"), std::string::npos) << status;
}

TEST(Charsmap, HostileMapsAreRefusedOrHarmless) {
  const auto parse = [](const std::string& bytes) {
    std::string base64;
    absl::Base64Escape(bytes, &base64);
    return Charsmap::Parse(base64);
  };
  EXPECT_EQ(Charsmap::Parse("%").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(parse("").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(parse(std::string("\xFF\xFF\xFF\x7F", 4)).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(parse(std::string("\x04\0\0\0\0\0\0\0\xFF", 9)).status().code(),
            absl::StatusCode::kInvalidArgument);
  // Offsets that lead out of the trie and out of the replacements.
  for (const std::string& unit : {std::string("\xFF\xFF\xFF\xFF"), std::string("\x61\x01\0\0", 4)}) {
    std::string bytes = std::string("\0\4\0\0", 4);
    for (int i = 0; i < 256; ++i) bytes += unit;
    const auto map = parse(bytes + "x");
    ASSERT_TRUE(map.ok()) << map.status();
    for (const char* text : {"a", "abc", "\u00E9", "\U0010FFFF"}) map->Find(text);
  }
}

std::vector<std::string> Pieces(const json& node, const std::string& text, bool at_start = true) {
  const auto pre = PreTokenizer::Parse(node, "pre_tokenizer");
  EXPECT_TRUE(pre.ok()) << pre.status();
  PreTokenizer::Scratch scratch;
  const auto cut = pre->Apply(text, at_start, scratch);
  EXPECT_TRUE(cut.ok()) << cut.status();
  std::vector<std::string> pieces;
  for (const Regex::Span& s : scratch.spans) pieces.emplace_back(cut->substr(s.begin, s.end - s.begin));
  return pieces;
}

using Words = std::vector<std::string>;

TEST(PreTokenizer, FiveBehaviours) {
  const auto split = [](const char* behavior, bool invert = false) {
    return Pieces(
        {{"type", "Split"}, {"pattern", {{"String", "-"}}}, {"behavior", behavior}, {"invert", invert}},
        "-a--b-");
  };
  EXPECT_EQ(split("Isolated"), (Words{"-", "a", "-", "-", "b", "-"}));
  EXPECT_EQ(split("Removed"), (Words{"a", "b"}));
  EXPECT_EQ(split("MergedWithPrevious"), (Words{"-", "a-", "-", "b-"}));
  EXPECT_EQ(split("MergedWithNext"), (Words{"-a", "-", "-b", "-"}));
  EXPECT_EQ(split("Contiguous"), (Words{"-", "a", "--", "b", "-"}));
  EXPECT_EQ(split("Removed", true), (Words{"-", "-", "-", "-"}));
}

TEST(PreTokenizer, MetaspaceSchemes) {
  const auto meta = [](const char* scheme, const char* text, bool at_start, bool split = true) {
    return Pieces({{"type", "Metaspace"}, {"prepend_scheme", scheme}, {"split", split}}, text, at_start);
  };
  EXPECT_EQ(meta("always", "a b", false), (Words{"▁a", "▁b"}));
  EXPECT_EQ(meta("always", " a", true), (Words{"▁a"}));
  EXPECT_EQ(meta("first", "a", true), (Words{"▁a"}));
  EXPECT_EQ(meta("first", "a", false), (Words{"a"}));
  EXPECT_EQ(meta("never", "a  b", true), (Words{"a", "▁", "▁b"}));
  EXPECT_EQ(meta("never", "a b", true, false), (Words{"a▁b"}));
}

TEST(PreTokenizer, WordsAndPunctuation) {
  EXPECT_EQ(Pieces({{"type", "Whitespace"}}, "a_1!? é\u0301,"), (Words{"a_1", "!?", "é\u0301", ","}));
  EXPECT_EQ(Pieces({{"type", "WhitespaceSplit"}}, " a!\u3000b "), (Words{"a!", "b"}));
  EXPECT_EQ(Pieces({{"type", "BertPreTokenizer"}}, "it's--ok 「x」"),
            (Words{"it", "'", "s", "-", "-", "ok", "「", "x", "」"}));
  EXPECT_EQ(Pieces({{"type", "Punctuation"}, {"behavior", "Contiguous"}}, "a!?b"), (Words{"a", "!?", "b"}));
  EXPECT_EQ(Pieces({{"type", "Digits"}, {"individual_digits", true}}, "a12½"), (Words{"a", "1", "2", "½"}));
}

TEST(PreTokenizer, ALongSequenceIsRefused) {
  EXPECT_EQ(
      PreTokenizer::Parse(Repeat("pretokenizers", {{"type", "WhitespaceSplit"}}, 40), "p").status().code(),
      absl::StatusCode::kInvalidArgument);
}

std::shared_ptr<const Tokenizer> Make(const json& spec) {
  auto tokenizer = Tokenizer::FromJson(spec.dump());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *tokenizer : nullptr;
}

Ids Encode(const Tokenizer& t, const std::string& text) { return t.Encode(text).value(); }

TEST(Unigram, TakesTheBestSegmentationAndFusesTheUnknown) {
  const auto t =
      Make(json::parse(R"({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0], ["a", 0],
      ["b", 0], ["c", 0], ["d", 0], ["cd", 1], ["ab", 2], ["abc", 5], ["abcd", 10]]}})"));
  EXPECT_EQ(Encode(*t, "abcd"), (Ids{8}));
  EXPECT_EQ(Encode(*t, "abcdacd"), (Ids{8, 1, 5}));
  EXPECT_EQ(Encode(*t, "axyz中b"), (Ids{1, 0, 2}));
  EXPECT_EQ(Encode(*t, ""), Ids{});
}

TEST(Unigram, WithoutUnknownTokenAStrangeCharacterIsAnError) {
  const auto t = Make(json::parse(R"({"model": {"type": "Unigram", "vocab": [["a", -1.0]]}})"));
  EXPECT_EQ(Encode(*t, "aa"), (Ids{0, 0}));
  EXPECT_EQ(t->Encode("b").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(WordPiece, LongestFirstOrUnknown) {
  const auto t =
      Make({{"pre_tokenizer", {{"type", "BertPreTokenizer"}}},
            {"decoder", {{"type", "WordPiece"}}},
            {"model",
             {{"type", "WordPiece"},
              {"unk_token", "[UNK]"},
              {"max_input_chars_per_word", 6},
              {"vocab", {{"[UNK]", 0}, {"un", 1}, {"una", 2}, {"##ff", 3}, {"##f", 4}, {".", 5}}}}}});
  EXPECT_EQ(Encode(*t, "unaff"), (Ids{2, 3}));
  EXPECT_EQ(Encode(*t, "unafx un"), (Ids{0, 1}));
  EXPECT_EQ(Encode(*t, "unfffff"), (Ids{0}));  // seven characters
  EXPECT_EQ(t->Decode(Ids{2, 3, 5, 1, 4}, false), "unaff. unf");
}

TEST(WordLevel, WholeWordsOrUnknown) {
  const auto t = Make(
      {{"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
       {"model", {{"type", "WordLevel"}, {"unk_token", "<unk>"}, {"vocab", {{"<unk>", 0}, {"hi", 1}}}}}});
  EXPECT_EQ(Encode(*t, "hi ho"), (Ids{1, 0}));
}

TEST(Bpe, ACharacterThatVanishesJoinsItsNeighbours) {
  // No unknown token: U+00E9 is dropped, and the merge reaches across it.
  const auto t =
      Make({{"model", {{"type", "BPE"}, {"vocab", {{"a", 0}, {"b", 1}, {"ab", 2}}}, {"merges", {"a b"}}}}});
  EXPECT_EQ(Encode(*t, "aéb"), (Ids{2}));
  std::string text;
  for (int i = 0; i < 50; ++i) text += "aéb";
  EXPECT_EQ(Encode(*t, text), Ids(50, 2));
}

TEST(Bpe, IgnoreMergesTakesTheWholeWordFirst) {
  json model = {
      {"type", "BPE"}, {"vocab", {{"a", 0}, {"b", 1}, {"c", 2}, {"abc", 3}}}, {"merges", json::array()}};
  EXPECT_EQ(Encode(*Make({{"model", model}}), "abc"), (Ids{0, 1, 2}));
  model["ignore_merges"] = true;
  EXPECT_EQ(Encode(*Make({{"model", model}}), "abc"), (Ids{3}));
}

TEST(Decoder, BpeSuffixIsASpaceBetweenWordsOnly) {
  const auto t = Make({{"decoder", {{"type", "BPEDecoder"}, {"suffix", "</w>"}}},
                       {"model", {{"type", "WordLevel"}, {"vocab", {{"a</w>", 0}, {"b", 1}}}}}});
  EXPECT_EQ(t->Decode(Ids{0, 1, 0}, false), "a ba");
  StreamDecoder stream(*t, false);
  EXPECT_EQ(stream.Push(0), "a");
  EXPECT_EQ(stream.Push(1), " b");
  EXPECT_EQ(stream.Push(0), "a");
  EXPECT_EQ(stream.Finish(), "");
}

TEST(Decoder, ReplaceBombsAreRefused) {
  const json twice = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
  const auto status = TokenDecoderSpec::Parse(Repeat("decoders", twice, 40), "decoder").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("decoder.decoders["), std::string::npos) << status;
}

// A continuation looks for the last tokens that have text, however many without any follow them.
TEST(StreamDecoder, PrimePassesOverTokensWithoutText) {
  json vocab = {{"<0xC3>", 0}, {"<0xA9>", 1}, {"<s>", 2}, {"x", 3}};
  const auto t = Make({{"added_tokens", {{{"id", 2}, {"content", "<s>"}, {"special", true}}}},
                       {"decoder", {{"type", "ByteFallback"}}},
                       {"model", {{"type", "WordLevel"}, {"vocab", vocab}}}});
  Ids prompt = {3, 0};
  for (int i = 0; i < 20; ++i) prompt.push_back(i % 2 == 0 ? 2 : 99);
  StreamDecoder stream(*t, true);
  stream.Prime(prompt);
  EXPECT_EQ(stream.Push(1), "é");
}

TEST(UnicodeClasses, ComposeAndDecomposeAreInverse) {
  for (const uint32_t cp : {0xE9u, 0x1EADu, 0xAC00u, 0xAC01u, 0x1E14u}) {
    uint32_t parts[unicode_classes::kDecompositionMax];
    const int n = unicode_classes::Decompose(cp, false, parts);
    uint32_t composed = parts[0];
    for (int i = 1; i < n; ++i) composed = unicode_classes::Compose(composed, parts[i]);
    EXPECT_EQ(composed, cp);
  }
  EXPECT_EQ(unicode_classes::Compose('a', 'b'), 0u);
}

}  // namespace
}  // namespace tidepool
