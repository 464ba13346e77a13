#include "server/model/text/tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/status.h"
#include "server/model/text/detokenizer.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/utf8.h"

namespace tidepool {

using nlohmann::json;

namespace {

constexpr size_t kTokenizerBytesMax = size_t{256} << 20;  // the largest known (a 256k vocabulary) has 35 MB
constexpr size_t kConfigBytesMax = size_t{16} << 20;

absl::string_view Sv(std::string_view s) { return {s.data(), s.size()}; }

// A token in a config file is a string, or an object with `content` (an AddedToken).
absl::StatusOr<std::string> ReadTokenText(const json& root, std::string_view key, std::string_view file) {
  const json* value = json_reader::Member(root, key);
  if (value != nullptr && value->is_object()) {
    return json_reader::GetString(*value, "content", absl::StrCat(Sv(file), ": ", Sv(key)));
  }
  return json_reader::GetString(root, key, absl::StrCat(Sv(file), ":"), "");
}

// `chat_template`: a string, or a list of {name, template}, of which `default` is the one for chats.
absl::StatusOr<std::string> ReadTemplate(const json& root, std::string_view file) {
  const json* value = json_reader::Member(root, "chat_template");
  if (value == nullptr) return std::string();
  const std::string where = absl::StrCat(Sv(file), ": chat_template");
  if (value->is_string()) return value->get<std::string>();
  TP_RETURN_IF_ERROR(json_reader::RequireArray(*value, where));
  for (size_t i = 0; i < value->size(); ++i) {
    const std::string at = absl::StrCat(where, "[", i, "]");
    TP_RETURN_IF_ERROR(json_reader::RequireObject((*value)[i], at));
    TP_ASSIGN_OR_RETURN(const std::string name, json_reader::GetString((*value)[i], "name", at));
    if (name == "default") return json_reader::GetString((*value)[i], "template", at);
  }
  return std::string();
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::FromJson(std::string_view tokenizer_json,
                                                                     std::string_view config_json,
                                                                     std::string_view name) {
  // make_shared needs a public constructor.
  std::shared_ptr<Tokenizer> tokenizer(new Tokenizer());
  TP_ASSIGN_OR_RETURN(const json root, json_reader::Parse(tokenizer_json, name));
  const auto named = [&](const absl::Status& status) { return Annotate(status, name); };
  if (const auto status = tokenizer->ReadTokenizerJson(root); !status.ok()) return named(status);
  Sha256 sha;
  sha.Update(tokenizer_json);
  tokenizer->digest_ = HexEncode(sha.Finish());
  if (!config_json.empty()) {
    TP_RETURN_IF_ERROR(tokenizer->ReadConfig(config_json, "tokenizer_config.json", false));
  }
  return tokenizer;
}

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Load(const std::string& dir) {
  const std::string path = dir + "/tokenizer.json";
  TP_ASSIGN_OR_RETURN(const std::string text, json_reader::ReadFile(path, kTokenizerBytesMax));
  TP_ASSIGN_OR_RETURN(const std::shared_ptr<const Tokenizer> loaded, FromJson(text, {}, path));
  // Not shared with anyone yet.
  auto* tokenizer = const_cast<Tokenizer*>(loaded.get());

  struct File {
    const char* name;
    bool only_missing;
  };
  for (const File& file : {File{"tokenizer_config.json", false}, File{"special_tokens_map.json", true}}) {
    const std::string config_path = absl::StrCat(dir, "/", file.name);
    auto config = json_reader::ReadFile(config_path, kConfigBytesMax);
    if (absl::IsNotFound(config.status())) continue;
    if (!config.ok()) return config.status();
    TP_RETURN_IF_ERROR(tokenizer->ReadConfig(*config, config_path, file.only_missing));
  }
  auto chat_template = json_reader::ReadFile(dir + "/chat_template.jinja", kConfigBytesMax);
  if (chat_template.ok()) {
    tokenizer->chat_template_ = *std::move(chat_template);
  } else if (!absl::IsNotFound(chat_template.status())) {
    return chat_template.status();
  }
  return loaded;
}

absl::Status Tokenizer::ReadTokenizerJson(const json& root) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(root, "the file"));
  const json* model = json_reader::Member(root, "model");
  if (model == nullptr) return absl::InvalidArgumentError("model is missing");
  TP_ASSIGN_OR_RETURN(bpe_, BpeModel::Parse(*model, "model"));
  if (const json* node = json_reader::Member(root, "normalizer")) {
    TP_ASSIGN_OR_RETURN(normalizer_, Normalizer::Parse(*node, "normalizer"));
  }
  if (const json* node = json_reader::Member(root, "pre_tokenizer")) {
    TP_ASSIGN_OR_RETURN(pretokenizer_, PreTokenizer::Parse(*node, "pre_tokenizer"));
  }
  if (const json* node = json_reader::Member(root, "decoder")) {
    TP_ASSIGN_OR_RETURN(decoder_, TokenDecoderSpec::Parse(*node, "decoder"));
  }

  for (const auto& [piece, id] : bpe_.vocab()) {
    if (static_cast<size_t>(id) >= id_to_text_.size()) id_to_text_.resize(static_cast<size_t>(id) + 1);
    id_to_text_[static_cast<size_t>(id)] = {piece, true, false};
  }
  if (const json* list = json_reader::Member(root, "added_tokens")) {
    TP_RETURN_IF_ERROR(json_reader::RequireArray(*list, "added_tokens"));
    for (size_t i = 0; i < list->size(); ++i) {
      const std::string where = absl::StrCat("added_tokens[", i, "]");
      const json& node = (*list)[i];
      TP_RETURN_IF_ERROR(json_reader::RequireObject(node, where));
      AddedToken token;
      TP_ASSIGN_OR_RETURN(const int64_t id,
                          json_reader::GetInt(node, "id", where, 0, BpeModel::kVocabMax - 1));
      token.id = static_cast<int32_t>(id);
      TP_ASSIGN_OR_RETURN(token.content, json_reader::GetString(node, "content", where));
      TP_ASSIGN_OR_RETURN(token.special, json_reader::GetBool(node, "special", where, false));
      TP_ASSIGN_OR_RETURN(token.lstrip, json_reader::GetBool(node, "lstrip", where, false));
      TP_ASSIGN_OR_RETURN(token.rstrip, json_reader::GetBool(node, "rstrip", where, false));
      TP_ASSIGN_OR_RETURN(token.single_word, json_reader::GetBool(node, "single_word", where, false));
      TP_ASSIGN_OR_RETURN(token.normalized, json_reader::GetBool(node, "normalized", where, !token.special));
      const auto in_vocab = bpe_.Find(token.content);
      if (in_vocab && *in_vocab != token.id) {
        return absl::InvalidArgumentError(absl::StrCat(where, ": '", token.content, "' has id ", token.id,
                                                       " here but ", *in_vocab, " in model.vocab"));
      }
      if (const auto other = TokenPiece(token.id); other && *other != token.content) {
        return absl::InvalidArgumentError(absl::StrCat(where, ": '", token.content, "' has id ", token.id,
                                                       ", which is the id of '", Sv(*other), "'"));
      }
      if (static_cast<size_t>(id) >= id_to_text_.size()) id_to_text_.resize(static_cast<size_t>(id) + 1);
      id_to_text_[static_cast<size_t>(id)] = {token.content, true, token.special};
      std::string pattern = token.content;
      if (token.normalized) {
        auto normalized = normalizer_.Apply(token.content);
        if (!normalized.ok()) return Annotate(normalized.status(), where);
        pattern = *std::move(normalized);
      }
      added_ids_.emplace(token.content, token.id);
      added_.Add(token, pattern);
    }
  }
  if (const json* node = json_reader::Member(root, "post_processor")) {
    TP_RETURN_IF_ERROR(ReadPostProcessor(*node, "post_processor"));
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::ReadPostProcessor(const json& node, const std::string& where) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(node, where));
  TP_ASSIGN_OR_RETURN(const std::string type, json_reader::GetString(node, "type", where));
  if (type == "ByteLevel") return absl::OkStatus();  // trims offsets, which we do not give
  if (type == "Sequence") {
    const json* list = json_reader::Member(node, "processors");
    if (list == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".processors is missing"));
    TP_RETURN_IF_ERROR(json_reader::RequireArray(*list, where + ".processors"));
    for (size_t i = 0; i < list->size(); ++i) {
      TP_RETURN_IF_ERROR(ReadPostProcessor((*list)[i], absl::StrCat(where, ".processors[", i, "]")));
    }
    return absl::OkStatus();
  }
  if (type != "TemplateProcessing") {
    return absl::UnimplementedError(absl::StrCat(where, ": post-processor ", type, " is not supported"));
  }
  const json* single = json_reader::Member(node, "single");
  if (single == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".single is missing"));
  TP_RETURN_IF_ERROR(json_reader::RequireArray(*single, where + ".single"));
  const json* specials = json_reader::Member(node, "special_tokens");
  std::vector<int32_t> before, after;
  bool seen_text = false;
  for (size_t i = 0; i < single->size(); ++i) {
    const std::string at = absl::StrCat(where, ".single[", i, "]");
    if (json_reader::Member((*single)[i], "Sequence") != nullptr) {
      if (seen_text) return absl::UnimplementedError(at + ": the text more than once is not supported");
      seen_text = true;
      continue;
    }
    const json* token = json_reader::Member((*single)[i], "SpecialToken");
    if (token == nullptr) return absl::InvalidArgumentError(at + " must hold SpecialToken or Sequence");
    TP_ASSIGN_OR_RETURN(const std::string name, json_reader::GetString(*token, "id", at + ".SpecialToken"));
    const json* entry = specials == nullptr ? nullptr : json_reader::Member(*specials, name);
    const json* ids = entry == nullptr ? nullptr : json_reader::Member(*entry, "ids");
    const std::string ids_where = absl::StrCat(where, ".special_tokens['", name, "'].ids");
    if (ids == nullptr) return absl::InvalidArgumentError(ids_where + " is missing");
    TP_RETURN_IF_ERROR(json_reader::RequireArray(*ids, ids_where));
    for (const json& id : *ids) {
      TP_ASSIGN_OR_RETURN(const int64_t value, json_reader::AsInt(id, ids_where, 0, vocab_size() - 1));
      (seen_text ? after : before).push_back(static_cast<int32_t>(value));
    }
  }
  if (!seen_text) return absl::InvalidArgumentError(where + ".single has no Sequence");
  // Of two templates in a Sequence the later one wraps the earlier.
  prefix_ids_.insert(prefix_ids_.begin(), before.begin(), before.end());
  suffix_ids_.insert(suffix_ids_.end(), after.begin(), after.end());
  return absl::OkStatus();
}

absl::Status Tokenizer::ReadConfig(std::string_view text, std::string_view file, bool only_missing) {
  TP_ASSIGN_OR_RETURN(const json root, json_reader::Parse(text, file));
  TP_RETURN_IF_ERROR(json_reader::RequireObject(root, file));
  const auto read = [&](std::string_view key, std::string& token,
                        std::optional<int32_t>& id) -> absl::Status {
    if (only_missing && id) return absl::OkStatus();
    TP_ASSIGN_OR_RETURN(const std::string spelled, ReadTokenText(root, key, file));
    if (spelled.empty()) return absl::OkStatus();
    const auto found = PieceToId(spelled);
    if (!found) {
      return absl::InvalidArgumentError(
          absl::StrCat(Sv(file), ": ", Sv(key), " '", spelled, "' is not a token of tokenizer.json"));
    }
    token = spelled;
    id = found;
    return absl::OkStatus();
  };
  TP_RETURN_IF_ERROR(read("bos_token", bos_token_, bos_id_));
  TP_RETURN_IF_ERROR(read("eos_token", eos_token_, eos_id_));
  if (chat_template_.empty()) {
    TP_ASSIGN_OR_RETURN(chat_template_, ReadTemplate(root, file));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, EncodeOptions options) const {
  if (text.size() > kTextBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("text has ", text.size(), " bytes; at most ", kTextBytesMax, " are tokenised"));
  }
  std::string sanitized;
  if (!utf8::IsValid(text)) {
    sanitized = utf8::Sanitize(text);
    text = sanitized;
  }
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3 + 8);
  if (options.add_special_tokens) ids = prefix_ids_;

  std::vector<std::string> pieces;
  // A stretch without raw-text tokens: normalise, cut out the normalised tokens, pre-tokenise the rest,
  // merge.
  const auto encode_plain = [&](std::string_view plain, bool at_start) -> absl::Status {
    TP_ASSIGN_OR_RETURN(const std::string normalized, normalizer_.Apply(std::string(plain)));
    const auto encode_words = [&](std::string_view words, bool first) -> absl::Status {
      TP_RETURN_IF_ERROR(pretokenizer_.Apply(words, first, pieces));
      for (const std::string& piece : pieces) bpe_.Encode(piece, ids);
      return absl::OkStatus();
    };
    if (added_.empty(true)) return encode_words(normalized, at_start);
    for (const auto& part : added_.Split(normalized, true, options.parse_special)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      TP_RETURN_IF_ERROR(encode_words(std::string_view(normalized).substr(part.begin, part.end - part.begin),
                                      at_start && part.begin == 0));
    }
    return absl::OkStatus();
  };
  for (const auto& part : added_.Split(text, false, options.parse_special)) {
    if (part.id >= 0) {
      ids.push_back(part.id);
      continue;
    }
    TP_RETURN_IF_ERROR(encode_plain(text.substr(part.begin, part.end - part.begin), part.begin == 0));
  }
  if (options.add_special_tokens) ids.insert(ids.end(), suffix_ids_.begin(), suffix_ids_.end());
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  StreamDecoder decoder(*this, skip_special_tokens);
  std::string text;
  for (const int32_t id : ids) text.append(decoder.Push(id));
  return text.append(decoder.Finish());
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && id_to_text_[static_cast<size_t>(id)].special;
}

std::optional<std::string_view> Tokenizer::TokenPiece(int32_t id) const {
  if (id < 0 || id >= vocab_size() || !id_to_text_[static_cast<size_t>(id)].used) return std::nullopt;
  return id_to_text_[static_cast<size_t>(id)].piece;
}

std::optional<int32_t> Tokenizer::PieceToId(std::string_view piece) const {
  const auto it = added_ids_.find(Sv(piece));
  if (it != added_ids_.end()) return it->second;
  return bpe_.Find(piece);
}

std::string Tokenizer::TokenText(int32_t id) const {
  const auto piece = TokenPiece(id);
  if (!piece) return {};
  return is_special(id) ? std::string(*piece) : decoder_.TokenBytes(*piece);
}

}  // namespace tidepool
