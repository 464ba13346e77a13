// tokenizer.json, 0x1E, tokenizer_config.json, 0x1E, a text: a file that loads encodes and decodes anything,
// in one piece and as a stream.
#include "server/model/strings/utf8.h"
#include "server/model/text/detokenizer.h"
#include "server/model/text/tokenizer.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

void CheckDecode(const Tokenizer& tokenizer, std::span<const int32_t> ids, bool skip_special) {
  const std::string whole = tokenizer.Decode(ids, skip_special);
  TP_CHECK(utf8::IsValid(whole));
  StreamDecoder stream(tokenizer, skip_special);
  std::string pieces;
  for (const int32_t id : ids) {
    const std::string piece = stream.Push(id);
    TP_CHECK(utf8::IsValid(piece));
    pieces += piece;
  }
  TP_CHECK(pieces + stream.Finish() == whole);
}

void Use(const Tokenizer& tokenizer, std::string_view text) {
  for (const bool parse_special : {false, true}) {
    Tokenizer::EncodeOptions options;
    options.parse_special = parse_special;
    const auto ids = tokenizer.Encode(text, options);
    if (!ids.ok()) continue;
    for (const int32_t id : *ids) TP_CHECK(id >= 0 && id < tokenizer.vocab_size());
    CheckDecode(tokenizer, *ids, parse_special);
  }
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(tokenizer_json) {
  const auto parts = fuzz::Split(input, 3);
  const auto tokenizer = Tokenizer::FromJson(parts[0], parts[1]);
  if (!tokenizer.ok()) {
    const auto message = tokenizer.status().message();
    TP_CHECK(!message.empty() && message.find('\n') == message.npos);
    return;
  }
  Use(**tokenizer, parts[2]);
  Use(**tokenizer, "Hello  wörld 12\n\t\xE2\x96\x81 \xF0\x9F\x8C\x8A\xFF<s></s> ");
  std::vector<int32_t> ids;
  for (int32_t id = -1; id <= std::min(64, (*tokenizer)->vocab_size()); ++id) {
    ids.push_back(id);
    (*tokenizer)->TokenText(id);
    if (const auto piece = (*tokenizer)->TokenPiece(id))
      TP_CHECK((*tokenizer)->PieceToId(*piece).has_value());
  }
  CheckDecode(**tokenizer, ids, false);
}

}  // namespace tidepool
