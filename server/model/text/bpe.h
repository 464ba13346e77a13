#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tidepool {

// BpeModel: the `model` part of tokenizer.json where its type is BPE. Immutable after Parse, thread-safe.
class BpeModel {
 public:
  static constexpr int64_t kVocabMax = 4'000'000;

  // Errors: InvalidArgument (a merge of tokens that the vocabulary lacks, two tokens with one id, ...),
  // Unimplemented (another model type, by name; dropout).
  static absl::StatusOr<BpeModel> Parse(const nlohmann::json& node, const std::string& where);

  // Appends the ids of one pre-token. O(n log n): neighbouring pairs wait in a heap by (rank, position).
  // Characters that the vocabulary lacks fall back to bytes, then to unk_token, else they are dropped.
  // Source: huggingface/tokenizers, models/bpe/{model,word}.rs.
  void Encode(std::string_view piece, std::vector<int32_t>& ids) const;

  const absl::flat_hash_map<std::string, int32_t>& vocab() const { return vocab_; }
  std::optional<int32_t> Find(std::string_view piece) const;

 private:
  struct Merge {
    uint32_t rank;
    int32_t id;
  };
  static uint64_t Pair(int32_t a, int32_t b) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(a)) << 32) | static_cast<uint32_t>(b);
  }
  absl::Status AddMerge(std::string_view left, std::string_view right, uint32_t rank,
                        const std::string& where);
  void AppendSymbols(std::string_view piece, std::vector<int32_t>& symbols) const;
  void MergeAll(const std::vector<int32_t>& symbols, std::vector<int32_t>& ids) const;

  absl::flat_hash_map<std::string, int32_t> vocab_;
  absl::flat_hash_map<uint64_t, Merge> merges_;
  std::vector<int32_t> merged_ids_;  // by rank: the token that the merge makes
  std::vector<int32_t> byte_ids_;    // byte_fallback: id of <0x00>..<0xFF>, -1 where absent; empty if off
  std::optional<int32_t> unk_;
  std::string prefix_, suffix_;  // continuing_subword_prefix, end_of_word_suffix
  bool fuse_unk_ = false;
  bool ignore_merges_ = false;
};

}  // namespace tidepool
