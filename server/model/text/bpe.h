#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/model/text/token_model.h"

namespace tidepool {

// PairTable: two 32-bit numbers to two others, open addressing, built once.
class PairTable {
 public:
  struct Value {
    uint32_t rank;
    int32_t id;
  };
  static constexpr uint32_t kNone = 0xFFFFFFFF;

  static uint64_t Key(uint32_t a, uint32_t b) { return (uint64_t{a} << 32) | b; }
  // Room for `n` keys.
  void Reserve(size_t n);
  // The last value of a key counts.
  void Put(uint64_t key, Value value);
  // rank == kNone where there is none.
  Value Get(uint64_t key) const {
    for (size_t at = Slot(key);; at = (at + 1) & mask_) {
      if (entries_[at].key == key) return entries_[at].value;
      if (entries_[at].key == kEmpty) return {kNone, -1};
    }
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Entry {
    uint64_t key = kEmpty;
    Value value{kNone, -1};
  };
  size_t Slot(uint64_t key) const { return (key * 0x9E3779B97F4A7C15) >> shift_; }
  std::vector<Entry> entries_{2};
  size_t mask_ = 1;
  int shift_ = 63;
};

// BpeModel: byte-pair encoding, byte-level or sentencepiece-style. Immutable after Parse, thread-safe.
class BpeModel : public TokenModel {
 public:
  // Errors: InvalidArgument (a merge of tokens that the vocabulary lacks, two tokens with one id, ...),
  // Unimplemented (dropout).
  static absl::StatusOr<BpeModel> Parse(const nlohmann::json& node, const std::string& where,
                                        bool byte_level);

  // O(n log n) in the bytes of a piece: neighbouring pairs wait in a heap by (rank, position); short pieces
  // are scanned instead. Characters that the vocabulary lacks fall back to bytes, then to unk_token, else
  // they are dropped. Source: huggingface/tokenizers, models/bpe/{model,word}.rs.
  absl::Status Encode(std::string_view text, std::span<const Regex::Span> pieces, Scratch& scratch,
                      std::vector<int32_t>& ids) const override;

 private:
  absl::Status AddMerge(std::string_view left, std::string_view right, uint32_t rank,
                        const std::string& where);
  void BuildSymbols(bool byte_level);
  // Whether no merge ever joins two symbols of which the left ends in character `a` and the right begins with
  // `b`: then what stands before and behind can be encoded apart.
  bool Separate(uint32_t a, uint32_t b) const {
    return joins_.Get(PairTable::Key(a, b)).rank == PairTable::kNone;
  }
  std::optional<int32_t> WholePiece(std::string_view piece) const;
  void EncodeApart(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;
  void EncodeCached(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;
  void EncodePiece(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;
  void AppendSymbols(std::string_view piece, Scratch& scratch) const;
  PairTable::Value FindMerge(int32_t left, int32_t right, const Scratch& scratch) const;
  void MergeShort(Scratch& scratch) const;
  void MergeLong(Scratch& scratch) const;

  PairTable merges_;
  std::vector<int32_t> merged_ids_;  // by rank: the token that the merge makes
  PairTable joins_;                  // pairs of characters that some merge joins
  std::array<int32_t, 256> byte_symbols_;
  bool byte_level_ = false;             // pieces are bytes, to be read through the byte alphabet
  bool bytes_known_ = false;            // byte_level_, and every byte is a token
  bool cut_ = false;                    // pieces may be cut where characters are Separate
  std::vector<int32_t> character_ids_;  // by code point below kCharacters: its token, -1 if none
  absl::flat_hash_map<std::string, int32_t> byte_vocab_;  // byte_level_ and ignore_merges_: tokens as bytes
  std::vector<int32_t> byte_ids_;  // byte_fallback: id of <0x00>..<0xFF>, -1 where absent; empty if off
  std::string prefix_, suffix_;    // continuing_subword_prefix, end_of_word_suffix
  bool fuse_unk_ = false;
  bool ignore_merges_ = false;
};

}  // namespace tidepool
