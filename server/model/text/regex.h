#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tidepool {

// Regex: a compiled PCRE2 pattern (JIT where the machine has it, UTF and UCP on), or a plain string.
// Immutable, thread-safe, cheap to copy. PCRE2 10.42 holds Unicode 14 tables; Hugging Face's tokenizers use
// Oniguruma: for the patterns that models ship both read alike.
class Regex {
 public:
  // Errors: InvalidArgument with PCRE2's message and the offset in the pattern.
  static absl::StatusOr<Regex> Compile(std::string_view pattern);
  // Matches exactly `text`. Errors: InvalidArgument when empty.
  static absl::StatusOr<Regex> Literal(std::string text);

  struct Span {
    size_t begin, end;  // [begin, end), bytes
  };
  // Sets `out` to the non-overlapping matches in order; empty matches are left out. `text` must be valid
  // UTF-8. Errors: InvalidArgument (the match exhausted its step, heap or stack limit).
  absl::Status FindAll(std::string_view text, std::vector<Span>& out) const;

  // Every match replaced by `content` (taken as it stands).
  absl::StatusOr<std::string> ReplaceAll(std::string_view text, std::string_view content) const;

  bool is_literal() const { return code_ == nullptr; }
  const std::string& literal() const { return literal_; }

 private:
  Regex() = default;
  std::shared_ptr<const void> code_;  // pcre2_code, kept out of this header
  std::string literal_;
};

}  // namespace tidepool
