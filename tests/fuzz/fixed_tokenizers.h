#pragma once

#include <memory>
#include <span>
#include <string>

#include "server/model/text/tokenizer.h"

namespace tidepool::fuzz {

struct FixedTokenizer {
  std::string name;
  std::shared_ptr<const Tokenizer> tokenizer;
  // Decode(Encode(text)) is the text again, whatever valid UTF-8 it holds.
  bool lossless = false;
};

// The demo model's tokenizer and those of tests/fuzz/tokenizers, loaded once. The working folder must be the
// root of the source tree.
std::span<const FixedTokenizer> FixedTokenizers();

}  // namespace tidepool::fuzz
