#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "server/structured/expression.h"

namespace tidepool::structured {

// Digits of generated numbers, so that none goes on for ever: an integer of kIntegerDigits fits an int64, and
// no number is beyond a double.
inline constexpr uint32_t kIntegerDigits = 18;
inline constexpr uint32_t kFractionDigits = 16;
inline constexpr uint32_t kExponentDigits = 2;

// JsonPieces: the parts of JSON texts as expressions of one pool, for one white-space style (View of the
// pool). Strings without constraints take every escape of RFC 8259 (surrogates in pairs only); those with a
// constraint are written with the escapes that are needed, so that each text has one spelling: " and \ and
// control characters, these as \b \f \n \r \t where they have one, else as \u00XX.
class JsonPieces {
 public:
  using Id = ExpressionPool::Id;

  JsonPieces(ExpressionPool& pool, JsonWhitespace whitespace);

  // Optional white space.
  Id Space();
  // `{`, `[`, `,` or `:` and optional white space.
  Id Punctuation(char c);
  // Optional white space and `}` or `]`.
  Id Close(char c);

  Id String();  // any
  Id Integer();
  Id Number();
  Id Value();
  Id Object();
  Id Array();

  // A string of min to max characters (code points).
  Id StringOfLength(uint32_t min, uint32_t max);
  // A string of min to max characters of `set`.
  absl::StatusOr<Id> StringOfSet(const CharSet& set, uint32_t min, uint32_t max);
  // A string whose text, without escapes and quotes, `content` matches.
  absl::StatusOr<Id> StringOf(const Dfa& content);

 private:
  // Behind the opening quote: what `content` matches, escaped, and the closing quote.
  absl::StatusOr<Dfa> Escaped(const Dfa& content);
  // The same for any text with any escapes.
  const Dfa& AnyString();
  Id Memo(std::optional<Id>& slot, Id made) { return *(slot = made); }

  ExpressionPool& pool_;
  const JsonWhitespace whitespace_;
  std::optional<Dfa> any_string_;
  std::optional<Id> space_, string_, integer_, number_;
  std::optional<uint32_t> value_, object_, array_;  // rules
};

}  // namespace tidepool::structured
