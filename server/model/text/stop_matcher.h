#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tidepool {

// StopMatcher: finds the first of several stop strings in streamed text. Text that may still turn out to be
// the beginning of a stop string is held back (at most the longest stop string less one byte), so a client
// never sees a piece of one. The match that is complete first wins, of those that end at the same byte the
// longest: so the answer does not depend on how the text was cut into pieces. Owned by one thread; copyable.
class StopMatcher {
 public:
  static constexpr size_t kStopsMax = 32;
  static constexpr size_t kStopBytesMax = 4096;

  // Errors: InvalidArgument for an empty or too long stop string, or for too many.
  static absl::StatusOr<StopMatcher> Create(std::vector<std::string> stops, bool include_stop_str);

  struct Result {
    std::string emit;               // text that may go out now
    std::optional<size_t> matched;  // index of the stop string; nothing more is emitted after it
  };

  // After a match, Push and Flush return nothing. Costs O(bytes of text x stop strings).
  // `text` must be whole UTF-8 characters; then so is every `emit`, provided that the stop strings are too.
  // `may_match` false: a stop string that ends in `text` is passed over, one that only begins there may match
  // later.
  Result Push(std::string_view text, bool may_match = true);
  // The held text, once no more comes (end of sequence, length reached).
  std::string Flush();

  bool matched() const { return matched_; }

 private:
  StopMatcher(std::vector<std::string> stops, bool include);

  // One stop string with its Knuth-Morris-Pratt table: border[n] is the longest proper prefix of text[0, n)
  // that is also its suffix.
  struct Stop {
    std::string text;
    std::vector<uint32_t> border;
    uint32_t state = 0;  // bytes of `text` that the stream ends with now
  };
  std::vector<Stop> stops_;
  bool include_ = false;
  bool matched_ = false;
  std::string held_;
};

}  // namespace tidepool
