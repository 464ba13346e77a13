#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/model/text/regex.h"

namespace tidepool {

// Normalizer: the `normalizer` part of tokenizer.json: Sequence, Prepend, Replace, Strip, NFC, NFD, NFKC and
// NFKD (utf8proc). Immutable, thread-safe. A default-constructed one changes nothing.
class Normalizer {
 public:
  // `where` names the node in errors. Errors: InvalidArgument, Unimplemented (another kind, by name).
  static absl::StatusOr<Normalizer> Parse(const nlohmann::json& node, const std::string& where);

  // `text` is valid UTF-8; so is the result. O(n log n). Errors: InvalidArgument (a regex's limits).
  absl::StatusOr<std::string> Apply(std::string text) const;

  bool empty() const { return steps_.empty(); }

 private:
  enum class Kind { kPrepend, kReplace, kStrip, kNfc, kNfd, kNfkc, kNfkd };
  struct Step {
    Kind kind;
    std::string content;               // kPrepend, kReplace
    std::vector<Regex> pattern;        // kReplace: exactly one
    bool left = false, right = false;  // kStrip
  };
  static absl::Status Append(const nlohmann::json& node, const std::string& where, std::vector<Step>& steps);
  std::vector<Step> steps_;
};

// Reads `{"String": s}` or `{"Regex": r}` under `key`.
absl::StatusOr<Regex> ParsePattern(const nlohmann::json& node, std::string_view key,
                                   const std::string& where);

}  // namespace tidepool
