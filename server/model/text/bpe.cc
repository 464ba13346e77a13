#include "server/model/text/bpe.h"

#include <algorithm>
#include <queue>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/utf8.h"

namespace tidepool {

using nlohmann::json;

namespace {

absl::string_view Sv(std::string_view s) { return {s.data(), s.size()}; }

}  // namespace

std::optional<int32_t> BpeModel::Find(std::string_view piece) const {
  const auto it = vocab_.find(Sv(piece));
  if (it == vocab_.end()) return std::nullopt;
  return it->second;
}

absl::StatusOr<BpeModel> BpeModel::Parse(const json& node, const std::string& where) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(node, where));
  // Files from before 2020 (GPT-2's) have no type; a BPE is then known by its merges.
  const bool has_merges = json_reader::Member(node, "merges") != nullptr;
  TP_ASSIGN_OR_RETURN(const std::string type,
                      json_reader::GetString(node, "type", where, has_merges ? "BPE" : "WordPiece"));
  if (type != "BPE") {
    return absl::UnimplementedError(
        absl::StrCat(where, ": model type ", type, " is not supported; only BPE is"));
  }
  if (const json* dropout = json_reader::Member(node, "dropout");
      dropout != nullptr && !(dropout->is_number() && dropout->get<double>() == 0.0)) {
    return absl::UnimplementedError(absl::StrCat(where, ".dropout: a random encoding is not supported"));
  }

  BpeModel model;
  const json* vocab = json_reader::Member(node, "vocab");
  if (vocab == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".vocab is missing"));
  TP_RETURN_IF_ERROR(json_reader::RequireObject(*vocab, where + ".vocab"));
  model.vocab_.reserve(vocab->size());
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
    model.vocab_.emplace(piece, static_cast<int32_t>(id));
  }

  TP_ASSIGN_OR_RETURN(model.prefix_, json_reader::GetString(node, "continuing_subword_prefix", where, ""));
  TP_ASSIGN_OR_RETURN(model.suffix_, json_reader::GetString(node, "end_of_word_suffix", where, ""));
  TP_ASSIGN_OR_RETURN(model.fuse_unk_, json_reader::GetBool(node, "fuse_unk", where, false));
  TP_ASSIGN_OR_RETURN(model.ignore_merges_, json_reader::GetBool(node, "ignore_merges", where, false));
  TP_ASSIGN_OR_RETURN(const std::string unk, json_reader::GetString(node, "unk_token", where, ""));
  if (!unk.empty()) {
    model.unk_ = model.Find(unk);
    if (!model.unk_) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ".unk_token '", unk, "' is not in the vocabulary"));
    }
  }
  TP_ASSIGN_OR_RETURN(const bool byte_fallback, json_reader::GetBool(node, "byte_fallback", where, false));
  if (byte_fallback) {
    for (int b = 0; b < 256; ++b) {
      model.byte_ids_.push_back(model.Find(absl::StrFormat("<0x%02X>", b)).value_or(-1));
    }
  }

  const json* merges = json_reader::Member(node, "merges");
  if (merges == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".merges is missing"));
  TP_RETURN_IF_ERROR(json_reader::RequireArray(*merges, where + ".merges"));
  model.merges_.reserve(merges->size());
  uint32_t rank = 0;
  for (const json& merge : *merges) {
    // "a b", or since 2024 ["a", "b"], which allows for spaces inside tokens.
    std::string_view left, right;
    bool ok = false;
    if (merge.is_string()) {
      const std::string& text = merge.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      ok = space != text.npos && text.find(' ', space + 1) == text.npos;
      if (ok)
        left = std::string_view(text).substr(0, space), right = std::string_view(text).substr(space + 1);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get_ref<const std::string&>();
      right = merge[1].get_ref<const std::string&>();
      ok = true;
    }
    if (!ok) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ".merges[", rank, R"(] must be "left right" or ["left", "right"])"));
    }
    TP_RETURN_IF_ERROR(model.AddMerge(left, right, rank, where));
    ++rank;
  }
  return model;
}

absl::Status BpeModel::AddMerge(std::string_view left, std::string_view right, uint32_t rank,
                                const std::string& where) {
  const auto missing = [&](std::string_view token) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ".merges[", rank, "]: token '", Sv(token), "' is not in the vocabulary"));
  };
  const auto a = Find(left);
  if (!a) return missing(left);
  const auto b = Find(right);
  if (!b) return missing(right);
  if (right.size() < prefix_.size()) return missing(right);
  const std::string merged = absl::StrCat(Sv(left), Sv(right.substr(prefix_.size())));
  const auto id = Find(merged);
  if (!id) return missing(merged);
  merged_ids_.push_back(*id);
  merges_[Pair(*a, *b)] =
      Merge{rank, *id};  // of two equal pairs the later rank counts, as in Hugging Face's map
  return absl::OkStatus();
}

void BpeModel::AppendSymbols(std::string_view piece, std::vector<int32_t>& symbols) const {
  std::string decorated;
  bool unk_pending = false;
  for (size_t pos = 0; pos < piece.size();) {
    const size_t begin = pos;
    pos = std::min(piece.size(), pos + utf8::SequenceLength(static_cast<unsigned char>(piece[pos])));
    std::string_view symbol = piece.substr(begin, pos - begin);
    const bool front = begin > 0 && !prefix_.empty(), back = pos == piece.size() && !suffix_.empty();
    if (front || back) {
      decorated = absl::StrCat(front ? prefix_ : "", Sv(symbol), back ? suffix_ : "");
      symbol = decorated;
    }
    const auto it = vocab_.find(Sv(symbol));
    if (it != vocab_.end()) {
      if (unk_pending) symbols.push_back(*unk_);
      unk_pending = false;
      symbols.push_back(it->second);
      continue;
    }
    if (!byte_ids_.empty() && std::all_of(symbol.begin(), symbol.end(),
                                          [&](char c) { return byte_ids_[static_cast<uint8_t>(c)] >= 0; })) {
      for (const char c : symbol) symbols.push_back(byte_ids_[static_cast<uint8_t>(c)]);
      continue;
    }
    if (unk_) {
      if (unk_pending && !fuse_unk_) symbols.push_back(*unk_);
      unk_pending = true;
    }
  }
  if (unk_pending) symbols.push_back(*unk_);
}

void BpeModel::MergeAll(const std::vector<int32_t>& symbols, std::vector<int32_t>& ids) const {
  struct Symbol {
    int32_t id;
    int32_t previous, next;  // -1: none
    bool alive;
  };
  // A candidate merge is one number, rank above position: what merges first compares less. The rank names the
  // merge, so nothing else is needed.
  const auto candidate = [](uint32_t rank, int32_t at) {
    return (static_cast<uint64_t>(rank) << 32) | static_cast<uint32_t>(at);
  };
  const auto n = static_cast<int32_t>(symbols.size());
  std::vector<Symbol> chain(symbols.size());
  std::vector<uint64_t> first;
  const auto consider = [&](int32_t at, int32_t left, int32_t right, auto&& push) {
    const auto it = merges_.find(Pair(left, right));
    if (it != merges_.end()) push(candidate(it->second.rank, at));
  };
  for (int32_t i = 0; i < n; ++i) {
    chain[static_cast<size_t>(i)] = {symbols[static_cast<size_t>(i)], i - 1, i + 1 < n ? i + 1 : -1, true};
    if (i + 1 < n) {
      consider(i, symbols[static_cast<size_t>(i)], symbols[static_cast<size_t>(i) + 1],
               [&](uint64_t c) { first.push_back(c); });
    }
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue(std::greater<>{},
                                                                             std::move(first));
  while (!queue.empty()) {
    const uint64_t top = queue.top();
    queue.pop();
    const auto at = static_cast<int32_t>(top & 0xFFFFFFFF);
    const int32_t merged = merged_ids_[top >> 32];
    Symbol& left = chain[static_cast<size_t>(at)];
    if (!left.alive || left.next < 0) continue;
    Symbol& right = chain[static_cast<size_t>(left.next)];
    // Either side may have been merged since this candidate was queued.
    const auto it = merges_.find(Pair(left.id, right.id));
    if (it == merges_.end() || it->second.id != merged) continue;
    right.alive = false;
    left.id = merged;
    left.next = right.next;
    if (left.next >= 0) chain[static_cast<size_t>(left.next)].previous = at;
    const auto push = [&](uint64_t c) { queue.push(c); };
    if (left.previous >= 0) {
      consider(left.previous, chain[static_cast<size_t>(left.previous)].id, left.id, push);
    }
    if (left.next >= 0) consider(at, left.id, chain[static_cast<size_t>(left.next)].id, push);
  }
  for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = chain[static_cast<size_t>(i)].next) {
    ids.push_back(chain[static_cast<size_t>(i)].id);
  }
}

void BpeModel::Encode(std::string_view piece, std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    if (const auto whole = Find(piece)) {
      ids.push_back(*whole);
      return;
    }
  }
  std::vector<int32_t> symbols;
  symbols.reserve(piece.size());
  AppendSymbols(piece, symbols);
  MergeAll(symbols, ids);
}

}  // namespace tidepool
