#include "server/model/text/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/pretokenizer.h"

namespace tidepool {

using nlohmann::json;

namespace {

constexpr uint32_t kCharacters = 0x10000;
// Up to here looking at every pair in turn beats a heap (measured on words and on Chinese sentences).
constexpr size_t kShortSymbols = 96;
constexpr uint32_t kLowerOneEighth = 0x2581;  // sentencepiece's mark of a space

absl::string_view Sv(std::string_view s) { return {s.data(), s.size()}; }

uint32_t FirstCharacter(std::string_view text) {
  size_t pos = 0;
  return utf8::Next(text, pos);
}

uint32_t LastCharacter(std::string_view text) {
  size_t pos = text.size() - 1;
  while (pos > 0 && (static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80) --pos;
  return utf8::Next(text, pos);
}

}  // namespace

void PairTable::Reserve(size_t n) {
  const size_t size = std::bit_ceil(n * 2 + 2);
  entries_.assign(size, Entry{});
  mask_ = size - 1;
  shift_ = 64 - std::countr_zero(size);
}

void PairTable::Put(uint64_t key, Value value) {
  size_t at = Slot(key);
  while (entries_[at].key != kEmpty && entries_[at].key != key) at = (at + 1) & mask_;
  entries_[at] = {key, value};
}

absl::StatusOr<BpeModel> BpeModel::Parse(const json& node, const std::string& where, bool byte_level) {
  if (const json* dropout = json_reader::Member(node, "dropout");
      dropout != nullptr && !(dropout->is_number() && dropout->get<double>() == 0.0)) {
    return absl::UnimplementedError(absl::StrCat(where, ".dropout: a random encoding is not supported"));
  }

  BpeModel model;
  TP_RETURN_IF_ERROR(model.ParseVocab(node, where));
  TP_ASSIGN_OR_RETURN(model.prefix_, json_reader::GetString(node, "continuing_subword_prefix", where, ""));
  TP_ASSIGN_OR_RETURN(model.suffix_, json_reader::GetString(node, "end_of_word_suffix", where, ""));
  TP_ASSIGN_OR_RETURN(model.fuse_unk_, json_reader::GetBool(node, "fuse_unk", where, false));
  TP_ASSIGN_OR_RETURN(model.ignore_merges_, json_reader::GetBool(node, "ignore_merges", where, false));
  TP_ASSIGN_OR_RETURN(model.unk_, model.ParseToken(node, "unk_token", where));
  TP_ASSIGN_OR_RETURN(const bool byte_fallback, json_reader::GetBool(node, "byte_fallback", where, false));
  if (byte_fallback) {
    for (int b = 0; b < 256; ++b) {
      model.byte_ids_.push_back(model.Find(absl::StrFormat("<0x%02X>", b)).value_or(-1));
    }
  }

  const json* merges = json_reader::Member(node, "merges");
  if (merges == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".merges is missing"));
  TP_RETURN_IF_ERROR(json_reader::RequireArray(*merges, where + ".merges"));
  model.merges_.Reserve(merges->size());
  model.joins_.Reserve(merges->size());
  // Where a character may vanish (no unknown token) or melt into the next one (fused unknown ones), what
  // stands on both sides of it is not apart.
  const bool bytes_whole =
      std::find(model.byte_ids_.begin(), model.byte_ids_.end(), -1) == model.byte_ids_.end();
  model.cut_ = !byte_level && !model.ignore_merges_ && model.prefix_.empty() && model.suffix_.empty() &&
               bytes_whole && (!model.byte_ids_.empty() || (model.unk_ && !model.fuse_unk_));
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
    if (!ok || left.empty() || right.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ".merges[", rank, R"(] must be "left right" or ["left", "right"])"));
    }
    TP_RETURN_IF_ERROR(model.AddMerge(left, right, rank, where));
    ++rank;
  }
  model.BuildSymbols(byte_level);
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
  // Of two equal pairs the later rank counts, as in Hugging Face's map.
  merges_.Put(PairTable::Key(static_cast<uint32_t>(*a), static_cast<uint32_t>(*b)), {rank, *id});
  if (cut_) {
    joins_.Put(PairTable::Key(LastCharacter(left), FirstCharacter(right)), {0, 0});
    // A merge of bytes or of the unknown token joins characters that its spelling does not show.
    const auto hidden = [&](int32_t token) {
      return token == unk_ || std::find(byte_ids_.begin(), byte_ids_.end(), token) != byte_ids_.end();
    };
    if ((left.front() == '<' || right.front() == '<') && (hidden(*a) || hidden(*b))) cut_ = false;
  }
  return absl::OkStatus();
}

void BpeModel::BuildSymbols(bool byte_level) {
  byte_level_ = byte_level;
  character_ids_.assign(kCharacters, -1);
  for (const auto& [token, id] : vocab_) {
    if (token.empty() || token.size() != utf8::SequenceLength(static_cast<unsigned char>(token[0]))) continue;
    if (const uint32_t cp = FirstCharacter(token); cp < kCharacters) character_ids_[cp] = id;
  }
  for (int b = 0; b < 256; ++b) {
    byte_symbols_[static_cast<size_t>(b)] =
        character_ids_[FirstCharacter(byte_alphabet::Char(static_cast<uint8_t>(b)))];
  }
  bytes_known_ = byte_level && prefix_.empty() && suffix_.empty() &&
                 std::find(byte_symbols_.begin(), byte_symbols_.end(), -1) == byte_symbols_.end();
  if (!byte_level || !ignore_merges_) return;
  for (const auto& [token, id] : vocab_) {
    std::string bytes;
    bool mapped = true;
    for (size_t pos = 0; mapped && pos < token.size();) {
      const int byte = byte_alphabet::Byte(utf8::Next(token, pos));
      mapped = byte >= 0;
      bytes.push_back(static_cast<char>(byte));
    }
    if (mapped) byte_vocab_.emplace(std::move(bytes), id);
  }
}

void BpeModel::AppendSymbols(std::string_view piece, Scratch& scratch) const {
  std::vector<int32_t>& symbols = scratch.symbols;
  std::string decorated;
  bool unk_pending = false;
  for (size_t pos = 0; pos < piece.size();) {
    const size_t begin = pos;
    const uint32_t cp = utf8::Next(piece, pos);
    std::string_view symbol = piece.substr(begin, pos - begin);
    const bool front = begin > 0 && !prefix_.empty(), back = pos == piece.size() && !suffix_.empty();
    int32_t id = -1;
    if (front || back) {
      decorated = absl::StrCat(front ? prefix_ : "", Sv(symbol), back ? suffix_ : "");
      symbol = decorated;
      id = Find(symbol).value_or(-1);
    } else {
      id = cp < kCharacters ? character_ids_[cp] : Find(symbol).value_or(-1);
    }
    if (id >= 0 && !(scratch.avoid_special && IsSpecial(id))) {
      if (unk_pending) symbols.push_back(*unk_);
      unk_pending = false;
      symbols.push_back(id);
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

PairTable::Value BpeModel::FindMerge(int32_t left, int32_t right, const Scratch& scratch) const {
  const PairTable::Value found =
      merges_.Get(PairTable::Key(static_cast<uint32_t>(left), static_cast<uint32_t>(right)));
  if (scratch.avoid_special && found.rank != PairTable::kNone && IsSpecial(found.id))
    return {PairTable::kNone, -1};
  return found;
}

void BpeModel::MergeShort(Scratch& scratch) const {
  std::vector<int32_t>& symbols = scratch.symbols;
  std::vector<uint32_t>& ranks = scratch.ranks;  // of the pair that begins at each symbol but the last
  const auto rank = [&](size_t at) { return FindMerge(symbols[at], symbols[at + 1], scratch).rank; };
  size_t n = symbols.size();
  ranks.resize(n);
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = rank(i);
  scratch.steps += n;
  while (n > 1) {
    size_t at = 0;
    for (size_t i = 1; i + 1 < n; ++i) at = ranks[i] < ranks[at] ? i : at;
    scratch.steps += n;
    if (ranks[at] == PairTable::kNone) break;
    symbols[at] = merged_ids_[ranks[at]];
    --n;
    std::copy(symbols.begin() + static_cast<ptrdiff_t>(at) + 2,
              symbols.begin() + static_cast<ptrdiff_t>(n) + 1,
              symbols.begin() + static_cast<ptrdiff_t>(at) + 1);
    std::copy(ranks.begin() + static_cast<ptrdiff_t>(at) + 1, ranks.begin() + static_cast<ptrdiff_t>(n),
              ranks.begin() + static_cast<ptrdiff_t>(at));
    if (at + 1 < n) ranks[at] = rank(at);
    if (at > 0) ranks[at - 1] = rank(at - 1);
  }
  symbols.resize(n);
}

void BpeModel::MergeLong(Scratch& scratch) const {
  // A candidate merge is one number, rank above position: what merges first compares less. The rank names the
  // merge, so nothing else is needed.
  const auto candidate = [](uint32_t rank, int32_t at) {
    return (static_cast<uint64_t>(rank) << 32) | static_cast<uint32_t>(at);
  };
  std::vector<int32_t>& symbols = scratch.symbols;
  std::vector<Scratch::Link>& chain = scratch.chain;
  std::vector<uint64_t>& heap = scratch.heap;
  const auto n = static_cast<int32_t>(symbols.size());
  chain.resize(symbols.size());
  heap.clear();
  const auto find = [&](int32_t left, int32_t right) {
    ++scratch.steps;
    return FindMerge(left, right, scratch);
  };
  for (int32_t i = 0; i < n; ++i) {
    chain[static_cast<size_t>(i)] = {symbols[static_cast<size_t>(i)], i - 1, i + 1 < n ? i + 1 : -1, true};
    if (i + 1 == n) break;
    const uint32_t rank = find(symbols[static_cast<size_t>(i)], symbols[static_cast<size_t>(i) + 1]).rank;
    if (rank != PairTable::kNone) heap.push_back(candidate(rank, i));
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>{});
  const auto consider = [&](int32_t at, int32_t left, int32_t right) {
    const uint32_t rank = find(left, right).rank;
    if (rank == PairTable::kNone) return;
    heap.push_back(candidate(rank, at));
    std::push_heap(heap.begin(), heap.end(), std::greater<>{});
  };
  while (!heap.empty()) {
    const uint64_t top = heap.front();
    std::pop_heap(heap.begin(), heap.end(), std::greater<>{});
    heap.pop_back();
    const auto at = static_cast<int32_t>(top & 0xFFFFFFFF);
    const int32_t merged = merged_ids_[top >> 32];
    Scratch::Link& left = chain[static_cast<size_t>(at)];
    if (!left.alive || left.next < 0) continue;
    Scratch::Link& right = chain[static_cast<size_t>(left.next)];
    // Either side may have been merged since this candidate was queued.
    const PairTable::Value found = find(left.id, right.id);
    if (found.rank == PairTable::kNone || found.id != merged) continue;
    right.alive = false;
    left.id = merged;
    left.next = right.next;
    if (left.next >= 0) chain[static_cast<size_t>(left.next)].previous = at;
    if (left.previous >= 0) consider(left.previous, chain[static_cast<size_t>(left.previous)].id, left.id);
    if (left.next >= 0) consider(at, left.id, chain[static_cast<size_t>(left.next)].id);
  }
  symbols.clear();
  for (int32_t i = 0; i >= 0; i = chain[static_cast<size_t>(i)].next) {
    symbols.push_back(chain[static_cast<size_t>(i)].id);
  }
}

std::optional<int32_t> BpeModel::WholePiece(std::string_view piece) const {
  if (!byte_level_) return Find(piece);
  const auto it = byte_vocab_.find(Sv(piece));
  if (it == byte_vocab_.end()) return std::nullopt;
  return it->second;
}

void BpeModel::EncodePiece(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    if (const auto whole = WholePiece(piece); whole && !(scratch.avoid_special && IsSpecial(*whole))) {
      ids.push_back(*whole);
      return;
    }
  }
  std::vector<int32_t>& symbols = scratch.symbols;
  symbols.clear();
  if (bytes_known_) {
    for (const char c : piece) symbols.push_back(byte_symbols_[static_cast<uint8_t>(c)]);
  } else if (byte_level_) {
    scratch.text.clear();
    for (const char c : piece) scratch.text.append(byte_alphabet::Char(static_cast<uint8_t>(c)));
    AppendSymbols(scratch.text, scratch);
  } else {
    AppendSymbols(piece, scratch);
  }
  if (symbols.empty()) return;
  symbols.size() <= kShortSymbols ? MergeShort(scratch) : MergeLong(scratch);
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

void BpeModel::EncodeCached(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const {
  if (piece.size() > WordCache::kWordBytesMax || scratch.avoid_special)
    return EncodePiece(piece, scratch, ids);
  const uint64_t hash = WordCache::Hash(piece);
  if (const auto known = scratch.cache.Get(piece, hash); !known.empty()) {
    ids.insert(ids.end(), known.begin(), known.end());
    return;
  }
  const size_t before = ids.size();
  EncodePiece(piece, scratch, ids);
  scratch.cache.Put(piece, hash, std::span(ids).subspan(before));
}

// Without a pre-tokenizer a whole document is one piece. It is cut where no merge can reach across: first at
// words, then, if a stretch is still long, at any two characters that no merge joins.
void BpeModel::EncodeApart(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const {
  size_t begin = 0, pos = 0;
  uint32_t before = utf8::Next(piece, pos);
  const auto flush = [&](size_t end) {
    const std::string_view word = piece.substr(begin, end - begin);
    begin = end;
    if (word.size() <= WordCache::kWordBytesMax) return EncodeCached(word, scratch, ids);
    size_t from = 0, at = 0;
    uint32_t last = utf8::Next(word, at);
    while (at < word.size()) {
      const size_t here = at;
      const uint32_t cp = utf8::Next(word, at);
      if (Separate(last, cp)) {
        EncodeCached(word.substr(from, here - from), scratch, ids);
        from = here;
      }
      last = cp;
    }
    EncodeCached(word.substr(from), scratch, ids);
  };
  while (pos < piece.size()) {
    const size_t here = pos;
    const uint32_t cp = utf8::Next(piece, pos);
    if (cp == kLowerOneEighth && before != kLowerOneEighth && Separate(before, cp)) flush(here);
    before = cp;
  }
  flush(piece.size());
}

absl::Status BpeModel::Encode(std::string_view text, std::span<const Regex::Span> pieces, Scratch& scratch,
                              std::vector<int32_t>& ids) const {
  for (const Regex::Span& span : pieces) {
    const std::string_view piece = text.substr(span.begin, span.end - span.begin);
    cut_&& piece.size() > WordCache::kWordBytesMax ? EncodeApart(piece, scratch, ids)
                                                   : EncodeCached(piece, scratch, ids);
  }
  return absl::OkStatus();
}

}  // namespace tidepool
