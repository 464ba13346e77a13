#include "server/structured/json_pieces.h"

#include <string>

#include "base/status.h"
#include "server/structured/regex.h"

namespace tidepool::structured {
namespace {

constexpr std::string_view kShortEscapes = "bfnrt";
constexpr std::string_view kShortEscaped = "\b\f\n\r\t";

// [lo, hi] as one hexadecimal digit; lo and hi in [0, 15].
void HexDigit(Nfa& nfa, uint32_t from, int lo, int hi, uint32_t to) {
  for (int v = lo; v <= hi; ++v) {
    if (v < 10) {
      nfa.Connect(from, static_cast<uint8_t>('0' + v), static_cast<uint8_t>('0' + v), to);
    } else {
      nfa.Connect(from, static_cast<uint8_t>('a' + v - 10), static_cast<uint8_t>('a' + v - 10), to);
      nfa.Connect(from, static_cast<uint8_t>('A' + v - 10), static_cast<uint8_t>('A' + v - 10), to);
    }
  }
}

// A fixed automaton: cannot fail.
Dfa Must(absl::StatusOr<Dfa> dfa) {
  TP_CHECK(dfa.ok());
  return *std::move(dfa);
}

Dfa FixedRegex(std::string_view pattern) {
  CompileLimits limits;
  limits.cpu_time_max = absl::InfiniteDuration();
  Budget budget(limits);
  auto regex = Regex::Parse(pattern, {}, budget);
  TP_CHECK(regex.ok());
  return Must(regex->ToDfa(budget));
}

Dfa MakeAnyString() {
  CompileLimits limits;
  limits.cpu_time_max = absl::InfiniteDuration();
  Budget budget(limits);
  Nfa nfa;
  const uint32_t loop = nfa.Add(), end = nfa.Add();
  CharSet raw = CharSet::Of(0x20, 0x10FFFF).Without(CharSet::Of('"')).Without(CharSet::Of('\\'));
  raw.AddTo(nfa, loop, loop);
  const uint32_t escape = nfa.Add();
  nfa.Connect(loop, '\\', '\\', escape);
  for (const char c : std::string_view("\"\\/bfnrt")) {
    nfa.Connect(escape, static_cast<uint8_t>(c), static_cast<uint8_t>(c), loop);
  }
  const uint32_t u1 = nfa.Add(), u2 = nfa.Add(), u3 = nfa.Add(), u4 = nfa.Add();
  nfa.Connect(escape, 'u', 'u', u1);
  HexDigit(nfa, u1, 0, 12, u2);
  HexDigit(nfa, u1, 14, 15, u2);
  HexDigit(nfa, u2, 0, 15, u3);
  HexDigit(nfa, u3, 0, 15, u4);
  HexDigit(nfa, u4, 0, 15, loop);
  // D000 to D7FF, and D800 to DBFF with its second half.
  const uint32_t d = nfa.Add();
  HexDigit(nfa, u1, 13, 13, d);
  HexDigit(nfa, d, 0, 7, u3);
  uint32_t at = nfa.Add();
  HexDigit(nfa, d, 8, 11, at);
  const auto next = [&](int lo, int hi) {
    const uint32_t to = nfa.Add();
    HexDigit(nfa, at, lo, hi, to);
    at = to;
  };
  const auto literal = [&](char c) {
    const uint32_t to = nfa.Add();
    nfa.Connect(at, static_cast<uint8_t>(c), static_cast<uint8_t>(c), to);
    at = to;
  };
  next(0, 15);
  next(0, 15);
  literal('\\');
  literal('u');
  next(13, 13);
  next(12, 15);
  next(0, 15);
  HexDigit(nfa, at, 0, 15, loop);
  nfa.Connect(loop, '"', '"', end);
  return Must(Determinize(nfa, loop, end, budget));
}

}  // namespace

JsonPieces::JsonPieces(ExpressionPool& pool, JsonWhitespace whitespace)
    : pool_(pool), whitespace_(whitespace) {}

JsonPieces::Id JsonPieces::Space() {
  if (space_) return *space_;
  if (whitespace_ == JsonWhitespace::kCompact) return Memo(space_, pool_.Literal(""));
  static const auto* dfa = new Dfa(FixedRegex("( |\n {0,60}|\n\t{1,20})?"));
  return Memo(space_, pool_.Automatic(*dfa));
}

JsonPieces::Id JsonPieces::Punctuation(char c) {
  return pool_.Sequence({pool_.Literal(std::string(1, c)), Space()});
}

JsonPieces::Id JsonPieces::Close(char c) {
  return pool_.Sequence({Space(), pool_.Literal(std::string(1, c))});
}

const Dfa& JsonPieces::AnyString() {
  static const auto* dfa = new Dfa(MakeAnyString());
  return *dfa;
}

JsonPieces::Id JsonPieces::String() {
  if (string_) return *string_;
  return Memo(string_, pool_.Sequence({pool_.Literal("\""), pool_.Automatic(AnyString())}));
}

JsonPieces::Id JsonPieces::StringOfLength(uint32_t min, uint32_t max) {
  if (min == 0 && max == UINT32_MAX) return String();
  return pool_.Sequence({pool_.Literal("\""), pool_.Counted(AnyString(), min, max)});
}

absl::StatusOr<Dfa> JsonPieces::Escaped(const Dfa& content) {
  if (content.empty()) return Dfa{};
  Budget& budget = pool_.budget();
  TP_RETURN_IF_ERROR(budget.Work(content.states() * content.columns));
  Nfa nfa;
  const auto n = static_cast<uint32_t>(content.states());
  for (uint32_t s = 0; s < n; ++s) nfa.Add();
  const uint32_t end = nfa.Add();
  for (uint32_t s = 0; s < n; ++s) {
    if (content.IsFinal(s)) nfa.Connect(s, '"', '"', end);
    for (size_t byte = 0x20; byte < 256;) {
      const uint32_t to = content.Next(s, static_cast<uint8_t>(byte));
      size_t last = byte;
      const auto special = [](size_t b) { return b == '"' || b == '\\'; };
      if (!special(byte)) {
        while (last < 255 && !special(last + 1) && content.Next(s, static_cast<uint8_t>(last + 1)) == to)
          ++last;
        if (to != kDead) nfa.Connect(s, static_cast<uint8_t>(byte), static_cast<uint8_t>(last), to);
      }
      byte = last + 1;
    }
    // One state behind the backslash, and those of \u00XX, only where they are needed.
    uint32_t escape = kDead, low[2] = {kDead, kDead};
    const auto behind_backslash = [&] {
      if (escape == kDead) {
        escape = nfa.Add();
        nfa.Connect(s, '\\', '\\', escape);
      }
      return escape;
    };
    for (const uint8_t c : {uint8_t{'"'}, uint8_t{'\\'}}) {
      if (const uint32_t to = content.Next(s, c); to != kDead) nfa.Connect(behind_backslash(), c, c, to);
    }
    for (uint8_t c = 0; c < 0x20; ++c) {
      const uint32_t to = content.Next(s, c);
      if (to == kDead) continue;
      if (const size_t i = kShortEscaped.find(static_cast<char>(c)); i != kShortEscaped.npos) {
        const auto letter = static_cast<uint8_t>(kShortEscapes[i]);
        nfa.Connect(behind_backslash(), letter, letter, to);
        continue;
      }
      if (low[0] == kDead) {
        uint32_t at = behind_backslash();
        for (const char literal : std::string_view("u00")) {
          const uint32_t next = nfa.Add();
          nfa.Connect(at, static_cast<uint8_t>(literal), static_cast<uint8_t>(literal), next);
          at = next;
        }
        for (int high = 0; high < 2; ++high) {
          low[high] = nfa.Add();
          HexDigit(nfa, at, high, high, low[high]);
        }
      }
      HexDigit(nfa, low[c >> 4], c & 15, c & 15, to);
    }
    TP_RETURN_IF_ERROR(budget.Work(64));
  }
  return Determinize(nfa, 0, end, budget);
}

absl::StatusOr<JsonPieces::Id> JsonPieces::StringOf(const Dfa& content) {
  TP_ASSIGN_OR_RETURN(Dfa escaped, Escaped(content));
  return pool_.Sequence({pool_.Literal("\""), pool_.Automatic(std::move(escaped))});
}

absl::StatusOr<JsonPieces::Id> JsonPieces::StringOfSet(const CharSet& set, uint32_t min, uint32_t max) {
  Nfa nfa;
  const uint32_t loop = nfa.Add(), end = nfa.Add();
  set.AddTo(nfa, loop, loop);
  nfa.Epsilon(loop, end);
  TP_ASSIGN_OR_RETURN(const Dfa content, Determinize(nfa, loop, end, pool_.budget()));
  TP_ASSIGN_OR_RETURN(Dfa escaped, Escaped(content));
  return pool_.Sequence({pool_.Literal("\""), pool_.Counted(std::move(escaped), min, max)});
}

JsonPieces::Id JsonPieces::Integer() {
  if (integer_) return *integer_;
  static const auto* dfa = new Dfa(FixedRegex("-?(0|[1-9][0-9]{0,17})"));
  static_assert(kIntegerDigits == 18);
  return Memo(integer_, pool_.Automatic(*dfa));
}

JsonPieces::Id JsonPieces::Number() {
  if (number_) return *number_;
  static const auto* dfa =
      new Dfa(FixedRegex(R"(-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,16})?([eE][+-]?[0-9]{1,2})?)"));
  static_assert(kFractionDigits == 16 && kExponentDigits == 2);
  return Memo(number_, pool_.Automatic(*dfa));
}

JsonPieces::Id JsonPieces::Value() {
  if (!value_) {
    value_ = pool_.AddRule("value");
    pool_.DefineRule(*value_, pool_.Choice({Object(), Array(), String(), Number(), pool_.Literal("true"),
                                            pool_.Literal("false"), pool_.Literal("null")}));
  }
  return pool_.Rule(*value_);
}

JsonPieces::Id JsonPieces::Object() {
  if (!object_) {
    object_ = pool_.AddRule("object");
    const Id member = pool_.Sequence({String(), Punctuation(':'), Value()});
    const Id more = pool_.Repeat(pool_.Sequence({Punctuation(','), member}), 0, UINT32_MAX);
    pool_.DefineRule(
        *object_,
        pool_.Sequence({Punctuation('{'),
                        pool_.Choice({pool_.Literal("}"), pool_.Sequence({member, more, Close('}')})})}));
  }
  return pool_.Rule(*object_);
}

JsonPieces::Id JsonPieces::Array() {
  if (!array_) {
    array_ = pool_.AddRule("array");
    const Id more = pool_.Repeat(pool_.Sequence({Punctuation(','), Value()}), 0, UINT32_MAX);
    pool_.DefineRule(
        *array_,
        pool_.Sequence({Punctuation('['),
                        pool_.Choice({pool_.Literal("]"), pool_.Sequence({Value(), more, Close(']')})})}));
  }
  return pool_.Rule(*array_);
}

}  // namespace tidepool::structured
