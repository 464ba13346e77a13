#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "server/model/text/added_tokens.h"
#include "server/model/text/bpe.h"
#include "server/model/text/normalizer.h"
#include "server/model/text/pretokenizer.h"
#include "server/model/text/token_decoder.h"

namespace tidepool {

// Tokenizer: a Codec between text and token ids, read from a Hugging Face tokenizer.json whose model is BPE
// (byte-level, or sentencepiece-style with byte fallback). Immutable after Load, hence thread-safe. Ids equal
// those of the `tokenizers` library on the same file.
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
  };

  // Reads `dir`/tokenizer.json and, where there, tokenizer_config.json, special_tokens_map.json and
  // chat_template.jinja. Errors name the file and the field: NotFound (no tokenizer.json), InvalidArgument
  // (malformed or contradictory), Unimplemented (a component that we do not have, for instance WordPiece).
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> Load(const std::string& dir);

  // The same from memory; `config_json` and `chat_template` may be empty. `name` stands for the file in
  // errors.
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> FromJson(std::string_view tokenizer_json,
                                                                   std::string_view config_json = {},
                                                                   std::string_view name = "tokenizer.json");

  // O(n log n) in the bytes of `text`. Invalid UTF-8 reads as U+FFFD. Errors: InvalidArgument (text longer
  // than kTextBytesMax, or one that exhausts the pre-tokenizer regex's limits).
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, EncodeOptions options) const;
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text) const {
    return Encode(text, EncodeOptions{});
  }

  // Always valid UTF-8; ids that the vocabulary does not hold are skipped, as Hugging Face does. Equal to
  // what a StreamDecoder gives in pieces.
  std::string Decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  // Highest id + 1, added tokens included. Ids below it may be unused.
  int32_t vocab_size() const { return static_cast<int32_t>(id_to_text_.size()); }
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
  Tokenizer() = default;

  absl::Status ReadTokenizerJson(const nlohmann::json& root);
  absl::Status ReadPostProcessor(const nlohmann::json& node, const std::string& where);
  absl::Status ReadConfig(std::string_view text, std::string_view file, bool only_missing);

  AddedTokens added_;
  Normalizer normalizer_;
  PreTokenizer pretokenizer_;
  BpeModel bpe_;
  TokenDecoderSpec decoder_;
  std::vector<int32_t> prefix_ids_, suffix_ids_;  // what TemplateProcessing puts round the text

  // By id; an unused id holds an empty piece and used == false.
  struct Entry {
    std::string piece;
    bool used = false;
    bool special = false;
  };
  std::vector<Entry> id_to_text_;
  absl::flat_hash_map<std::string, int32_t> added_ids_;

  std::optional<int32_t> bos_id_, eos_id_;
  std::string bos_token_, eos_token_, digest_, chat_template_;
};

}  // namespace tidepool
