#include "server/model/text/wordpiece.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/json_reader.h"

namespace tidepool {

using nlohmann::json;

absl::StatusOr<WordPieceModel> WordPieceModel::Parse(const json& node, const std::string& where) {
  WordPieceModel model;
  TP_RETURN_IF_ERROR(model.ParseVocab(node, where));
  TP_ASSIGN_OR_RETURN(const std::string unk, json_reader::GetString(node, "unk_token", where, "[UNK]"));
  const auto id = model.Find(unk);
  if (!id) {
    return absl::InvalidArgumentError(absl::StrCat(where, ".unk_token '", unk, "' is not in the vocabulary"));
  }
  model.unk_ = *id;
  TP_ASSIGN_OR_RETURN(const std::string prefix,
                      json_reader::GetString(node, "continuing_subword_prefix", where, "##"));
  if (json_reader::Member(node, "max_input_chars_per_word") != nullptr) {
    TP_ASSIGN_OR_RETURN(const int64_t chars,
                        json_reader::GetInt(node, "max_input_chars_per_word", where, 0, int64_t{1} << 31));
    model.word_chars_max_ = static_cast<size_t>(chars);
  }
  std::vector<std::pair<std::string, int32_t>> front, inside;
  for (const auto& [token, token_id] : model.vocab_) {
    if (token.starts_with(prefix)) inside.emplace_back(token.substr(prefix.size()), token_id);
    front.emplace_back(token, token_id);
  }
  model.front_ = ByteTrie(std::move(front));
  model.inside_ = ByteTrie(std::move(inside));
  return model;
}

absl::Status WordPieceModel::Encode(std::string_view text, std::span<const Regex::Span> pieces,
                                    Scratch& scratch, std::vector<int32_t>& ids) const {
  for (const Regex::Span& span : pieces) {
    const std::string_view word = text.substr(span.begin, span.end - span.begin);
    if (word.size() > WordCache::kWordBytesMax || scratch.avoid_special) {
      EncodeWord(word, scratch, ids);
      continue;
    }
    const uint64_t hash = WordCache::Hash(word);
    if (const auto known = scratch.cache.Get(word, hash); !known.empty()) {
      ids.insert(ids.end(), known.begin(), known.end());
      continue;
    }
    const size_t before = ids.size();
    EncodeWord(word, scratch, ids);
    scratch.cache.Put(word, hash, std::span(ids).subspan(before));
  }
  return absl::OkStatus();
}

void WordPieceModel::EncodeWord(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const {
  const size_t before = ids.size();
  bool covered = utf8::Count(word) <= word_chars_max_;
  for (size_t pos = 0; covered && pos < word.size();) {
    size_t longest = 0;
    int32_t token = 0;
    (pos == 0 ? front_ : inside_).Prefixes(word.substr(pos), [&](size_t length, int32_t id) {
      ++scratch.steps;
      if (scratch.avoid_special && IsSpecial(id)) return;
      longest = length;
      token = id;
    });
    covered = longest > 0;
    ids.push_back(token);
    pos += longest;
  }
  if (covered) return;
  ids.resize(before);
  ids.push_back(*unk_);
}

absl::StatusOr<WordLevelModel> WordLevelModel::Parse(const json& node, const std::string& where) {
  WordLevelModel model;
  TP_RETURN_IF_ERROR(model.ParseVocab(node, where));
  TP_ASSIGN_OR_RETURN(const std::string unk, json_reader::GetString(node, "unk_token", where, "<unk>"));
  model.unk_ = model.Find(unk);
  return model;
}

absl::Status WordLevelModel::Encode(std::string_view text, std::span<const Regex::Span> pieces,
                                    Scratch& scratch, std::vector<int32_t>& ids) const {
  for (const Regex::Span& span : pieces) {
    auto id = Find(text.substr(span.begin, span.end - span.begin));
    if (id && scratch.avoid_special && IsSpecial(*id)) id.reset();
    if (!id && !unk_) {
      return absl::InvalidArgumentError(
          "a word is not in the vocabulary and the tokenizer's model has no unk_token there");
    }
    ids.push_back(id ? *id : *unk_);
  }
  return absl::OkStatus();
}

}  // namespace tidepool
