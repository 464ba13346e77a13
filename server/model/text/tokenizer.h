#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "server/model/strings/marked_text.h"
#include "server/model/text/added_tokens.h"
#include "server/model/text/normalizer.h"
#include "server/model/text/pretokenizer.h"
#include "server/model/text/token_decoder.h"
#include "server/model/text/token_model.h"

namespace tidepool {

// Tokenizer: a Codec between text and token ids, read from a Hugging Face tokenizer.json whose model is BPE
// (byte-level, or sentencepiece-style with byte fallback), Unigram, WordPiece or WordLevel. Thread-safe: all
// but a pool of working memory is immutable after Load. Ids equal those of the `tokenizers` library on the
// same file.
class Tokenizer {
 public:
  // Largest text that Encode takes, bytes: far above any context window, and a bound on the memory of a call.
  static constexpr size_t kTextBytesMax = size_t{64} << 20;

  struct EncodeOptions {
    // Adds what the post-processor's template holds (for instance a BOS in front).
    bool add_special_tokens = true;
    // Recognises special tokens that are spelled out in the text. A rendered chat template needs it; text
    // that a user typed and that is not to steer the model is encoded with false.
    bool parse_special = true;
    // What stems from strangers in a rendered chat template (MarkedText::data): sorted, disjoint ranges of
    // the text's bytes. A special token whose spelling overlaps one is encoded as ordinary text, so nothing
    // that a user writes becomes a control token, alone or together with the template's own text next to it.
    // All else is encoded as without. Borrowed for the call.
    std::span<const ByteRange> data = {};
    // Where not null: the elementary steps of the model (merges looked up, candidates weighed) are added, for
    // those who watch that the work stays linear.
    uint64_t* steps = nullptr;
  };

  // Reads `dir`/tokenizer.json and, where there, tokenizer_config.json, special_tokens_map.json and
  // chat_template.jinja. Errors name the file and the field: NotFound (no tokenizer.json), InvalidArgument
  // (malformed or contradictory), Unimplemented (a component that we do not have).
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> Load(const std::string& dir);

  // The same from memory; `config_json` and `chat_template` may be empty. `name` stands for the file in
  // errors.
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> FromJson(std::string_view tokenizer_json,
                                                                   std::string_view config_json = {},
                                                                   std::string_view name = "tokenizer.json");

  // O(n log n) in the bytes of `text`. Invalid UTF-8 reads as U+FFFD, one per maximal subpart. Errors:
  // InvalidArgument (text longer than kTextBytesMax, one that exhausts the pre-tokenizer regex's limits, or a
  // character that the vocabulary lacks where it has no unknown token).
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, EncodeOptions options) const;
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text) const {
    return Encode(text, EncodeOptions{});
  }

  // Always valid UTF-8; ids that the vocabulary does not hold are skipped, as Hugging Face does. Equal to
  // what a StreamDecoder gives in pieces.
  std::string Decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  // Highest id + 1, added tokens included. Ids below it may be unused.
  int32_t vocab_size() const { return static_cast<int32_t>(entries_.size()); }
  std::optional<int32_t> bos_id() const { return bos_id_; }
  std::optional<int32_t> eos_id() const { return eos_id_; }
  const std::string& bos_token() const { return bos_token_; }
  const std::string& eos_token() const { return eos_token_; }
  // False for ids outside the vocabulary.
  bool is_special(int32_t id) const;

  // The bytes that this token stands for, which may be half a character; empty for unknown ids. Special
  // tokens give their spelling. A leading space that Decode strips at the start of a text is kept here.
  std::string TokenText(int32_t id) const;
  // The token as the vocabulary spells it (`Ġthe`, `<0x0A>`); nullopt for ids that are not in use.
  std::optional<std::string_view> TokenPiece(int32_t id) const;
  // The id of a token by its vocabulary spelling, added tokens first.
  std::optional<int32_t> PieceToId(std::string_view piece) const;

  // SHA-256 of tokenizer.json, hex: part of the model fingerprint.
  const std::string& Digest() const { return digest_; }

  // Jinja source: `chat_template.jinja` beside the file, else tokenizer_config.json's `chat_template` (of a
  // list of named ones, `default`); empty if there is none.
  const std::string& chat_template() const { return chat_template_; }

  const TokenDecoderSpec& decoder_spec() const { return decoder_; }

 private:
  // Working memory of one Encode call.
  struct Scratch {
    PreTokenizer::Scratch pieces;
    TokenModel::Scratch model;
    std::vector<AddedTokens::Part> raw_parts, parts;
    std::vector<ByteRange> raw_data, data;
    std::vector<uint8_t> marks;
    std::string sanitized, normalized;
  };
  // Calls take one from here and give it back, so that their number is that of the threads that encode at
  // once, and each stays warm. Kept: kScratchesMax.
  class ScratchPool {
   public:
    static constexpr size_t kScratchesMax = 16;
    std::unique_ptr<Scratch> Take();
    void Give(std::unique_ptr<Scratch> scratch);

   private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Scratch>> free_;
  };

  Tokenizer() = default;

  absl::Status ReadTokenizerJson(const nlohmann::json& root);
  absl::Status ReadAddedToken(const nlohmann::json& node, const std::string& where);
  absl::Status ReadPostProcessor(const nlohmann::json& node, const std::string& where);
  absl::Status ReadTemplateProcessing(const nlohmann::json& node, const std::string& where);
  absl::Status ReadConfig(std::string_view text, std::string_view file, bool only_missing);
  absl::Status Encode(std::string_view text, const EncodeOptions& options, Scratch& scratch,
                      std::vector<int32_t>& ids) const;
  // A stretch of the raw text, raw[begin, end), that holds no raw-text token.
  absl::Status EncodeStretch(std::string_view raw, size_t begin, size_t end, const EncodeOptions& options,
                             std::span<const ByteRange> data, Scratch& scratch,
                             std::vector<int32_t>& ids) const;
  void SetPiece(int32_t id, std::string_view piece, bool special);

  AddedTokens added_;
  Normalizer normalizer_;
  PreTokenizer pretokenizer_;
  std::unique_ptr<TokenModel> model_;
  TokenDecoderSpec decoder_;
  std::vector<int32_t> prefix_ids_, suffix_ids_;  // what the post-processor puts round the text

  // By id: where its spelling lies in pieces_.
  struct Entry {
    uint32_t begin = 0, bytes = 0;
    bool used = false;
    bool special = false;
  };
  std::vector<Entry> entries_;
  std::string pieces_;
  absl::flat_hash_map<std::string, int32_t> added_ids_;

  std::optional<int32_t> bos_id_, eos_id_;
  std::string bos_token_, eos_token_, digest_, chat_template_;
  mutable ScratchPool scratches_;
};

}  // namespace tidepool
