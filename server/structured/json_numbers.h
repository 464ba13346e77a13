#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "server/structured/dfa.h"

// Numbers of JSON as finite automata over their text.
namespace tidepool::structured {

// Decimal: an exact decimal number.
struct Decimal {
  bool negative = false;
  std::string whole = "0";  // no leading zeros but the one of 0
  std::string fraction;     // no trailing zeros

  // From a JSON number's text.
  static Decimal Parse(std::string_view text);
  bool IsZero() const { return whole == "0" && fraction.empty(); }
  // -1, 0, 1.
  static int Compare(const Decimal& a, const Decimal& b);
};

struct NumberRange {
  bool integer = false;
  struct Bound {
    Decimal value;
    bool exclusive = false;
  };
  std::optional<Bound> low, high;
  // multipleOf = step / 10^step_scale.
  std::optional<uint32_t> step;
  uint32_t step_scale = 0;
};

// Numbers without exponent in the range. At most 15 digits in all where fractions are allowed, so that no two
// of them are the same double and a bound that a text keeps is kept by its double too; whole numbers have at
// most 18 digits, and with a step s at most 6000 / s (6 to 18).
absl::StatusOr<Dfa> NumbersIn(const NumberRange& range, Budget& budget);

}  // namespace tidepool::structured
