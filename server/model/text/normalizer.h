#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/model/text/charsmap.h"
#include "server/model/text/regex.h"

namespace tidepool {

// Normalizer: the `normalizer` part of tokenizer.json: Sequence, Prepend, Replace, Strip, StripAccents,
// Lowercase, NFC, NFD, NFKC, NFKD, BertNormalizer and Precompiled. Immutable, thread-safe. A
// default-constructed one changes nothing.
class Normalizer {
 public:
  // Longest result, bytes, and its growth: a hostile file may replace one character by thousands, again and
  // again. (Of the Unicode forms the worst makes 11 bytes of one.)
  static constexpr size_t kBytesMax = size_t{256} << 20;
  static constexpr size_t kGrowthMax = 32;
  static constexpr size_t kStepsMax = 32;

  // `where` names the node in errors. Errors: InvalidArgument, Unimplemented (another kind, by name).
  static absl::StatusOr<Normalizer> Parse(const nlohmann::json& node, const std::string& where);

  // Normalises `text` (valid UTF-8, and so is the result) in place. With `marks`, one per byte of `text`,
  // they move with the bytes: a byte of the result is marked if a byte that it comes from was. `front_bytes`
  // tells how many of the result's first bytes come from the text's first character. O(n log n). Errors:
  // InvalidArgument (a regex's limits, a result above kBytesMax or kGrowthMax times the text and 4 KiB).
  struct Trace {
    std::vector<uint8_t>* marks = nullptr;
    size_t front_bytes = 0;
    size_t bytes_max = kBytesMax;  // set by Apply
  };
  absl::Status Apply(std::string& text, Trace& trace) const;
  absl::Status Apply(std::string& text) const {
    Trace trace;
    return Apply(text, trace);
  }

  bool empty() const { return steps_.empty(); }

 private:
  enum class Kind {
    kPrepend,
    kReplace,
    kStrip,
    kStripAccents,
    kLowercase,
    kNfc,
    kNfd,
    kNfkc,
    kNfkd,
    kBert,
    kPrecompiled
  };
  struct Step {
    Kind kind;
    std::string content;               // kPrepend, kReplace
    std::vector<Regex> pattern;        // kReplace: exactly one
    bool left = false, right = false;  // kStrip
    // kBert
    bool clean_text = false, chinese = false, strip_accents = false, lowercase = false;
    std::shared_ptr<const Charsmap> charsmap;  // kPrecompiled
  };
  class Writer;
  static absl::Status Append(const nlohmann::json& node, const std::string& where, std::vector<Step>& steps);
  static absl::Status Run(const Step& step, std::string& text, Trace& trace);
  std::vector<Step> steps_;
};

// Reads `{"String": s}` or `{"Regex": r}` under `key`.
absl::StatusOr<Regex> ParsePattern(const nlohmann::json& node, std::string_view key,
                                   const std::string& where);

}  // namespace tidepool
