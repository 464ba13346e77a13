#include "server/model/text/detokenizer.h"

#include <algorithm>

namespace tidepool {

void StreamDecoder::Prime(std::span<const int32_t> prompt) {
  // Only the beginning of the text (for stripping) and an unfinished character (at most 3 byte tokens)
  // matter.
  constexpr size_t kLast = 8;
  size_t i = 0;
  while (i < prompt.size() && Push(prompt[i++]).empty()) {
  }
  if (prompt.size() > kLast) i = std::max(i, prompt.size() - kLast);
  for (; i < prompt.size(); ++i) Push(prompt[i]);
}

std::string StreamDecoder::Push(int32_t id) {
  std::string out;
  const auto piece = tokenizer_->TokenPiece(id);
  if (piece && !(skip_special_ && tokenizer_->is_special(id))) state_.Push(*piece, out);
  return out;
}

std::string StreamDecoder::Finish() {
  std::string out;
  state_.Finish(out);
  return out;
}

}  // namespace tidepool
