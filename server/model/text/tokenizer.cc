#include "server/model/text/tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/small_file.h"
#include "base/status.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/detokenizer.h"
#include "server/model/text/json_reader.h"

namespace tidepool {

using nlohmann::json;

namespace {

constexpr size_t kTokenizerBytesMax = size_t{256} << 20;  // the largest known (a 256k vocabulary) has 35 MB
constexpr size_t kAddedTokenBytesMax = 1024;              // the longest known has 60
constexpr size_t kScratchTextBytesMax = size_t{4} << 20;
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
  if (const auto status = tokenizer->ReadTokenizerJson(root); !status.ok()) {
    return Annotate(PrintableStatus(status), name);
  }
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
  TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kTokenizerBytesMax));
  TP_ASSIGN_OR_RETURN(const std::shared_ptr<const Tokenizer> loaded, FromJson(text, {}, path));
  // Not shared with anyone yet.
  auto* tokenizer = const_cast<Tokenizer*>(loaded.get());

  struct File {
    const char* name;
    bool only_missing;
  };
  for (const File& file : {File{"tokenizer_config.json", false}, File{"special_tokens_map.json", true}}) {
    const std::string config_path = absl::StrCat(dir, "/", file.name);
    auto config = ReadSmallFile(config_path, kConfigBytesMax);
    if (absl::IsNotFound(config.status())) continue;
    if (!config.ok()) return config.status();
    TP_RETURN_IF_ERROR(tokenizer->ReadConfig(*config, config_path, file.only_missing));
  }
  auto chat_template = ReadSmallFile(dir + "/chat_template.jinja", kConfigBytesMax);
  if (chat_template.ok()) {
    tokenizer->chat_template_ = *std::move(chat_template);
  } else if (!absl::IsNotFound(chat_template.status())) {
    return chat_template.status();
  }
  return loaded;
}

void Tokenizer::SetPiece(int32_t id, std::string_view piece, bool special) {
  const auto at = static_cast<size_t>(id);
  if (at >= entries_.size()) entries_.resize(at + 1);
  Entry& entry = entries_[at];
  if (!entry.used || std::string_view(pieces_).substr(entry.begin, entry.bytes) != piece) {
    entry.begin = static_cast<uint32_t>(pieces_.size());
    entry.bytes = static_cast<uint32_t>(piece.size());
    pieces_.append(piece);
  }
  entry.used = true;
  entry.special = special;
}

absl::Status Tokenizer::ReadTokenizerJson(const json& root) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(root, "the file"));
  if (const json* node = json_reader::Member(root, "normalizer")) {
    TP_ASSIGN_OR_RETURN(normalizer_, Normalizer::Parse(*node, "normalizer"));
  }
  if (const json* node = json_reader::Member(root, "pre_tokenizer")) {
    TP_ASSIGN_OR_RETURN(pretokenizer_, PreTokenizer::Parse(*node, "pre_tokenizer"));
  }
  if (const json* node = json_reader::Member(root, "decoder")) {
    TP_ASSIGN_OR_RETURN(decoder_, TokenDecoderSpec::Parse(*node, "decoder"));
  }
  const json* model = json_reader::Member(root, "model");
  if (model == nullptr) return absl::InvalidArgumentError("model is missing");
  TP_ASSIGN_OR_RETURN(model_, TokenModel::Parse(*model, "model", pretokenizer_.byte_level()));
  for (const auto& [piece, id] : model_->vocab()) SetPiece(id, piece, false);
  if (const json* list = json_reader::Member(root, "added_tokens")) {
    TP_RETURN_IF_ERROR(json_reader::RequireArray(*list, "added_tokens"));
    for (size_t i = 0; i < list->size(); ++i) {
      TP_RETURN_IF_ERROR(ReadAddedToken((*list)[i], absl::StrCat("added_tokens[", i, "]")));
    }
  }
  added_.Build();
  std::vector<bool> special(entries_.size());
  for (size_t id = 0; id < entries_.size(); ++id) special[id] = entries_[id].special;
  model_->SetSpecial(std::move(special));
  if (const json* node = json_reader::Member(root, "post_processor")) {
    TP_RETURN_IF_ERROR(ReadPostProcessor(*node, "post_processor"));
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::ReadAddedToken(const json& node, const std::string& where) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(node, where));
  AddedToken token;
  TP_ASSIGN_OR_RETURN(const int64_t id, json_reader::GetInt(node, "id", where, 0, TokenModel::kVocabMax - 1));
  token.id = static_cast<int32_t>(id);
  TP_ASSIGN_OR_RETURN(token.content, json_reader::GetString(node, "content", where));
  if (token.content.size() > kAddedTokenBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat(where, ".content has ", token.content.size(),
                                                   " bytes; at most ", kAddedTokenBytesMax, " are allowed"));
  }
  TP_ASSIGN_OR_RETURN(token.special, json_reader::GetBool(node, "special", where, false));
  TP_ASSIGN_OR_RETURN(token.lstrip, json_reader::GetBool(node, "lstrip", where, false));
  TP_ASSIGN_OR_RETURN(token.rstrip, json_reader::GetBool(node, "rstrip", where, false));
  TP_ASSIGN_OR_RETURN(token.single_word, json_reader::GetBool(node, "single_word", where, false));
  TP_ASSIGN_OR_RETURN(token.normalized, json_reader::GetBool(node, "normalized", where, !token.special));
  // The library passes over a token without a spelling.
  if (token.content.empty()) return absl::OkStatus();
  const auto known = PieceToId(token.content);
  if (known && *known != token.id) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": '", token.content, "' has id ", token.id, " here but ", *known, " before"));
  }
  if (const auto other = TokenPiece(token.id); other && *other != token.content) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": '", token.content, "' has id ", token.id,
                                                   ", which is the id of '", Sv(*other), "'"));
  }
  SetPiece(token.id, token.content, token.special);
  std::string pattern = token.content;
  if (token.normalized) {
    if (const auto status = normalizer_.Apply(pattern); !status.ok()) return Annotate(status, where);
  }
  added_ids_.emplace(token.content, token.id);
  added_.Add(token, std::move(pattern));
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
  if (type == "TemplateProcessing") return ReadTemplateProcessing(node, where);
  if (type == "BertProcessing" || type == "RobertaProcessing") {
    // Both put `cls` in front and `sep` behind, each ["<spelling>", id].
    for (const char* key : {"cls", "sep"}) {
      const json* pair = json_reader::Member(node, key);
      const std::string at = absl::StrCat(where, ".", key);
      if (pair == nullptr || !pair->is_array() || pair->size() != 2 || !(*pair)[0].is_string()) {
        return absl::InvalidArgumentError(absl::StrCat(at, " must be [token, id]"));
      }
      TP_ASSIGN_OR_RETURN(const int64_t id, json_reader::AsInt((*pair)[1], at + "[1]", 0, vocab_size() - 1));
      if (key[0] == 'c') {
        prefix_ids_.insert(prefix_ids_.begin(), static_cast<int32_t>(id));
      } else {
        suffix_ids_.push_back(static_cast<int32_t>(id));
      }
    }
    return absl::OkStatus();
  }
  return absl::UnimplementedError(absl::StrCat(where, ": post-processor ", type, " is not supported"));
}

absl::Status Tokenizer::ReadTemplateProcessing(const json& node, const std::string& where) {
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
      return absl::InvalidArgumentError(absl::StrCat(Sv(file), ": ", Sv(key), " '", Printable(spelled),
                                                     "' is not a token of tokenizer.json"));
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

std::unique_ptr<Tokenizer::Scratch> Tokenizer::ScratchPool::Take() {
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      auto scratch = std::move(free_.back());
      free_.pop_back();
      return scratch;
    }
  }
  return std::make_unique<Scratch>();
}

void Tokenizer::ScratchPool::Give(std::unique_ptr<Scratch> scratch) {
  const std::lock_guard lock(mutex_);
  if (free_.size() < kScratchesMax) free_.push_back(std::move(scratch));
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, EncodeOptions options) const {
  if (text.size() > kTextBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("text has ", text.size(), " bytes; at most ", kTextBytesMax, " are tokenised"));
  }
  std::unique_ptr<Scratch> scratch = scratches_.Take();
  scratch->model.steps = 0;
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3 + 8);
  absl::Status status = Encode(text, options, *scratch, ids);
  if (options.steps != nullptr) *options.steps += scratch->model.steps;
  // A giant text's buffers are not kept for the next one.
  if (text.size() <= kScratchTextBytesMax) scratches_.Give(std::move(scratch));
  if (!status.ok()) return status;
  return ids;
}

absl::Status Tokenizer::Encode(std::string_view text, const EncodeOptions& options, Scratch& scratch,
                               std::vector<int32_t>& ids) const {
  std::span<const ByteRange> data = options.data;
  if (!utf8::IsValid(text)) {
    if (data.empty()) {
      scratch.sanitized = utf8::Sanitize(text);
    } else {
      // U+FFFD is longer than what it stands for: the ranges move along.
      scratch.raw_data.clear();
      scratch.sanitized.clear();
      size_t done = 0;
      const auto copy = [&](size_t end) {
        scratch.sanitized.append(utf8::Sanitize(text.substr(done, end - done)));
        done = end;
      };
      for (const ByteRange& range : data) {
        copy(std::min(range.begin, text.size()));
        const size_t begin = scratch.sanitized.size();
        copy(std::min(range.end, text.size()));
        scratch.raw_data.push_back({begin, scratch.sanitized.size()});
      }
      copy(text.size());
      data = scratch.raw_data;
    }
    text = scratch.sanitized;
  }
  if (options.add_special_tokens) ids.insert(ids.end(), prefix_ids_.begin(), prefix_ids_.end());
  added_.Split(text, false, options.parse_special, data, scratch.raw_parts);
  for (const AddedTokens::Part& part : scratch.raw_parts) {
    if (part.id >= 0) {
      ids.push_back(part.id);
    } else {
      TP_RETURN_IF_ERROR(EncodeStretch(text, part.begin, part.end, options, data, scratch, ids));
    }
  }
  if (options.add_special_tokens) ids.insert(ids.end(), suffix_ids_.begin(), suffix_ids_.end());
  return absl::OkStatus();
}

absl::Status Tokenizer::EncodeStretch(std::string_view raw, size_t begin, size_t end,
                                      const EncodeOptions& options, std::span<const ByteRange> data,
                                      Scratch& scratch, std::vector<int32_t>& ids) const {
  std::string_view text = raw.substr(begin, end - begin);
  const auto first = std::upper_bound(data.begin(), data.end(), begin,
                                      [](size_t at, const ByteRange& r) { return at < r.end; });
  const bool holds_data = first != data.end() && first->begin < end;
  const bool guarded = holds_data || !options.parse_special;
  // Which bytes are data matters only where special tokens are looked for in the normalised text.
  scratch.data.clear();
  if (holds_data && added_.special_in_normalized()) {
    for (auto range = first; range != data.end() && range->begin < end; ++range) {
      scratch.data.push_back({std::max(range->begin, begin) - begin, std::min(range->end, end) - begin});
    }
  }
  Normalizer::Trace trace;
  bool front_kept = true;
  if (!normalizer_.empty()) {
    scratch.normalized.assign(text);
    if (scratch.data.empty()) {
      TP_RETURN_IF_ERROR(normalizer_.Apply(scratch.normalized, trace));
    } else {
      scratch.marks.assign(text.size(), 0);
      for (const ByteRange& r : scratch.data) {
        std::fill(scratch.marks.begin() + static_cast<ptrdiff_t>(r.begin),
                  scratch.marks.begin() + static_cast<ptrdiff_t>(r.end), uint8_t{1});
      }
      trace.marks = &scratch.marks;
      TP_RETURN_IF_ERROR(normalizer_.Apply(scratch.normalized, trace));
      scratch.data.clear();
      for (size_t i = 0; i < scratch.marks.size(); ++i) {
        if (scratch.marks[i] == 0) continue;
        if (!scratch.data.empty() && scratch.data.back().end == i) {
          ++scratch.data.back().end;
        } else {
          scratch.data.push_back({i, i + 1});
        }
      }
    }
    text = scratch.normalized;
    front_kept = trace.front_bytes > 0;
  }
  const auto encode_words = [&](std::string_view words, bool first_words) -> absl::Status {
    TP_ASSIGN_OR_RETURN(const std::string_view cut, pretokenizer_.Apply(words, first_words, scratch.pieces));
    const size_t before = ids.size();
    TP_RETURN_IF_ERROR(model_->Encode(cut, scratch.pieces.spans, scratch.model, ids));
    if (!guarded || !model_->HasSpecial(std::span(ids).subspan(before))) return absl::OkStatus();
    // The vocabulary itself spells special tokens, and the text (normalised, or cut just so) spelled one.
    ids.resize(before);
    scratch.model.avoid_special = true;
    const absl::Status status = model_->Encode(cut, scratch.pieces.spans, scratch.model, ids);
    scratch.model.avoid_special = false;
    return status;
  };
  const bool at_start = begin == 0 && front_kept;
  if (added_.empty(true)) return encode_words(text, at_start);
  added_.Split(text, true, options.parse_special, scratch.data, scratch.parts);
  for (const AddedTokens::Part& part : scratch.parts) {
    if (part.id >= 0) {
      ids.push_back(part.id);
    } else {
      TP_RETURN_IF_ERROR(
          encode_words(text.substr(part.begin, part.end - part.begin), at_start && part.begin == 0));
    }
  }
  return absl::OkStatus();
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  StreamDecoder decoder(*this, skip_special_tokens);
  std::string text;
  for (const int32_t id : ids) text.append(decoder.Push(id));
  return text.append(decoder.Finish());
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && entries_[static_cast<size_t>(id)].special;
}

std::optional<std::string_view> Tokenizer::TokenPiece(int32_t id) const {
  if (id < 0 || id >= vocab_size() || !entries_[static_cast<size_t>(id)].used) return std::nullopt;
  const Entry& entry = entries_[static_cast<size_t>(id)];
  return std::string_view(pieces_).substr(entry.begin, entry.bytes);
}

std::optional<int32_t> Tokenizer::PieceToId(std::string_view piece) const {
  const auto it = added_ids_.find(Sv(piece));
  if (it != added_ids_.end()) return it->second;
  return model_->Find(piece);
}

std::string Tokenizer::TokenText(int32_t id) const {
  const auto piece = TokenPiece(id);
  if (!piece) return {};
  return is_special(id) ? std::string(*piece) : decoder_.TokenBytes(*piece);
}

}  // namespace tidepool
