#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tidepool {

// Regex: a compiled PCRE2 pattern (JIT where the machine has it, UTF and UCP on), or a plain string.
// Immutable, thread-safe, cheap to copy. Hugging Face's tokenizers use Oniguruma, whose sets for \s, \w, \d
// and the general categories differ from PCRE2's (other Unicode versions, other definitions): Compile asks
// PCRE2 for Oniguruma's.
class Regex {
 public:
  static constexpr size_t kPatternBytesMax = 16 << 10;  // the longest known has 600

  // Errors: InvalidArgument with PCRE2's message and the offset in the pattern; Unimplemented (class
  // intersection and nesting, negated sets inside a class).
  static absl::StatusOr<Regex> Compile(std::string_view pattern);
  // Matches exactly `text`. Errors: InvalidArgument when empty.
  static absl::StatusOr<Regex> Literal(std::string text);

  struct Span {
    uint32_t begin, end;  // [begin, end), bytes
  };
  // Sets `out` to the non-overlapping matches in order; empty matches are left out. `text` must be valid
  // UTF-8 and below 4 GiB. Errors: InvalidArgument (the match exhausted its step, heap or stack limit).
  absl::Status FindAll(std::string_view text, std::vector<Span>& out) const;

  bool is_literal() const { return code_ == nullptr; }
  const std::string& literal() const { return literal_; }

 private:
  Regex() = default;
  std::shared_ptr<const void> code_;  // pcre2_code, kept out of this header
  std::string literal_;
};

}  // namespace tidepool
