#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/model/text/regex.h"

namespace tidepool {

// PreTokenizer: the `pre_tokenizer` part of tokenizer.json: Sequence, ByteLevel, Split, Digits, Punctuation,
// Metaspace, Whitespace and WhitespaceSplit. Cuts a text into the pieces that BPE merges within. Immutable,
// thread-safe. A default-constructed one leaves the text in one piece.
class PreTokenizer {
 public:
  static absl::StatusOr<PreTokenizer> Parse(const nlohmann::json& node, const std::string& where);

  // Sets `pieces` to the pieces of `text` in order (valid UTF-8, none empty). `at_start`: the text begins
  // where the user's text begins, which Metaspace's `first` scheme asks for.
  absl::Status Apply(std::string_view text, bool at_start, std::vector<std::string>& pieces) const;

 private:
  enum class Kind { kByteLevel, kSplit, kDigits, kPunctuation, kMetaspace, kWhitespace, kWhitespaceSplit };
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kAlways, kFirst, kNever };
  struct Step {
    Kind kind;
    std::vector<Regex> pattern;  // kByteLevel with regex, kSplit, kWhitespace: one
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
  static absl::Status Run(const Step& step, std::string piece, bool at_start, std::vector<std::string>& out);
  static void Cut(std::string_view text, const std::vector<Regex::Span>& matches, Behavior behavior,
                  bool invert, std::vector<std::string>& out);
  std::vector<Step> steps_;
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
