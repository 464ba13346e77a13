#include "server/model/text/tokenizer.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "server/model/text/detokenizer.h"

namespace tidepool {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;

// A byte-level tokenizer: 256 bytes (in the order of the byte alphabet), three merges, two added tokens.
json ByteLevel() {
  json vocab = json::object();
  const auto utf8 = [](int cp) {
    std::string s;
    if (cp < 0x80) {
      s += static_cast<char>(cp);
    } else {
      s += static_cast<char>(0xC0 | (cp >> 6));
      s += static_cast<char>(0x80 | (cp & 0x3F));
    }
    return s;
  };
  int next = 0x100;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    vocab[utf8(printable ? b : next++)] = b;
  }
  vocab["he"] = 256;
  vocab["ll"] = 257;
  vocab["hell"] = 258;
  vocab["Ġhe"] = 259;
  return json{
      {"version", "1.0"},
      {"added_tokens",
       {{{"id", 260}, {"content", "<|end|>"}, {"special", true}, {"normalized", false}},
        {{"id", 261}, {"content", "<tool>"}, {"special", false}, {"normalized", false}, {"rstrip", true}}}},
      {"normalizer", {{"type", "NFC"}}},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single",
         {{{"SpecialToken", {{"id", "<|end|>"}, {"type_id", 0}}}},
          {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
        {"special_tokens", {{"<|end|>", {{"id", "<|end|>"}, {"ids", {260}}, {"tokens", {"<|end|>"}}}}}}}},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model",
       {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"h e", json::array({"l", "l"}), "he ll", "Ġ he"}}}}};
}

// A sentencepiece-style one: byte fallback, spaces as ▁, a stripped leading space.
json SentencePiece() {
  json vocab = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  for (int b = 0; b < 256; ++b) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", b);
    vocab[name] = 3 + b;
  }
  vocab["▁"] = 259;
  vocab["a"] = 260;
  vocab["b"] = 261;
  vocab["▁a"] = 262;
  vocab["ab"] = 263;
  const json replace = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}};
  const json back = {{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}};
  return json{{"added_tokens",
               {{{"id", 1}, {"content", "<s>"}, {"special", true}, {"normalized", false}},
                {{"id", 2}, {"content", "</s>"}, {"special", true}, {"normalized", false}}}},
              {"normalizer",
               {{"type", "Sequence"}, {"normalizers", {{{"type", "Prepend"}, {"prepend", "▁"}}, replace}}}},
              {"pre_tokenizer", nullptr},
              {"decoder",
               {{"type", "Sequence"},
                {"decoders",
                 {back,
                  {{"type", "ByteFallback"}},
                  {{"type", "Fuse"}},
                  {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}}},
              {"model",
               {{"type", "BPE"},
                {"unk_token", "<unk>"},
                {"fuse_unk", true},
                {"byte_fallback", true},
                {"vocab", vocab},
                {"merges", {"▁ a", "a b"}}}}};
}

std::shared_ptr<const Tokenizer> Make(const json& spec, const json& config = nullptr) {
  auto tokenizer = Tokenizer::FromJson(spec.dump(), config.is_null() ? std::string() : config.dump());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *tokenizer : nullptr;
}

Ids Encode(const Tokenizer& tokenizer, std::string_view text,
           Tokenizer::EncodeOptions options = {false, true}) {
  auto ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *ids : Ids{};
}

TEST(Tokenizer, MergesByRankNotByPosition) {
  const auto t = Make(ByteLevel());
  EXPECT_EQ(Encode(*t, "hello"), (Ids{258, 'o'}));
  // "Ġ he" ranks below "he ll", so the space stays alone.
  EXPECT_EQ(Encode(*t, " hello"), (Ids{' ', 258, 'o'}));
  EXPECT_EQ(Encode(*t, " hex"), (Ids{259, 'x'}));
  EXPECT_EQ(Encode(*t, ""), Ids{});
}

TEST(Tokenizer, AddsTheTemplateOnlyWhenAsked) {
  const auto t = Make(ByteLevel());
  EXPECT_EQ(Encode(*t, "x", {true, true}), (Ids{260, 'x'}));
  EXPECT_EQ(Encode(*t, "x", {false, true}), (Ids{'x'}));
}

TEST(Tokenizer, SpecialTokensInTextCountOnlyWhenParsed) {
  const auto t = Make(ByteLevel());
  EXPECT_EQ(Encode(*t, "x<|end|>", {false, true}), (Ids{'x', 260}));
  EXPECT_EQ(Encode(*t, "<|end|>", {false, false}), (Ids{'<', '|', 'e', 'n', 'd', '|', '>'}));
  // A token that is added but not special is text like any other to its author.
  EXPECT_EQ(Encode(*t, "<tool>", {false, false}), (Ids{261}));
}

TEST(Tokenizer, RstripTokenTakesTheSpaceBehindIt) {
  const auto t = Make(ByteLevel());
  EXPECT_EQ(Encode(*t, "<tool> \n x"), (Ids{261, 'x'}));
}

// U+001C is white space to Python but not to Unicode, which the tokenizers library follows.
TEST(Tokenizer, RstripTakesUnicodeWhiteSpaceOnly) {
  const auto t = Make(ByteLevel());
  EXPECT_EQ(Encode(*t, "<tool>\x1Cx"), (Ids{261, 0x1C, 'x'}));
  EXPECT_EQ(Encode(*t, "<tool>\u3000x"), (Ids{261, 'x'}));
}

TEST(Tokenizer, InvalidUtf8BecomesTheReplacementCharacter) {
  const auto t = Make(ByteLevel());
  EXPECT_EQ(t->Decode(Encode(*t, "a\xFFz"), false), "a\uFFFDz");
  EXPECT_EQ(t->Decode(Encode(*t, "a\xE2\x82"), false), "a\uFFFD");
}

TEST(Tokenizer, NormalizesToNfcBeforeMerging) {
  const auto t = Make(ByteLevel());
  EXPECT_EQ(Encode(*t, "e\u0301"), (Ids{0xC3, 0xA9}));
  // Two marks in the wrong order: dot below (220) goes before acute (230).
  EXPECT_EQ(t->Decode(Encode(*t, "e\u0301\u0323"), false), "\u1EB9\u0301");
}

TEST(Tokenizer, ByteFallbackSpellsUnknownCharactersInBytes) {
  const auto t = Make(SentencePiece());
  EXPECT_EQ(Encode(*t, "ab"), (Ids{262, 261}));
  EXPECT_EQ(Encode(*t, "é"), (Ids{259, 3 + 0xC3, 3 + 0xA9}));
  EXPECT_EQ(t->Decode(Ids{259, 3 + 0xC3, 3 + 0xA9}, false), "é");
}

TEST(Tokenizer, DecodeStripsOneLeadingSpaceAndSkipsSpecials) {
  const auto t = Make(SentencePiece());
  EXPECT_EQ(t->Decode(Ids{1, 262, 262, 2}, true), "a a");
  EXPECT_EQ(t->Decode(Ids{1, 262, 262, 2}, false), "<s> a a</s>");
  EXPECT_EQ(t->Decode(Ids{259, 262}, true), " a");
}

TEST(Tokenizer, DecodePassesOverIdsThatAreNotInUse) {
  const auto t = Make(SentencePiece());
  EXPECT_EQ(t->Decode(Ids{262, -1, 100000, 261}, false), "ab");
  EXPECT_EQ(t->TokenText(-1), "");
  EXPECT_FALSE(t->TokenPiece(100000));
  EXPECT_FALSE(t->is_special(100000));
}

TEST(Tokenizer, TokenTextGivesRawBytes) {
  const auto bytes = Make(ByteLevel());
  EXPECT_EQ(bytes->TokenText(0xC3), "\xC3");
  EXPECT_EQ(bytes->TokenText(259), " he");
  EXPECT_EQ(bytes->TokenText(260), "<|end|>");
  const auto pieces = Make(SentencePiece());
  EXPECT_EQ(pieces->TokenText(3 + 0x0A), "\n");
  EXPECT_EQ(pieces->TokenText(262), " a");
}

TEST(Tokenizer, ReadsConfigTokensAndTheDefaultTemplate) {
  const auto t =
      Make(SentencePiece(),
           {{"bos_token", {{"content", "<s>"}}},
            {"eos_token", "</s>"},
            {"chat_template",
             {{{"name", "tool_use"}, {"template", "T"}}, {{"name", "default"}, {"template", "D"}}}}});
  EXPECT_EQ(t->bos_id(), 1);
  EXPECT_EQ(t->eos_id(), 2);
  EXPECT_EQ(t->bos_token(), "<s>");
  EXPECT_EQ(t->chat_template(), "D");
  EXPECT_EQ(t->vocab_size(), 264);
}

TEST(Tokenizer, LoadPrefersTheTemplateFileAndHashesTheTokenizer) {
  const auto dir =
      std::filesystem::temp_directory_path() / ("tidepool_tokenizer_test_" + std::to_string(::getpid()));
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "tokenizer.json") << ByteLevel().dump();
  std::ofstream(dir / "tokenizer_config.json") << R"({"chat_template": "old", "eos_token": "<|end|>"})";
  std::ofstream(dir / "chat_template.jinja") << "new";
  const auto t = Tokenizer::Load(dir.string());
  ASSERT_TRUE(t.ok()) << t.status();
  EXPECT_EQ((*t)->chat_template(), "new");
  EXPECT_EQ((*t)->eos_id(), 260);
  EXPECT_EQ((*t)->Digest().size(), 64u);
  EXPECT_EQ((*t)->Digest(), Make(ByteLevel())->Digest());

  std::ofstream(dir / "tokenizer_config.json") << R"({"eos_token": "<nope>"})";
  const auto bad = Tokenizer::Load(dir.string()).status();
  EXPECT_EQ(bad.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(bad.message().find("tokenizer_config.json: eos_token '<nope>'"), std::string::npos) << bad;
  std::filesystem::remove_all(dir);
  EXPECT_EQ(Tokenizer::Load(dir.string()).status().code(), absl::StatusCode::kNotFound);
}

struct BadFile {
  const char* patch;  // JSON merge patch on ByteLevel()
  absl::StatusCode code;
  const char* says;
};

class BadTokenizerTest : public testing::TestWithParam<BadFile> {};

TEST_P(BadTokenizerTest, IsRefusedByFileAndField) {
  json spec = ByteLevel();
  spec.merge_patch(json::parse(GetParam().patch));
  const auto status = Tokenizer::FromJson(spec.dump(), {}, "dir/tokenizer.json").status();
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_EQ(status.message().find("dir/tokenizer.json: "), 0u) << status;
  EXPECT_NE(status.message().find(GetParam().says), std::string::npos) << status;
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kMissing = absl::StatusCode::kUnimplemented;
INSTANTIATE_TEST_SUITE_P(
    Files, BadTokenizerTest,
    testing::Values(
        BadFile{R"({"model": null})", kInvalid, "model is missing"},
        BadFile{R"({"model": {"type": "Unigram"}})", kMissing, "model.type: a Unigram behind a ByteLevel"},
        BadFile{R"({"model": {"type": "Lattice"}})", kMissing, "model.type: model type Lattice"},
        BadFile{R"({"pre_tokenizer": null, "model": {"type": "Unigram"}})", kInvalid,
                "model.vocab is object"},
        BadFile{R"({"pre_tokenizer": null, "model": {"type": "Unigram", "vocab": [["a", "b"]]}})", kInvalid,
                "model.vocab[0] must be [token, score]"},
        BadFile{
            R"({"pre_tokenizer": null, "model": {"type": "Unigram", "vocab": [["a", 1.0]], "unk_id": 1}})",
            kInvalid, "model.unk_id must be"},
        BadFile{R"({"pre_tokenizer": null, "model": {"type": "WordPiece"}})", kInvalid,
                "model.unk_token '[UNK]'"},
        BadFile{R"({"model": {"merges": [["", "h"]]}})", kInvalid, "model.merges[0]"},
        BadFile{R"({"model": {"merges": [["he", "h"]]}})", kInvalid, "'heh' is not in the vocabulary"},
        BadFile{R"({"model": {"vocab": {"zz": 2097152}}})", kInvalid, "model.vocab['zz'] must be"},
        BadFile{R"({"model": {"vocab": null}})", kInvalid, "model.vocab is missing"},
        BadFile{R"({"model": {"vocab": []}})", kInvalid, "model.vocab is array"},
        BadFile{R"({"model": {"vocab": {"zz": -1}}})", kInvalid, "model.vocab['zz'] must be"},
        BadFile{R"({"model": {"vocab": {"zz": 1e30}}})", kInvalid, "model.vocab['zz'] must be"},
        BadFile{R"({"model": {"vocab": {"zz": 99999999999}}})", kInvalid, "model.vocab['zz'] must be"},
        BadFile{R"({"model": {"vocab": {"zz": 7}}})", kInvalid, "id 7 is used twice"},
        BadFile{R"({"model": {"merges": ["h"]}})", kInvalid, "model.merges[0]"},
        BadFile{R"({"model": {"merges": [["h"]]}})", kInvalid, "model.merges[0]"},
        BadFile{R"({"model": {"merges": ["h z"]}})", kInvalid, "'hz' is not in the vocabulary"},
        BadFile{R"({"model": {"unk_token": "<u>"}})", kInvalid, "unk_token '<u>'"},
        BadFile{R"({"model": {"byte_fallback": "yes"}})", kInvalid, "model.byte_fallback is string"},
        BadFile{R"({"model": {"dropout": 0.1}})", kMissing, "model.dropout"},
        BadFile{R"({"normalizer": {"type": "Nmt"}})", kMissing, "normalizer Nmt"},
        BadFile{R"({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!!"}})", kInvalid,
                "normalizer.precompiled_charsmap: must be base64"},
        BadFile{R"({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAEAAAA="}})", kInvalid,
                "normalizer.precompiled_charsmap: says that its trie has 256 bytes"},
        BadFile{R"({"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}})", kInvalid,
                "normalizer.pattern.Regex: regex: missing closing parenthesis"},
        BadFile{R"({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Odd"}})",
                kInvalid, "pre_tokenizer.behavior is 'Odd'"},
        BadFile{R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Nope"}]}})", kMissing,
                "pre_tokenizer.pretokenizers[0]: pre-tokenizer Nope"},
        BadFile{R"({"decoder": {"type": "CTC"}})", kMissing, "decoder CTC"},
        BadFile{
            R"({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}})",
            kMissing, "behind Fuse"},
        BadFile{R"({"post_processor": {"type": "BertProcessing"}})", kInvalid, "post_processor.cls must be"},
        BadFile{R"({"post_processor": {"type": "BertProcessing", "cls": ["a", 9999], "sep": ["b", 1]}})",
                kInvalid, "post_processor.cls[1] must be"},
        BadFile{R"({"post_processor": {"type": "Odd"}})", kMissing, "post-processor Odd"},
        BadFile{R"({"added_tokens": [{"id": 2000000000, "content": "<x>"}]})", kInvalid,
                "added_tokens[0].id must be"},
        BadFile{R"({"added_tokens": [{"id": -5, "content": "<x>"}]})", kInvalid,
                "added_tokens[0].id must be"},
        BadFile{R"({"added_tokens": [{"content": "<x>"}]})", kInvalid, "added_tokens[0].id is missing"},
        BadFile{R"({"post_processor": {"special_tokens": null}})", kInvalid, "special_tokens['<|end|>'].ids"},
        BadFile{R"({"added_tokens": [{"id": 5}]})", kInvalid, "added_tokens[0].content is missing"},
        BadFile{R"({"added_tokens": [{"id": 5, "content": "he"}]})", kInvalid, "'he' has id 5 here but 256"},
        BadFile{R"({"added_tokens": [{"id": 5, "content": "<x>"}]})", kInvalid,
                "'<x>' has id 5, which is the id of"},
        BadFile{R"({"added_tokens": 3})", kInvalid, "added_tokens is number"}));

TEST(TokenizerFile, BrokenJsonAndDeepNestingAreRefused) {
  EXPECT_EQ(Tokenizer::FromJson("{\"model\": ", {}, "f").status().code(), kInvalid);
  EXPECT_EQ(Tokenizer::FromJson("", {}, "f").status().code(), kInvalid);
  EXPECT_EQ(Tokenizer::FromJson("[]", {}, "f").status().code(), kInvalid);
  const std::string deep = std::string(100'000, '[') + std::string(100'000, ']');
  const auto status = Tokenizer::FromJson(deep, {}, "f").status();
  EXPECT_EQ(status.code(), kInvalid);
  EXPECT_NE(status.message().find("nested"), std::string::npos);
}

// --- streaming ---

std::string Stream(const Tokenizer& t, const Ids& ids, bool skip,
                   std::vector<std::string>* pieces = nullptr) {
  StreamDecoder decoder(t, skip);
  std::string text;
  for (const int32_t id : ids) {
    const std::string piece = decoder.Push(id);
    if (pieces != nullptr) pieces->push_back(piece);
    text += piece;
  }
  return text + decoder.Finish();
}

TEST(StreamDecoder, HoldsHalfACharacterBack) {
  const auto t = Make(ByteLevel());
  std::vector<std::string> pieces;
  EXPECT_EQ(Stream(*t, Ids{'a', 0xF0, 0x9F, 0x98, 0x80, 'b'}, false, &pieces), "a\U0001F600b");
  EXPECT_EQ(pieces, (std::vector<std::string>{"a", "", "", "", "\U0001F600", "b"}));
}

TEST(StreamDecoder, UnfinishedCharacterBecomesTheReplacementAtTheEnd) {
  const auto t = Make(ByteLevel());
  EXPECT_EQ(Stream(*t, Ids{'a', 0xF0, 0x9F}, false), "a\uFFFD");
  EXPECT_EQ(Stream(*t, Ids{'a', 0xF0, 0x9F, 'b'}, false), "a\uFFFDb");
  const auto sp = Make(SentencePiece());
  EXPECT_EQ(Stream(*sp, Ids{262, 3 + 0xF0, 3 + 0x9F}, false), "a\uFFFD\uFFFD");
}

TEST(StreamDecoder, PrimedWithAPromptItKeepsTheSpaceAndCompletesItsCharacter) {
  const auto t = Make(SentencePiece());
  StreamDecoder fresh(*t, true);
  EXPECT_EQ(fresh.Push(262), "a");
  StreamDecoder primed(*t, true);
  primed.Prime(Ids{1, 262, 3 + 0xC3});
  EXPECT_EQ(primed.Push(3 + 0xA9), "é");
  EXPECT_EQ(primed.Push(262), " a");
  // A prompt of special tokens only has no text yet.
  StreamDecoder after_bos(*t, true);
  after_bos.Prime(Ids{1});
  EXPECT_EQ(after_bos.Push(262), "a");
}

// Any ids, in pieces or at once, give the same valid text.
TEST(StreamDecoder, RandomIdsStreamToWhatDecodeGives) {
  for (const json& spec : {ByteLevel(), SentencePiece()}) {
    const auto t = Make(spec);
    uint64_t state = 12345;
    for (int round = 0; round < 300; ++round) {
      Ids ids;
      for (int i = 0; i < 40; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        ids.push_back(static_cast<int32_t>((state >> 33) % 270));
      }
      for (const bool skip : {false, true}) {
        std::vector<std::string> pieces;
        const std::string streamed = Stream(*t, ids, skip, &pieces);
        EXPECT_EQ(streamed, t->Decode(ids, skip));
        for (const std::string& piece : pieces) {
          EXPECT_NO_THROW(json(piece).dump());  // whole characters only
        }
      }
    }
  }
}

// --- stop strings ---

StopMatcher Matcher(std::vector<std::string> stops, bool include = false) {
  auto matcher = StopMatcher::Create(std::move(stops), include);
  EXPECT_TRUE(matcher.ok());
  return *matcher;
}

TEST(StopMatcher, HoldsBackWhatMayBecomeAStop) {
  auto m = Matcher({"###"});
  EXPECT_EQ(m.Push("a#").emit, "a");
  EXPECT_EQ(m.Push("#").emit, "");
  EXPECT_EQ(m.Push("b").emit, "##b");
  EXPECT_EQ(m.Push("c##").emit, "c");
  EXPECT_EQ(m.Flush(), "##");
}

TEST(StopMatcher, PassesOverStopsThatEndTooEarly) {
  StopMatcher matcher = Matcher({"\n\n"});
  EXPECT_EQ(matcher.Push("a\n\nb\n", /*may_match=*/false).emit, "a\n\nb");
  const auto late = matcher.Push("\nc");
  EXPECT_EQ(late.matched, 0u) << "the stop began before and ended after";
  EXPECT_EQ(late.emit, "");
}

TEST(StopMatcher, StopsAcrossPieces) {
  auto m = Matcher({"xyz", "END"});
  EXPECT_EQ(m.Push("one E").emit, "one ");
  const auto r = m.Push("ND two");
  EXPECT_EQ(r.emit, "");
  EXPECT_EQ(r.matched, 1u);
  EXPECT_TRUE(m.matched());
  EXPECT_EQ(m.Push("more").emit, "");
  EXPECT_EQ(m.Flush(), "");
}

TEST(StopMatcher, IncludesTheStopWhenAsked) {
  auto m = Matcher({"END"}, true);
  EXPECT_EQ(m.Push("one E").emit, "one ");
  EXPECT_EQ(m.Push("ND two").emit, "END");
}

TEST(StopMatcher, FirstCompleteWinsThenTheLongest) {
  auto m = Matcher({"bc", "abcd"});
  const auto r = m.Push("xabcd");
  EXPECT_EQ(r.matched, 0u);
  EXPECT_EQ(r.emit, "xa");
  auto n = Matcher({"c", "abc"});
  const auto q = n.Push("xabc");
  EXPECT_EQ(q.matched, 1u);
  EXPECT_EQ(q.emit, "x");
}

TEST(StopMatcher, RefusesEmptyLongAndMany) {
  EXPECT_EQ(StopMatcher::Create({""}, false).status().code(), kInvalid);
  EXPECT_EQ(StopMatcher::Create({std::string(5000, 'a')}, false).status().code(), kInvalid);
  EXPECT_EQ(StopMatcher::Create(std::vector<std::string>(33, "a"), false).status().code(), kInvalid);
}

// However the text is cut, the outcome is that of the whole text, found by plain search.
TEST(StopMatcher, CuttingTheTextChangesNothing) {
  uint64_t state = 99;
  const auto next = [&](uint64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % n;
  };
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    for (int i = 0; i < 30; ++i) text += static_cast<char>('a' + next(2));
    std::vector<std::string> stops(1 + next(3));
    for (auto& stop : stops) {
      for (uint64_t i = 0; i <= next(6); ++i) stop += static_cast<char>('a' + next(2));
    }
    size_t end = text.npos, size = 0;
    for (const auto& stop : stops) {
      const size_t at = text.find(stop);
      if (at == text.npos) continue;
      if (end == text.npos || at + stop.size() < end || (at + stop.size() == end && stop.size() > size)) {
        end = at + stop.size();
        size = stop.size();
      }
    }
    auto m = Matcher(stops);
    std::string got;
    for (size_t pos = 0; pos < text.size();) {
      const size_t n = std::min<size_t>(1 + next(4), text.size() - pos);
      got += m.Push(std::string_view(text).substr(pos, n)).emit;
      pos += n;
    }
    got += m.Flush();
    EXPECT_EQ(got, end == text.npos ? text : text.substr(0, end - size));
    EXPECT_EQ(m.matched(), end != text.npos);
  }
}

}  // namespace
}  // namespace tidepool
