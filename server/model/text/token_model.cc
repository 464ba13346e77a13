#include "server/model/text/token_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/text/bpe.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/unigram.h"
#include "server/model/text/wordpiece.h"

namespace tidepool {

using nlohmann::json;

namespace {

template <typename Model>
absl::StatusOr<std::unique_ptr<TokenModel>> Own(absl::StatusOr<Model> model) {
  if (!model.ok()) return model.status();
  return std::make_unique<Model>(*std::move(model));
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenModel>> TokenModel::Parse(const json& node, const std::string& where,
                                                              bool byte_level) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(node, where));
  // Old files name no type; then its fields tell, in the order in which the library tries.
  const json* vocab = json_reader::Member(node, "vocab");
  const char* guess = json_reader::Member(node, "merges") != nullptr                     ? "BPE"
                      : json_reader::Member(node, "max_input_chars_per_word") != nullptr ? "WordPiece"
                      : vocab != nullptr && vocab->is_array()                            ? "Unigram"
                                                                                         : "WordLevel";
  TP_ASSIGN_OR_RETURN(const std::string type, json_reader::GetString(node, "type", where, guess));
  if (type == "BPE") return Own(BpeModel::Parse(node, where, byte_level));
  if (byte_level && (type == "WordPiece" || type == "WordLevel" || type == "Unigram")) {
    return absl::UnimplementedError(
        absl::StrCat(where, ".type: a ", type, " behind a ByteLevel pre-tokenizer is not supported"));
  }
  if (type == "Unigram") return Own(UnigramModel::Parse(node, where));
  if (type == "WordPiece") return Own(WordPieceModel::Parse(node, where));
  if (type == "WordLevel") return Own(WordLevelModel::Parse(node, where));
  return absl::UnimplementedError(absl::StrCat(where, ".type: model type ", type, " is not supported"));
}

bool TokenModel::HasSpecial(std::span<const int32_t> ids) const {
  return std::any_of(ids.begin(), ids.end(), [this](int32_t id) { return IsSpecial(id); });
}

std::optional<int32_t> TokenModel::Find(std::string_view piece) const {
  const auto it = vocab_.find(absl::string_view(piece.data(), piece.size()));
  if (it == vocab_.end()) return std::nullopt;
  return it->second;
}

absl::Status TokenModel::ParseVocab(const json& node, const std::string& where) {
  const json* vocab = json_reader::Member(node, "vocab");
  if (vocab == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".vocab is missing"));
  TP_RETURN_IF_ERROR(json_reader::RequireObject(*vocab, where + ".vocab"));
  vocab_.reserve(vocab->size());
  std::vector<bool> seen;
  for (const auto& [piece, value] : vocab->items()) {
    TP_ASSIGN_OR_RETURN(
        const int64_t id,
        json_reader::AsInt(value, absl::StrCat(where, ".vocab['", piece, "']"), 0, kVocabMax - 1));
    if (static_cast<size_t>(id) >= seen.size()) seen.resize(static_cast<size_t>(id) + 1);
    if (seen[static_cast<size_t>(id)]) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ".vocab['", piece, "']: id ", id, " is used twice"));
    }
    seen[static_cast<size_t>(id)] = true;
    vocab_.emplace(piece, static_cast<int32_t>(id));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<int32_t>> TokenModel::ParseToken(const json& node, std::string_view key,
                                                              const std::string& where) const {
  TP_ASSIGN_OR_RETURN(const std::string token, json_reader::GetString(node, key, where, ""));
  if (token.empty()) return std::optional<int32_t>();
  const auto id = Find(token);
  if (!id) {
    return absl::InvalidArgumentError(absl::StrCat(where, ".", absl::string_view(key.data(), key.size()),
                                                   " '", token, "' is not in the vocabulary"));
  }
  return id;
}

}  // namespace tidepool
