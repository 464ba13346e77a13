#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/model/text/regex.h"
#include "server/model/text/word_cache.h"

namespace tidepool {

// TokenModel: the `model` part of tokenizer.json, which turns the pieces of a text into ids. Implementations:
// BpeModel, UnigramModel, WordPieceModel, WordLevelModel. Immutable after Parse, thread-safe.
class TokenModel {
 public:
  // Largest id + 1. The largest known vocabulary has 262,144 tokens.
  static constexpr int64_t kVocabMax = int64_t{1} << 21;

  // Working memory of a call, kept by the caller so that its buffers and the cache are used again. One
  // thread's, and one model's.
  struct Scratch {
    WordCache cache;
    std::vector<int32_t> symbols;
    std::vector<uint32_t> ranks;
    std::vector<uint64_t> heap;
    struct Link {
      int32_t id, previous, next;  // -1: none
      bool alive;
    };
    std::vector<Link> chain;
    struct Best {
      double score;
      uint32_t begin;
      int32_t id;
    };
    std::vector<Best> best;
    std::string text;
    // Encode gives no special token but the unknown one, whatever the vocabulary spells; without the cache.
    bool avoid_special = false;
    // Elementary steps done so far (merges looked up, candidates weighed): what "linear" is measured by.
    uint64_t steps = 0;
  };

  // Errors: InvalidArgument, Unimplemented (another type, by name), each with the field's path. `byte_level`:
  // the pieces will be bytes to be read through the byte alphabet (PreTokenizer::byte_level).
  static absl::StatusOr<std::unique_ptr<TokenModel>> Parse(const nlohmann::json& node,
                                                           const std::string& where, bool byte_level);
  virtual ~TokenModel() = default;

  // Appends the ids of the pieces text[span) to `ids`. Errors: InvalidArgument (a character that the
  // vocabulary lacks where there is no unknown token).
  virtual absl::Status Encode(std::string_view text, std::span<const Regex::Span> pieces, Scratch& scratch,
                              std::vector<int32_t>& ids) const = 0;

  // Tells which ids are special tokens. Before the first Encode.
  void SetSpecial(std::vector<bool> special) { special_ = std::move(special); }
  // Whether one of `ids` is a special token other than the unknown one.
  bool HasSpecial(std::span<const int32_t> ids) const;

  const absl::flat_hash_map<std::string, int32_t>& vocab() const { return vocab_; }
  std::optional<int32_t> Find(std::string_view piece) const;

 protected:
  bool IsSpecial(int32_t id) const {
    return static_cast<size_t>(id) < special_.size() && special_[static_cast<size_t>(id)] && unk_ != id;
  }
  // Reads an object {token: id} into vocab_. Errors: InvalidArgument (ids out of range or used twice).
  absl::Status ParseVocab(const nlohmann::json& node, const std::string& where);
  // The id of the token that the member `key` spells; nullopt where it is absent.
  absl::StatusOr<std::optional<int32_t>> ParseToken(const nlohmann::json& node, std::string_view key,
                                                    const std::string& where) const;

  absl::flat_hash_map<std::string, int32_t> vocab_;
  std::optional<int32_t> unk_;  // the unknown token

 private:
  std::vector<bool> special_;
};

}  // namespace tidepool
