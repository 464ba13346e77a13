// Ids and cuts drawn from the input: streamed text adds up to the whole, and stop strings do not leak.
#include <algorithm>
#include <optional>

#include "server/model/strings/utf8.h"
#include "server/model/text/detokenizer.h"
#include "tests/fuzz/fixed_tokenizers.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

std::vector<int32_t> DrawIds(fuzz::ByteReader& reader, const Tokenizer& tokenizer, size_t count) {
  std::vector<int32_t> ids;
  // One above the vocabulary and one below zero: ids that it does not hold.
  const auto range = static_cast<uint32_t>(tokenizer.vocab_size()) + 2;
  for (size_t i = 0; i < count && !reader.empty(); ++i) {
    ids.push_back(static_cast<int32_t>(reader.Word() % range) - 1);
  }
  return ids;
}

// The pieces that leave a decoder for `ids`, the rest last.
std::vector<std::string> Stream(StreamDecoder decoder, std::span<const int32_t> ids) {
  std::vector<std::string> pieces;
  for (const int32_t id : ids) pieces.push_back(decoder.Push(id));
  pieces.push_back(decoder.Finish());
  for (const std::string& piece : pieces) TP_CHECK(utf8::IsValid(piece));
  return pieces;
}

std::string Join(std::span<const std::string> pieces) {
  std::string out;
  for (const std::string& piece : pieces) out += piece;
  return out;
}

// After a prompt that was told by Prime the stream goes on as if the prompt had been pushed.
void CheckPrime(const Tokenizer& tokenizer, bool skip_special, std::span<const int32_t> ids, size_t cut) {
  StreamDecoder pushed(tokenizer, skip_special), primed(tokenizer, skip_special);
  for (const int32_t id : ids.subspan(0, cut)) pushed.Push(id);
  primed.Prime(ids.subspan(0, cut));
  TP_CHECK(Stream(pushed, ids.subspan(cut)) == Stream(primed, ids.subspan(cut)));
}

// What must have been shown of `text`: all that stands before the stop string whose last byte comes first,
// the longest of those that end there (with it, where `include`).
struct Expected {
  std::string shown;
  bool matched = false;
};
Expected Truth(const std::string& text, const std::vector<std::string>& stops, bool include) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t longest = 0;
    for (const std::string& stop : stops) {
      if (std::string_view(text).substr(0, end).ends_with(stop)) longest = std::max(longest, stop.size());
    }
    if (longest > 0) return {text.substr(0, include ? end : end - longest), true};
  }
  return {text, false};
}

void CheckStops(std::span<const std::string> pieces, const std::vector<std::string>& stops, bool include) {
  auto matcher = StopMatcher::Create(stops, include);
  TP_CHECK(matcher.ok());
  std::string shown;
  bool matched = false;
  for (const std::string& piece : pieces) {
    const StopMatcher::Result result = matcher->Push(piece);
    TP_CHECK(utf8::IsValid(result.emit));
    TP_CHECK(!matched || (result.emit.empty() && !result.matched));
    shown += result.emit;
    matched = matched || result.matched.has_value();
  }
  shown += matcher->Flush();
  const Expected expected = Truth(Join(pieces), stops, include);
  TP_CHECK(matched == expected.matched && shown == expected.shown);
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(detokenizer) {
  fuzz::ByteReader reader(input.substr(0, 2048));  // the truth about stop strings is quadratic
  const auto tokenizers = fuzz::FixedTokenizers();
  const uint8_t choices = reader.Byte();
  const Tokenizer& tokenizer = *tokenizers[(choices & 0x0F) % tokenizers.size()].tokenizer;
  const bool skip_special = (choices & 0x80) != 0, include_stop = (choices & 0x40) != 0;
  const size_t stop_count = reader.UpTo(4);
  std::vector<size_t> stop_at, stop_bytes;
  for (size_t i = 0; i < stop_count; ++i) {
    stop_at.push_back(reader.Byte());
    stop_bytes.push_back(1 + reader.UpTo(12));
  }
  const size_t cut = reader.Byte();
  const std::vector<int32_t> ids = DrawIds(reader, tokenizer, 1024);

  const std::vector<std::string> pieces = Stream(StreamDecoder(tokenizer, skip_special), ids);
  const std::string text = Join(pieces);
  TP_CHECK(text == tokenizer.Decode(ids, skip_special));
  CheckPrime(tokenizer, skip_special, ids, std::min(cut, ids.size()));

  // Stop strings that occur in the text (and then, cut off anywhere, nearly do), in whole characters.
  std::vector<std::string> stops;
  for (size_t i = 0; i < stop_count; ++i) {
    std::string stop = utf8::Sanitize(text.substr(std::min(stop_at[i], text.size()), stop_bytes[i]));
    if (i % 2 == 1) stop += 'x';
    if (!stop.empty()) stops.push_back(std::move(stop));
  }
  CheckStops(pieces, stops, include_stop);
}

}  // namespace tidepool
