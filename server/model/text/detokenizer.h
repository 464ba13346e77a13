#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "server/model/text/stop_matcher.h"
#include "server/model/text/token_decoder.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {

// StreamDecoder: turns one sequence's tokens into text as they come. Emits whole UTF-8 characters only: bytes
// of an unfinished character are held back (at most 3, or what a later token may still change), bytes that
// can no longer become one are replaced by U+FFFD. All outputs together equal Tokenizer::Decode of all ids,
// the stripped leading space included. Owned by one thread; copyable (a fork of the sequence continues
// alone).
class StreamDecoder {
 public:
  // `tokenizer` is borrowed and must outlive this. `kept`: ids of special tokens that are shown although
  // others are skipped; borrowed as well.
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens, std::span<const int32_t> kept = {})
      : tokenizer_(&tokenizer),
        skip_special_(skip_special_tokens),
        kept_(kept),
        state_(tokenizer.decoder_spec()) {}

  // Tells what stands before the first Push, without giving it out: a continuation keeps the space that a
  // text's beginning is stripped of, and may complete a character that the prompt began. Prime(prompt) and
  // then the outputs of Push(ids...) give what Decode(prompt + ids) adds to Decode(prompt). Looks at the
  // first tokens with any text and at the last few only. Call at most once, before the first Push.
  void Prime(std::span<const int32_t> prompt);

  // The text that became certain; often empty. Ids outside the vocabulary add nothing.
  std::string Push(int32_t id);
  // The rest: an unfinished character as U+FFFD. Call once, after the last Push.
  std::string Finish();

 private:
  // Whether a token has text that is to be shown.
  bool Contributes(int32_t id) const;

  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::span<const int32_t> kept_;
  TokenDecoder state_;
};

}  // namespace tidepool
