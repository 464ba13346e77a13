#include "server/model/text/unigram.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/json_reader.h"

namespace tidepool {

using nlohmann::json;

namespace {

constexpr double kUnkPenalty = 10.0;
constexpr uint32_t kUnreached = std::numeric_limits<uint32_t>::max();

}  // namespace

absl::StatusOr<UnigramModel> UnigramModel::Parse(const json& node, const std::string& where) {
  UnigramModel model;
  const json* vocab = json_reader::Member(node, "vocab");
  if (vocab == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".vocab is missing"));
  TP_RETURN_IF_ERROR(json_reader::RequireArray(*vocab, where + ".vocab"));
  if (vocab->size() > static_cast<size_t>(kVocabMax)) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ".vocab has ", vocab->size(), " tokens; at most ", kVocabMax, " are supported"));
  }
  std::vector<std::pair<std::string, int32_t>> entries;
  entries.reserve(vocab->size());
  double lowest = std::numeric_limits<double>::infinity();
  for (const json& entry : *vocab) {
    const auto id = static_cast<int32_t>(entries.size());
    if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_number() ||
        !std::isfinite(entry[1].get<double>())) {
      return absl::InvalidArgumentError(absl::StrCat(where, ".vocab[", id, "] must be [token, score]"));
    }
    const auto& token = entry[0].get_ref<const std::string&>();
    model.scores_.push_back(entry[1].get<double>());
    lowest = std::min(lowest, model.scores_.back());
    // Of two equal tokens the later one counts, as in the library's map.
    model.vocab_[token] = id;
    entries.emplace_back(token, id);
  }
  model.trie_ = ByteTrie(std::move(entries));
  model.unk_score_ = lowest - kUnkPenalty;
  if (json_reader::Member(node, "unk_id") != nullptr) {
    TP_ASSIGN_OR_RETURN(const int64_t unk, json_reader::GetInt(node, "unk_id", where, 0,
                                                               static_cast<int64_t>(vocab->size()) - 1));
    model.unk_ = static_cast<int32_t>(unk);
  }
  TP_ASSIGN_OR_RETURN(const bool byte_fallback, json_reader::GetBool(node, "byte_fallback", where, false));
  if (byte_fallback) {
    for (int b = 0; b < 256; ++b) {
      model.byte_ids_.push_back(model.Find(absl::StrFormat("<0x%02X>", b)).value_or(-1));
    }
  }
  return model;
}

absl::Status UnigramModel::Encode(std::string_view text, std::span<const Regex::Span> pieces,
                                  Scratch& scratch, std::vector<int32_t>& ids) const {
  for (const Regex::Span& span : pieces) {
    const std::string_view piece = text.substr(span.begin, span.end - span.begin);
    if (piece.size() > WordCache::kWordBytesMax || scratch.avoid_special) {
      TP_RETURN_IF_ERROR(EncodePiece(piece, scratch, ids));
      continue;
    }
    const uint64_t hash = WordCache::Hash(piece);
    if (const auto known = scratch.cache.Get(piece, hash); !known.empty()) {
      ids.insert(ids.end(), known.begin(), known.end());
      continue;
    }
    const size_t before = ids.size();
    TP_RETURN_IF_ERROR(EncodePiece(piece, scratch, ids));
    scratch.cache.Put(piece, hash, std::span(ids).subspan(before));
  }
  return absl::OkStatus();
}

absl::Status UnigramModel::EncodePiece(std::string_view piece, Scratch& scratch,
                                       std::vector<int32_t>& ids) const {
  std::vector<Scratch::Best>& best = scratch.best;  // by end: the best path to there, and its last token
  best.assign(piece.size() + 1, {0.0, kUnreached, 0});
  const auto offer = [&](size_t begin, size_t end, int32_t id, double score) {
    Scratch::Best& b = best[end];
    if (b.begin == kUnreached || score > b.score) b = {score, static_cast<uint32_t>(begin), id};
  };
  for (size_t pos = 0; pos < piece.size();) {
    const double here = best[pos].score;
    const size_t character = utf8::SequenceLength(static_cast<unsigned char>(piece[pos]));
    bool covered = false;
    trie_.Prefixes(piece.substr(pos), [&](size_t length, int32_t id) {
      ++scratch.steps;
      if (scratch.avoid_special && IsSpecial(id)) return;
      offer(pos, pos + length, id, scores_[static_cast<size_t>(id)] + here);
      covered = covered || length == character;
    });
    if (!covered) {
      if (!unk_) {
        return absl::InvalidArgumentError(
            "the vocabulary lacks a character of the text and the tokenizer's model has no unk_id");
      }
      offer(pos, pos + character, *unk_, unk_score_ + here);
    }
    pos += character;
  }
  // Backwards along the best path; unknown characters in a row are one.
  scratch.chain.clear();  // as (begin, end) of the tokens, last first
  for (size_t end = piece.size(); end > 0; end = best[end].begin) {
    const bool unknown = unk_ && best[end].id == *unk_;
    const auto begin = static_cast<int32_t>(best[end].begin);
    if (unknown && !scratch.chain.empty() && scratch.chain.back().alive) {
      scratch.chain.back().previous = begin;
    } else {
      scratch.chain.push_back({best[end].id, begin, static_cast<int32_t>(end), unknown});
    }
  }
  for (auto token = scratch.chain.rbegin(); token != scratch.chain.rend(); ++token) {
    if (!token->alive) {
      ids.push_back(token->id);
      continue;
    }
    TP_RETURN_IF_ERROR(AppendToken(piece.substr(static_cast<size_t>(token->previous),
                                                static_cast<size_t>(token->next - token->previous)),
                                   ids));
  }
  return absl::OkStatus();
}

// Unknown characters, taken together: a token if they happen to spell one, else bytes, else the unknown
// token.
absl::Status UnigramModel::AppendToken(std::string_view token, std::vector<int32_t>& ids) const {
  if (const auto id = Find(token); id && !IsSpecial(*id)) {
    ids.push_back(*id);
    return absl::OkStatus();
  }
  if (!byte_ids_.empty() && std::all_of(token.begin(), token.end(),
                                        [&](char c) { return byte_ids_[static_cast<uint8_t>(c)] >= 0; })) {
    for (const char c : token) ids.push_back(byte_ids_[static_cast<uint8_t>(c)]);
    return absl::OkStatus();
  }
  ids.push_back(*unk_);
  return absl::OkStatus();
}

}  // namespace tidepool
