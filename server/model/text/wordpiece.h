#pragma once

#include "server/model/text/byte_trie.h"
#include "server/model/text/token_model.h"

namespace tidepool {

// WordPieceModel: the longest token first, from the left; a word that cannot be covered, or one that is too
// long, is one unknown token. Source: huggingface/tokenizers, models/wordpiece/mod.rs.
class WordPieceModel : public TokenModel {
 public:
  static absl::StatusOr<WordPieceModel> Parse(const nlohmann::json& node, const std::string& where);
  absl::Status Encode(std::string_view text, std::span<const Regex::Span> pieces, Scratch& scratch,
                      std::vector<int32_t>& ids) const override;

 private:
  // unk_ is always set.
  void EncodeWord(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const;

  ByteTrie front_, inside_;  // tokens that begin a word; those behind the prefix, without it
  size_t word_chars_max_ = 100;
};

// WordLevelModel: a piece is a token or unknown.
class WordLevelModel : public TokenModel {
 public:
  static absl::StatusOr<WordLevelModel> Parse(const nlohmann::json& node, const std::string& where);
  absl::Status Encode(std::string_view text, std::span<const Regex::Span> pieces, Scratch& scratch,
                      std::vector<int32_t>& ids) const override;
};

}  // namespace tidepool
