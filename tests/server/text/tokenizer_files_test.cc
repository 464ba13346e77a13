// What must hold for every tokenizer file that we have: those of real models, where they are here, and the
// small ones of tests/golden/tokenizers (tools/fidelity/make_tokenizers.py), which cover the other families.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "base/rng.h"
#include "server/model/text/detokenizer.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;
namespace fs = std::filesystem;

const char kShared[] = "../shared/data/tokenizers";
const char kGolden[] = "tests/golden/tokenizers";

struct File {
  std::string name, path;
};

std::vector<File> Files() {
  std::vector<File> files;
  if (fs::exists(kShared)) {
    for (const auto& dir : fs::directory_iterator(kShared)) {
      const fs::path path = dir.path() / "tokenizer.json";
      // misc-sqlpilot contradicts itself: see OddOnesLoadOrNameWhatIsMissing.
      if (fs::exists(path) && dir.path().filename() != "misc-sqlpilot") {
        files.push_back({dir.path().filename().string(), path.string()});
      }
    }
  }
  for (const auto& entry : fs::directory_iterator(kGolden)) {
    if (entry.path().extension() == ".json") {
      files.push_back({"golden_" + entry.path().stem().string(), entry.path().string()});
    }
  }
  std::sort(files.begin(), files.end(), [](const File& a, const File& b) { return a.name < b.name; });
  return files;
}

std::string ReadAll(const std::string& path) {
  std::ifstream in(path);
  return {std::istreambuf_iterator<char>(in), {}};
}

struct Loaded {
  std::shared_ptr<const Tokenizer> tokenizer;
  std::vector<std::string> specials;  // spellings of the special tokens but single_word ones
  int32_t unk = -1;
};

Loaded Load(const File& file) {
  Loaded loaded;
  const std::string text = ReadAll(file.path);
  auto tokenizer = Tokenizer::FromJson(text, {}, file.path);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  if (!tokenizer.ok()) return loaded;
  loaded.tokenizer = *tokenizer;
  const json spec = json::parse(text);
  for (const json& token : spec.value("added_tokens", json::array())) {
    if (token.value("special", false) && !token.value("single_word", false)) {
      loaded.specials.push_back(token["content"]);
    }
  }
  const json& model = spec["model"];
  if (model.contains("unk_token") && model["unk_token"].is_string()) {
    loaded.unk = loaded.tokenizer->PieceToId(model["unk_token"].get<std::string>()).value_or(-1);
  } else if (model.contains("unk_id") && model["unk_id"].is_number()) {
    loaded.unk = model["unk_id"];
  }
  return loaded;
}

class EveryTokenizer : public testing::TestWithParam<File> {};

// Special tokens other than the unknown one, which stands for whatever the vocabulary cannot spell.
Ids SpecialsOf(const Loaded& loaded, const Ids& ids) {
  Ids out;
  for (const int32_t id : ids) {
    if (loaded.tokenizer->is_special(id) && id != loaded.unk) out.push_back(id);
  }
  return out;
}

bool IsSubsequence(const Ids& part, const Ids& whole) {
  auto at = whole.begin();
  for (const int32_t id : part) {
    at = std::find(at, whole.end(), id);
    if (at == whole.end()) return false;
    ++at;
  }
  return true;
}

// Wide forms, which NFKC and sentencepiece's map fold to ASCII.
std::string Fullwidth(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c > 0x20 && c < 0x7F) {
      const int cp = 0xFF00 + (c - 0x20);
      out += {static_cast<char>(0xE0 | (cp >> 12)), static_cast<char>(0x80 | ((cp >> 6) & 0x3F)),
              static_cast<char>(0x80 | (cp & 0x3F))};
    } else {
      out += c;
    }
  }
  return out;
}

// Texts of a template and of strangers in turn, where the strangers try everything to spell a special token,
// alone or together with the template next to them.
TEST_P(EveryTokenizer, GivesNoSpecialTokenForData) {
  const Loaded loaded = Load(GetParam());
  ASSERT_NE(loaded.tokenizer, nullptr);
  if (loaded.specials.empty()) GTEST_SKIP() << "no special tokens";
  const Tokenizer& t = *loaded.tokenizer;
  Rng rng(20);
  const auto pick = [&](const std::vector<std::string>& from) { return from[rng.Below(from.size())]; };
  int recognised_without = 0;
  for (int round = 0; round < 1500; ++round) {
    std::string text;
    std::vector<ByteRange> data;
    Ids own;  // the template's
    const auto add_template = [&](const std::string& part) { text += part; };
    const auto add_data = [&](const std::string& part) {
      if (part.empty()) return;
      if (!data.empty() && data.back().end == text.size()) {
        data.back().end += part.size();
      } else {
        data.push_back({text.size(), text.size() + part.size()});
      }
      text += part;
    };
    for (uint64_t turn = 0, turns = 1 + rng.Below(4); turn < turns; ++turn) {
      const std::string special = pick(loaded.specials), other = pick(loaded.specials);
      const size_t cut = rng.Below(special.size() + 1);
      switch (rng.Below(9)) {
        case 0:
          add_template(special);
          own.push_back(t.PieceToId(special).value());
          add_data("hello");
          break;
        case 1:
          add_template("user: ");
          add_data(special);
          break;
        case 2:  // half by the template, half by the stranger
          add_template(special.substr(0, cut / 2));
          add_data(special.substr(cut / 2));
          break;
        case 3:
          add_data(special.substr(0, cut + 1));
          add_template(special.substr(std::min(cut + 1, special.size())));
          break;
        case 4:  // one inside the other
          add_data(special.substr(0, cut) + other + special.substr(cut));
          break;
        case 5:
          add_data(" \n" + special + "\t " + other + " ");
          break;
        case 6:
          add_data(Fullwidth(special));
          break;
        case 7:  // in three
          add_data(special.substr(0, cut));
          add_template("");
          add_data(special.substr(cut));
          break;
        default:
          add_data(special);
          add_template(other);
          own.push_back(t.PieceToId(other).value());
          add_data(special);
      }
    }
    if (std::find(own.begin(), own.end(), loaded.unk) != own.end()) {
      own.erase(std::remove(own.begin(), own.end(), loaded.unk), own.end());
    }
    const auto ids = t.Encode(text, {.add_special_tokens = false, .data = data});
    ASSERT_TRUE(ids.ok()) << ids.status();
    const Ids got = SpecialsOf(loaded, *ids);
    EXPECT_TRUE(IsSubsequence(got, own)) << json(text) << " gave " << json(*ids);
    EXPECT_EQ(got.size(), own.size()) << json(text) << " lost one of the template's";
    const auto all_data =
        t.Encode(text, {.add_special_tokens = false, .data = std::vector<ByteRange>{{0, text.size()}}});
    ASSERT_TRUE(all_data.ok());
    EXPECT_EQ(SpecialsOf(loaded, *all_data), Ids{}) << json(text);
    const auto not_parsed = t.Encode(text, {.add_special_tokens = false, .parse_special = false});
    ASSERT_TRUE(not_parsed.ok());
    EXPECT_EQ(SpecialsOf(loaded, *not_parsed), Ids{}) << json(text);
    const auto without = t.Encode(text, {.add_special_tokens = false});
    recognised_without += SpecialsOf(loaded, *without).size() > own.size() ? 1 : 0;
  }
  // The texts do try.
  if (loaded.specials.size() > 1 || loaded.specials[0] != "<unk>") {
    EXPECT_GT(recognised_without, 100);
  }
}

// Without a special token in the data the ranges change nothing.
TEST_P(EveryTokenizer, DataRangesChangeNothingElse) {
  const Loaded loaded = Load(GetParam());
  ASSERT_NE(loaded.tokenizer, nullptr);
  const std::string special = loaded.specials.empty() ? "" : loaded.specials.back();
  const std::string text = special + " Hello, wörld! e\u0301 \u00a0 ﬁ 12345\n\n" + special +
                           "  x\u0323\u0301 " + special + "日本語 👩‍👩‍👧 end" + special;
  const auto want = loaded.tokenizer->Encode(text);
  ASSERT_TRUE(want.ok());
  std::vector<ByteRange> data;
  for (size_t pos = 0; pos < text.size();) {
    const size_t next = special.empty() ? text.npos : text.find(special, pos);
    const size_t end = std::min(next, text.size());
    // Two ranges a stretch, cut in the middle of whatever is there.
    if (end > pos + 1) {
      data.push_back({pos, pos + (end - pos) / 2});
      data.push_back({pos + (end - pos) / 2, end});
    }
    pos = end + special.size();
    if (special.empty()) break;
  }
  const auto got = loaded.tokenizer->Encode(text, {.data = data});
  ASSERT_TRUE(got.ok());
  EXPECT_EQ(*got, *want);
}

// The work grows with the text and not faster: counted, not timed.
TEST_P(EveryTokenizer, DoesLinearWorkForRunsOfOneCharacter) {
  const Loaded loaded = Load(GetParam());
  ASSERT_NE(loaded.tokenizer, nullptr);
  for (const std::string unit :
       {"a", "ab", " ", "\n", "中", "😀", "e\u0301", "▁", "1", "!", "'s", "aé ", "\u0301\u0323"}) {
    uint64_t steps[2] = {};
    std::string text;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 2; ++i) {
      const size_t bytes = i == 0 ? 100'000 : 200'000;
      while (text.size() < bytes) text += unit;
      const auto ids = loaded.tokenizer->Encode(text, {.steps = &steps[i]});
      ASSERT_TRUE(ids.ok()) << ids.status();
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    EXPECT_LE(static_cast<double>(steps[1]), 2.3 * static_cast<double>(steps[0]) + 1000) << json(unit);
    // Short pieces are scanned for every merge, up to 96 symbols.
    EXPECT_LE(steps[1], 200 * text.size()) << json(unit);
    if (seconds.count() > 0.3) {
      std::cout << GetParam().name << " " << json(unit) << ": 300 kB in " << seconds.count() << " s\n";
    }
  }
}

// Any ids, whatever text they make, decode in pieces to what they decode to at once.
TEST_P(EveryTokenizer, StreamsToWhatDecodeGives) {
  const Loaded loaded = Load(GetParam());
  ASSERT_NE(loaded.tokenizer, nullptr);
  const Tokenizer& t = *loaded.tokenizer;
  Rng rng(5);
  for (int round = 0; round < 400; ++round) {
    Ids ids;
    if (round % 2 == 0) {
      for (int i = 0; i < 30; ++i) {
        // Among them ids that are not in use, and often the first few hundred: bytes and specials.
        const auto top = static_cast<uint64_t>(t.vocab_size()) + 3;
        ids.push_back(
            static_cast<int32_t>(rng.Below(rng.Below(2) == 0 ? std::min<uint64_t>(top, 300) : top)));
      }
    } else {
      ids =
          t.Encode(
               "Héllo  wörld 😀👍🏽 日本語\n\tit's ﷺ 𝔘 नमस्ते <s> don't do not , "
               "end "
               ".")
              .value();
      std::rotate(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(rng.Below(ids.size())), ids.end());
    }
    for (const bool skip : {false, true}) {
      const std::string whole = t.Decode(ids, skip);
      StreamDecoder stream(t, skip);
      std::string text;
      std::vector<std::string> pieces;
      for (const int32_t id : ids) text += pieces.emplace_back(stream.Push(id));
      text += pieces.emplace_back(stream.Finish());
      EXPECT_EQ(text, whole);
      for (const std::string& piece : pieces)
        EXPECT_NO_THROW(json(piece).dump()) << "half a character went out";

      // A continuation adds what the whole has more than the prompt.
      const size_t half = rng.Below(ids.size() + 1);
      StreamDecoder continued(t, skip), replayed(t, skip);
      const std::span<const int32_t> prompt(ids.data(), half);
      continued.Prime(prompt);
      for (const int32_t id : prompt) replayed.Push(id);
      for (size_t i = half; i < ids.size(); ++i) EXPECT_EQ(continued.Push(ids[i]), replayed.Push(ids[i]));
      EXPECT_EQ(continued.Finish(), replayed.Finish());

      // A stop string, wherever the tokens cut it, ends the text in front of it and no part of it is seen.
      if (whole.size() < 8) continue;
      size_t begin = rng.Below(whole.size() - 4);
      while (begin > 0 && (static_cast<unsigned char>(whole[begin]) & 0xC0) == 0x80) --begin;
      const std::string stop = whole.substr(begin, 1 + rng.Below(12));
      auto matcher = StopMatcher::Create({stop}, false);
      ASSERT_TRUE(matcher.ok());
      std::string seen;
      for (const std::string& piece : pieces) seen += matcher->Push(piece).emit;
      seen += matcher->Flush();
      EXPECT_EQ(seen, whole.substr(0, whole.find(stop)));
      EXPECT_TRUE(matcher->matched());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Files, EveryTokenizer, testing::ValuesIn(Files()), [](const auto& info) {
  std::string name = info.param.name;
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
});

// A run of byte tokens that is not UTF-8, which decodes differently by intent (see TokenDecoder): the
// library's text has more U+FFFD then.
bool DecodesAlike(const std::string& got, const std::string& want) {
  return got == want || (want.find("\uFFFD") != want.npos && got.find("\uFFFD") != got.npos);
}

TEST(GoldenTokenizers, EncodeAndDecodeAsTheLibraryDid) {
  int files = 0;
  for (const auto& entry : fs::directory_iterator(kGolden)) {
    if (entry.path().extension() != ".json") continue;
    ++files;
    const auto tokenizer = Tokenizer::FromJson(ReadAll(entry.path().string()), {}, entry.path().string());
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    fs::path rows = entry.path();
    std::ifstream in(rows.replace_extension(".jsonl"));
    int count = 0;
    for (std::string line; std::getline(in, line); ++count) {
      const json row = json::parse(line);
      std::string text;
      ASSERT_TRUE(absl::Base64Unescape(row["b64"].get<std::string>(), &text));
      const auto ids = (*tokenizer)->Encode(text);
      const auto plain = (*tokenizer)->Encode(text, {.add_special_tokens = false});
      ASSERT_TRUE(ids.ok() && plain.ok());
      EXPECT_EQ(*ids, row["ids"].get<Ids>()) << entry.path() << " " << row["b64"];
      EXPECT_EQ(*plain, row["plain"].get<Ids>()) << entry.path() << " " << row["b64"];
      EXPECT_TRUE(DecodesAlike((*tokenizer)->Decode(*ids, false), row["text"]))
          << entry.path() << " " << row["b64"];
      EXPECT_TRUE(DecodesAlike((*tokenizer)->Decode(*ids, true), row["skipped"]))
          << entry.path() << " " << row["b64"];
    }
    EXPECT_GE(count, 100) << rows;
  }
  EXPECT_GE(files, 13);
}

}  // namespace
}  // namespace tidepool
