#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace tidepool::structured {

struct Nfa;

// CharSet: a set of Unicode scalar values (no surrogates) as sorted, disjoint, non-adjacent closed ranges.
class CharSet {
 public:
  struct Range {
    uint32_t lo, hi;
    bool operator==(const Range&) const = default;
  };

  CharSet() = default;
  static CharSet Any();
  static CharSet Of(uint32_t lo, uint32_t hi);
  static CharSet OfRanges(std::vector<Range> ranges);  // in any order
  static CharSet Of(uint32_t cp) { return Of(cp, cp); }
  // ASCII, as RE2 and ECMAScript have them: \d and \w.
  static CharSet Digit();
  static CharSet Word();
  // \s: of ECMAScript (with U+00A0, U+FEFF and the like) or of RE2 ([\t\n\f\r ] and \v).
  static CharSet Space(bool ecma);
  // A general category ("L", "Lu", "Nd") or script that we have tables for; nullopt for others. Properties of
  // Unicode 15, utf8proc's tables.
  static std::optional<CharSet> Property(std::string_view name);

  void Add(uint32_t lo, uint32_t hi);
  void Add(const CharSet& other);
  CharSet Negated() const;
  CharSet Without(const CharSet& other) const;
  CharSet Intersected(const CharSet& other) const;
  // With what simple case mapping makes of its members, in both directions.
  CharSet CaseFolded() const;

  bool Has(uint32_t cp) const;
  bool empty() const { return ranges_.empty(); }
  size_t Size() const;
  const std::vector<Range>& ranges() const { return ranges_; }

  // Adds the UTF-8 forms of all members as paths between two states.
  void AddTo(Nfa& nfa, uint32_t from, uint32_t to) const;

 private:
  void Normalize();

  std::vector<Range> ranges_;
};

}  // namespace tidepool::structured
