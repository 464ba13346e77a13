// A text, encoded by the fixed tokenizers: it comes back, and none of it becomes a control token.
#include "server/model/strings/utf8.h"
#include "tests/fuzz/fixed_tokenizers.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {

TIDEPOOL_FUZZ_TARGET(tokenizer_text) {
  const std::string text = utf8::IsValid(input) ? std::string(input) : utf8::Sanitize(input);
  TP_CHECK(utf8::IsValid(text));
  for (const fuzz::FixedTokenizer& fixed : fuzz::FixedTokenizers()) {
    const Tokenizer& tokenizer = *fixed.tokenizer;
    for (const bool parse_special : {false, true}) {
      Tokenizer::EncodeOptions options;
      options.add_special_tokens = false;
      options.parse_special = parse_special;
      const auto ids = tokenizer.Encode(input, options);
      TP_CHECK(ids.ok());
      for (const int32_t id : *ids) {
        TP_CHECK(tokenizer.TokenPiece(id).has_value());
        // The unknown token stands for what the vocabulary lacks: it steers nothing.
        TP_CHECK(parse_special || !tokenizer.is_special(id) || tokenizer.TokenPiece(id) == "<unk>");
      }
      const std::string back = tokenizer.Decode(*ids, false);
      TP_CHECK(utf8::IsValid(back));
      if (fixed.lossless) TP_CHECK(back == text);
      // Marked as data from end to end it is as if special tokens were not looked for.
      if (!parse_special && !text.empty()) {
        const ByteRange all[] = {{0, text.size()}};
        Tokenizer::EncodeOptions data;
        data.add_special_tokens = false;
        data.data = all;
        TP_CHECK(*tokenizer.Encode(text, data) == *ids);
      }
      // Broken UTF-8 reads as what replaces it.
      if (text != input) TP_CHECK(*tokenizer.Encode(text, options) == *ids);
    }
  }
}

}  // namespace tidepool
