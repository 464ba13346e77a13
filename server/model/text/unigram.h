#pragma once

#include "server/model/text/byte_trie.h"
#include "server/model/text/token_model.h"

namespace tidepool {

// UnigramModel: the segmentation of a piece with the largest sum of the tokens' scores (Viterbi). Characters
// that no token covers cost the lowest score less 10 and become the unknown token, a run of them one (or
// bytes, with byte_fallback). O(bytes x the longest token). Source: huggingface/tokenizers,
// models/unigram/model.rs.
class UnigramModel : public TokenModel {
 public:
  static absl::StatusOr<UnigramModel> Parse(const nlohmann::json& node, const std::string& where);
  absl::Status Encode(std::string_view text, std::span<const Regex::Span> pieces, Scratch& scratch,
                      std::vector<int32_t>& ids) const override;

 private:
  absl::Status EncodePiece(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;
  absl::Status AppendToken(std::string_view token, std::vector<int32_t>& ids) const;

  ByteTrie trie_;
  std::vector<double> scores_;
  std::vector<int32_t> byte_ids_;  // byte_fallback: id of <0x00>..<0xFF>, -1 where absent; empty if off
  double unk_score_ = 0;
};

}  // namespace tidepool
