#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/structured/char_set.h"
#include "server/structured/dfa.h"

namespace tidepool::structured {

// Regular expressions, the kind that finite automata match (what RE2 takes): literals, . [] | () * + ? {m,n}
// with lazy forms (which match the same), ^ $ \A \z, (?i) (?s) and groups with flags or names, \d \w \s and
// their negations (\d and \w are ASCII), \xHH \x{H} \uHHHH \u{H} \cX, \p{L} general categories and some
// scripts, [[:alpha:]].
//   Unimplemented, by name: back references, look-around, \b \B, atomic groups, possessive repetition, flags
// other than i and s, properties without a table. InvalidArgument: malformed, with the byte offset.
struct RegexSyntax {
  bool ecma = false;    // of JSON Schema: \s and . as ECMAScript has them, [] is empty, no POSIX classes
  bool search = false;  // a match anywhere in the text will do; else the whole text has to match
  bool case_insensitive = false;
};

// Regex: a parsed pattern. Parsing allocates O(pattern).
class Regex {
 public:
  static absl::StatusOr<Regex> Parse(std::string_view pattern, const RegexSyntax& syntax, Budget& budget);

  // The texts that match, as valid UTF-8. May be empty.
  absl::StatusOr<Dfa> ToDfa(Budget& budget) const;

  // Where the pattern is one set of characters, repeated: `^[a-z]{1,63}$`. max UINT32_MAX: no limit.
  struct Repetition {
    CharSet set;
    uint32_t min, max;
  };
  std::optional<Repetition> AsRepetition() const;

 private:
  friend class RegexParser;
  enum class Kind : uint8_t { kEmpty, kSet, kSequence, kChoice, kRepeat, kBegin, kEnd };
  struct Node {
    Kind kind = Kind::kEmpty;
    CharSet set;
    std::vector<uint32_t> parts;
    uint32_t min = 0, max = 0;
  };
  absl::Status Emit(uint32_t node, Nfa& nfa, uint32_t from, uint32_t to, Budget& budget) const;

  RegexSyntax syntax_;
  std::vector<Node> nodes_;
  uint32_t root_ = 0;
  bool anchors_ = false;
  // Edges of the automaton that only pass at the begin or end of the text, while Emit runs.
  struct Anchor {
    uint32_t from, to;
    bool begin;
  };
  mutable std::vector<Anchor> passes_;
};

}  // namespace tidepool::structured
