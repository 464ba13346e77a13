#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "server/bench/session.h"

namespace tidepool {

// PromptWriter: made-up prompts of about so many tokens. Equal pieces give equal text. As words, whose number
// of tokens was measured at the server, or as token ids, whose number is exact. Plain; thread-safe.
class PromptWriter {
 public:
  // Words of common English: `tokens_per_word` on average, and `overhead_tokens` that the server adds to each
  // prompt (a chat template, a begin token).
  static PromptWriter Words(double tokens_per_word, double overhead_tokens);
  // Ids in [low, high); low < high.
  static PromptWriter Ids(int32_t low, int32_t high);

  bool ids() const { return high_ > 0; }
  // For Words. `first`: of a conversation, whose turn bears the overhead; it is taken off the last piece.
  std::string Text(std::span<const PromptPiece> pieces, bool first) const;
  // For Ids.
  std::vector<int32_t> Tokens(std::span<const PromptPiece> pieces) const;

  // `count` words drawn with `seed`, separated by spaces: what calibration sends.
  static std::string SomeWords(uint64_t seed, size_t count);

 private:
  double tokens_per_word_ = 1, overhead_tokens_ = 0;
  int32_t low_ = 0, high_ = 0;
};

}  // namespace tidepool
