#include "server/structured/json_numbers.h"

#include <algorithm>
#include <tuple>

#include "base/status.h"

namespace tidepool::structured {
namespace {

constexpr uint32_t kDigitsMax = 15;
constexpr uint32_t kWholeDigitsMax = 18;

int CompareMagnitude(const Decimal& a, const Decimal& b) {
  if (a.whole.size() != b.whole.size()) return a.whole.size() < b.whole.size() ? -1 : 1;
  if (const int c = a.whole.compare(b.whole); c != 0) return c < 0 ? -1 : 1;
  const int c = a.fraction.compare(b.fraction);  // without trailing zeros the order of the texts is right
  return c < 0 ? -1 : c > 0 ? 1 : 0;
}

// An unsigned number while it is read.
enum Phase : uint8_t { kStart, kZero, kWhole, kPoint, kFraction };
// phase; whole digits; fraction digits; how what was read compares with the low and the high bound, digit by
// digit (-1, 0, 1); the value, scaled, modulo the step.
using State = std::tuple<uint8_t, uint32_t, uint32_t, int, int, uint32_t>;

class Unsigned {
 public:
  Unsigned(const NumberRange& range, std::optional<NumberRange::Bound> low,
           std::optional<NumberRange::Bound> high)
      : range_(range), low_(std::move(low)), high_(std::move(high)) {
    digits_max_ = range.integer || range.step_scale == 0 ? kWholeDigitsMax : kDigitsMax;
    if (!range.integer && !range.step) digits_max_ = kDigitsMax;
    if (range.step) digits_max_ = std::min(digits_max_, std::clamp(6000 / *range.step, 6u, kWholeDigitsMax));
    fraction_max_ = range.integer ? 0 : range.step ? range.step_scale : kDigitsMax;
  }

  absl::StatusOr<Dfa> Run(Budget& budget) const {
    const State start{kStart, 0, 0, 0, 0, 0};
    return Explore(
        start, "0123456789.", [this](const State& s, uint8_t byte) { return Step(s, byte); },
        [this](const State& s) { return Final(s); }, budget);
  }

 private:
  std::optional<State> Step(State s, uint8_t byte) const {
    auto& [phase, whole, fraction, low, high, rest] = s;
    if (byte == '.') {
      if ((phase != kZero && phase != kWhole) || fraction_max_ == 0) return std::nullopt;
      if (whole + 1 > digits_max_) return std::nullopt;
      // The whole parts are complete: now the longer one is larger.
      low = low_ ? CompareWhole(low, whole, *low_) : 0;
      high = high_ ? CompareWhole(high, whole, *high_) : 0;
      phase = kPoint;
      return s;
    }
    const uint32_t digit = static_cast<uint32_t>(byte - '0');
    const auto compare = [&](int so_far, const std::string& of, uint32_t at) {
      if (so_far != 0) return so_far;
      const char theirs = at < of.size() ? of[at] : '0';
      return byte < theirs ? -1 : byte > theirs ? 1 : 0;
    };
    switch (phase) {
      case kStart:
      case kWhole:
        if (whole + 1 > digits_max_) return std::nullopt;
        if (low_) low = compare(low, low_->value.whole, whole);
        if (high_) high = compare(high, high_->value.whole, whole);
        phase = phase == kStart && digit == 0 ? kZero : kWhole;
        ++whole;
        break;
      case kZero:
        return std::nullopt;
      default:
        if (fraction + 1 > fraction_max_ || whole + fraction + 1 > digits_max_) return std::nullopt;
        if (low_) low = compare(low, low_->value.fraction, fraction);
        if (high_) high = compare(high, high_->value.fraction, fraction);
        phase = kFraction;
        ++fraction;
    }
    if (range_.step) rest = static_cast<uint32_t>((uint64_t{rest} * 10 + digit) % *range_.step);
    return s;
  }

  static int CompareWhole(int so_far, uint32_t digits, const NumberRange::Bound& bound) {
    if (digits != bound.value.whole.size()) return digits < bound.value.whole.size() ? -1 : 1;
    return so_far;
  }
  // How the number that ends here compares with the bound.
  static int Compare(int so_far, const State& s, const NumberRange::Bound& bound) {
    const auto& [phase, whole, fraction, low, high, rest] = s;
    if (phase != kFraction) so_far = CompareWhole(so_far, whole, bound);
    if (so_far == 0 && fraction < bound.value.fraction.size()) return -1;
    return so_far;
  }

  bool Final(const State& s) const {
    const auto& [phase, whole, fraction, low, high, rest] = s;
    if (phase != kZero && phase != kWhole && phase != kFraction) return false;
    if (low_) {
      const int c = Compare(low, s, *low_);
      if (c < 0 || (c == 0 && low_->exclusive)) return false;
    }
    if (high_) {
      const int c = Compare(high, s, *high_);
      if (c > 0 || (c == 0 && high_->exclusive)) return false;
    }
    if (range_.step) {
      uint64_t scaled = rest;
      for (uint32_t i = fraction; i < range_.step_scale; ++i) scaled = scaled * 10 % *range_.step;
      if (scaled != 0) return false;
    }
    return true;
  }

  const NumberRange& range_;
  const std::optional<NumberRange::Bound> low_, high_;
  uint32_t digits_max_ = kDigitsMax, fraction_max_ = 0;
};

}  // namespace

Decimal Decimal::Parse(std::string_view text) {
  Decimal out;
  if (!text.empty() && text[0] == '-') {
    out.negative = true;
    text.remove_prefix(1);
  }
  const size_t e = text.find_first_of("eE");
  int exponent = 0;
  if (e != text.npos) {
    std::string_view digits = text.substr(e + 1);
    const bool down = !digits.empty() && digits[0] == '-';
    if (!digits.empty() && (digits[0] == '-' || digits[0] == '+')) digits.remove_prefix(1);
    for (const char c : digits) exponent = std::min(exponent * 10 + (c - '0'), 10'000);
    if (down) exponent = -exponent;
    text = text.substr(0, e);
  }
  const size_t point = text.find('.');
  std::string digits(text.substr(0, point));
  int scale = static_cast<int>(digits.size()) + exponent;  // where the point is
  if (point != text.npos) digits += text.substr(point + 1);
  if (scale < 0) {
    digits.insert(0, static_cast<size_t>(-scale), '0');
    scale = 0;
  }
  if (static_cast<size_t>(scale) > digits.size())
    digits.append(static_cast<size_t>(scale) - digits.size(), '0');
  out.whole = digits.substr(0, static_cast<size_t>(scale));
  out.fraction = digits.substr(static_cast<size_t>(scale));
  out.whole.erase(0, std::min(out.whole.find_first_not_of('0'), out.whole.size()));
  if (out.whole.empty()) out.whole = "0";
  while (!out.fraction.empty() && out.fraction.back() == '0') out.fraction.pop_back();
  if (out.IsZero()) out.negative = false;
  return out;
}

int Decimal::Compare(const Decimal& a, const Decimal& b) {
  if (a.negative != b.negative) return a.negative ? -1 : 1;
  return a.negative ? CompareMagnitude(b, a) : CompareMagnitude(a, b);
}

absl::StatusOr<Dfa> NumbersIn(const NumberRange& range, Budget& budget) {
  Nfa nfa;
  const uint32_t start = nfa.Add(), minus = nfa.Add(), end = nfa.Add();
  nfa.Connect(start, '-', '-', minus);
  const Decimal zero;
  const auto flipped = [](NumberRange::Bound bound) {
    bound.value.negative = !bound.value.negative && !bound.value.IsZero();
    return bound;
  };
  // What is not negative, and the absolute values of what is.
  for (const bool negative : {false, true}) {
    std::optional<NumberRange::Bound> low = range.low, high = range.high;
    if (negative) {
      std::swap(low, high);
      if (low) low = flipped(*low);
      if (high) high = flipped(*high);
      // -0 is 0, which has a text already.
      if (!low || Decimal::Compare(low->value, zero) <= 0) low = NumberRange::Bound{zero, true};
    }
    if (high && Decimal::Compare(high->value, zero) < 0) continue;
    if (low && Decimal::Compare(low->value, zero) < 0) low.reset();
    TP_ASSIGN_OR_RETURN(const Dfa dfa, Unsigned(range, low, high).Run(budget));
    AddTo(dfa, nfa, negative ? minus : start, end);
  }
  return Determinize(nfa, start, end, budget);
}

}  // namespace tidepool::structured
