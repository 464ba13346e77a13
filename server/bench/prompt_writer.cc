#include "server/bench/prompt_writer.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string_view>

#include "base/rng.h"

namespace tidepool {
namespace {

// Short, common and without a plural of each other, so that nearly every tokenizer has them as one token.
constexpr std::string_view kWords[] = {
    "time",  "year",  "people", "way",   "day",   "man",   "thing",  "woman",  "life",  "child", "world",
    "hand",  "part",  "place",  "case",  "week",  "work",  "point",  "fact",   "group", "money", "night",
    "water", "room",  "mother", "area",  "story", "month", "lot",    "right",  "study", "book",  "eye",
    "job",   "word",  "issue",  "side",  "kind",  "head",  "house",  "friend", "hour",  "game",  "line",
    "end",   "law",   "car",    "city",  "name",  "team",  "minute", "idea",   "kid",   "body",  "back",
    "face",  "door",  "reason", "art",   "war",   "party", "food",   "love",   "sound", "sun",   "moon",
    "good",  "new",   "first",  "last",  "long",  "great", "little", "own",    "other", "old",   "big",
    "high",  "small", "large",  "next",  "early", "young", "few",    "bad",    "same",  "able",  "open",
    "blue",  "red",   "green",  "white", "black", "north", "south",  "east",   "west",  "land",  "sea",
    "road",  "tree",  "river",  "rock",  "wind",  "rain",  "snow",   "fire",   "light", "dark",  "form",
    "plan",  "test",  "stand",  "turn",  "move",  "live",  "bring",  "hold",   "write", "sit",   "lose",
    "pay",   "meet",  "run",    "learn", "lead",  "watch", "stop"};

void AppendWords(uint64_t seed, size_t count, std::string& out) {
  Rng rng(seed);
  for (size_t i = 0; i < count; ++i) {
    if (!out.empty()) out += ' ';
    out += kWords[rng.Below(std::size(kWords))];
  }
}

}  // namespace

PromptWriter PromptWriter::Words(double tokens_per_word, double overhead_tokens) {
  PromptWriter writer;
  writer.tokens_per_word_ = tokens_per_word;
  writer.overhead_tokens_ = overhead_tokens;
  return writer;
}

PromptWriter PromptWriter::Ids(int32_t low, int32_t high) {
  PromptWriter writer;
  writer.low_ = low;
  writer.high_ = high;
  return writer;
}

std::string PromptWriter::Text(std::span<const PromptPiece> pieces, bool first) const {
  std::string out;
  for (const PromptPiece& piece : pieces) {
    double tokens = piece.tokens;
    if (first && &piece == &pieces.back()) tokens -= overhead_tokens_;
    const double words = std::max(1.0, std::round(tokens / tokens_per_word_));
    AppendWords(piece.seed, static_cast<size_t>(words), out);
  }
  return out;
}

std::vector<int32_t> PromptWriter::Tokens(std::span<const PromptPiece> pieces) const {
  std::vector<int32_t> out;
  for (const PromptPiece& piece : pieces) {
    Rng rng(piece.seed);
    for (uint32_t i = 0; i < piece.tokens; ++i) {
      out.push_back(low_ + static_cast<int32_t>(rng.Below(static_cast<uint64_t>(high_ - low_))));
    }
  }
  return out;
}

std::string PromptWriter::SomeWords(uint64_t seed, size_t count) {
  std::string out;
  AppendWords(seed, count, out);
  return out;
}

}  // namespace tidepool
