#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/model/text/pretokenizer_scan.h"
#include "server/model/text/regex.h"

namespace tidepool {

// PreTokenizer: the `pre_tokenizer` part of tokenizer.json: Sequence, ByteLevel, Split, Digits, Punctuation,
// Metaspace, Whitespace, WhitespaceSplit and BertPreTokenizer. Cuts a text into the pieces that the model
// works within. Immutable, thread-safe. A default-constructed one leaves the text in one piece.
class PreTokenizer {
 public:
  // Working memory of a call, kept by the caller so that its buffers are used again. One thread's.
  struct Scratch {
    std::vector<Regex::Span> spans;  // the result
    std::vector<Regex::Span> next, matches;
    std::string buffer[2];
  };

  static absl::StatusOr<PreTokenizer> Parse(const nlohmann::json& node, const std::string& where);

  // Cuts `text` (valid UTF-8): scratch.spans are the pieces in order (none empty), as ranges of the returned
  // text, which is `text` itself or lies in `scratch`. `at_start`: the text begins where the user's text
  // begins, which Metaspace's `first` scheme asks for.
  absl::StatusOr<std::string_view> Apply(std::string_view text, bool at_start, Scratch& scratch) const;

  // Whether the pieces are bytes that the model is to read through the byte alphabet (ByteLevel comes last),
  // so that nobody need write them out in it.
  bool byte_level() const { return byte_level_; }

 private:
  enum class Kind {
    kByteLevel,
    kSplit,
    kDigits,
    kPunctuation,
    kMetaspace,
    kWhitespace,
    kWhitespaceSplit,
    kBert
  };
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kAlways, kFirst, kNever };
  struct Step {
    Kind kind;
    // kByteLevel with regex: the scanner; kSplit: one of the two.
    std::optional<SplitScanner> scanner;
    std::optional<Regex> regex;
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;            // kSplit
    bool add_prefix_space = false;  // kByteLevel
    std::string replacement;        // kMetaspace
    Prepend prepend = Prepend::kAlways;
    bool split = true;
  };
  static absl::Status Append(const nlohmann::json& node, const std::string& where, std::vector<Step>& steps);
  static absl::StatusOr<Behavior> ParseBehavior(const nlohmann::json& node, const std::string& where,
                                                std::string_view fallback);
  // Appends the pieces of text[piece) to scratch.next.
  static absl::Status CutPiece(const Step& step, std::string_view text, Regex::Span piece, Scratch& scratch);
  static void Cut(Regex::Span piece, const std::vector<Regex::Span>& matches, Behavior behavior, bool invert,
                  std::vector<Regex::Span>& out);
  std::vector<Step> steps_;
  bool byte_level_ = false;
};

// GPT-2's byte alphabet: each byte as one printable character. Source: openai/gpt-2, encoder.py,
// bytes_to_unicode.
namespace byte_alphabet {
// The UTF-8 character of `byte`.
std::string_view Char(uint8_t byte);
// The byte that `cp` stands for, -1 if none.
int Byte(uint32_t cp);
}  // namespace byte_alphabet

}  // namespace tidepool
