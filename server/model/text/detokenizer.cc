#include "server/model/text/detokenizer.h"

#include <algorithm>

namespace tidepool {

bool StreamDecoder::Contributes(int32_t id) const {
  if (!tokenizer_->TokenPiece(id).has_value()) return false;
  return !skip_special_ || !tokenizer_->is_special(id) || std::ranges::find(kept_, id) != kept_.end();
}

void StreamDecoder::Prime(std::span<const int32_t> prompt) {
  // Only the beginning of the text (for stripping) and an unfinished character (at most 3 byte tokens)
  // matter.
  constexpr int kLast = 8;
  size_t i = 0;
  while (i < prompt.size() && Push(prompt[i++]).empty()) {
  }
  size_t from = prompt.size();
  for (int last = 0; from > i && last < kLast; --from) last += Contributes(prompt[from - 1]) ? 1 : 0;
  for (; from < prompt.size(); ++from) Push(prompt[from]);
}

std::string StreamDecoder::Push(int32_t id) {
  std::string out;
  if (Contributes(id)) state_.Push(*tokenizer_->TokenPiece(id), out);
  return out;
}

std::string StreamDecoder::Finish() {
  std::string out;
  state_.Finish(out);
  return out;
}

}  // namespace tidepool
