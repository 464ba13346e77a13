#include "server/structured/regex.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/strings/utf8.h"

namespace tidepool::structured {
namespace {

constexpr uint32_t kNoLimit = UINT32_MAX;

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::optional<CharSet> PosixClass(std::string_view name) {
  const auto of = [](std::initializer_list<std::pair<char, char>> ranges) {
    CharSet out;
    for (const auto& [lo, hi] : ranges) out.Add(static_cast<uint8_t>(lo), static_cast<uint8_t>(hi));
    return out;
  };
  if (name == "alpha") return of({{'A', 'Z'}, {'a', 'z'}});
  if (name == "digit") return of({{'0', '9'}});
  if (name == "alnum") return of({{'0', '9'}, {'A', 'Z'}, {'a', 'z'}});
  if (name == "upper") return of({{'A', 'Z'}});
  if (name == "lower") return of({{'a', 'z'}});
  if (name == "space") return of({{'\t', '\r'}, {' ', ' '}});
  if (name == "blank") return of({{'\t', '\t'}, {' ', ' '}});
  if (name == "punct") return of({{'!', '/'}, {':', '@'}, {'[', '`'}, {'{', '~'}});
  if (name == "xdigit") return of({{'0', '9'}, {'A', 'F'}, {'a', 'f'}});
  if (name == "word") return of({{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}});
  if (name == "cntrl") return of({{0, 0x1F}, {0x7F, 0x7F}});
  if (name == "print") return of({{' ', '~'}});
  if (name == "graph") return of({{'!', '~'}});
  if (name == "ascii") return of({{0, 0x7F}});
  return std::nullopt;
}

}  // namespace

class RegexParser {
 public:
  RegexParser(std::string_view text, const RegexSyntax& syntax, Budget& budget)
      : text_(text), budget_(budget) {
    out_.syntax_ = syntax;
    flags_.i = syntax.case_insensitive;
  }

  absl::StatusOr<Regex> Run() {
    if (text_.size() > budget_.limits().source_bytes_max) {
      return absl::InvalidArgumentError(absl::StrCat("the pattern is longer than the limit of ",
                                                     budget_.limits().source_bytes_max, " bytes"));
    }
    if (!utf8::IsValid(text_)) return absl::InvalidArgumentError("the pattern is not valid UTF-8");
    TP_ASSIGN_OR_RETURN(out_.root_, Choice(0));
    if (at_ < text_.size()) return Error("unmatched ')'");
    return std::move(out_);
  }

 private:
  using Kind = Regex::Kind;
  struct Flags {
    bool i = false, s = false;
  };

  absl::Status Error(std::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat("pattern, byte ", at_, ": ", std::string(what)));
  }
  absl::Status Unimplemented(std::string_view what) const {
    return absl::UnimplementedError(
        absl::StrCat("pattern, byte ", at_, ": ", std::string(what),
                     " cannot be matched by a finite automaton and is not supported"));
  }
  bool More() const { return at_ < text_.size(); }
  bool Ahead(std::string_view what) const { return text_.substr(at_, what.size()) == what; }
  bool Take(std::string_view what) {
    if (!Ahead(what)) return false;
    at_ += what.size();
    return true;
  }
  uint32_t Add(Regex::Node node) {
    out_.nodes_.push_back(std::move(node));
    return static_cast<uint32_t>(out_.nodes_.size() - 1);
  }
  uint32_t AddSet(CharSet set) {
    Regex::Node node;
    node.kind = Kind::kSet;
    node.set = std::move(set);
    return Add(std::move(node));
  }
  // A set as the pattern means it: with other cases under (?i).
  CharSet Fold(CharSet set) const { return flags_.i ? set.CaseFolded() : set; }

  absl::StatusOr<uint32_t> Choice(int depth) {
    if (depth > budget_.limits().nesting_max) {
      return absl::InvalidArgumentError(
          absl::StrCat("the pattern is nested deeper than the limit of ", budget_.limits().nesting_max));
    }
    const Flags outer = flags_;
    Regex::Node node;
    node.kind = Kind::kChoice;
    do {
      TP_ASSIGN_OR_RETURN(const uint32_t part, Sequence(depth));
      node.parts.push_back(part);
    } while (Take("|"));
    flags_ = outer;
    if (node.parts.size() == 1) return node.parts[0];
    return Add(std::move(node));
  }

  absl::StatusOr<uint32_t> Sequence(int depth) {
    Regex::Node node;
    node.kind = Kind::kSequence;
    while (More() && text_[at_] != '|' && text_[at_] != ')') {
      TP_RETURN_IF_ERROR(budget_.Work());
      TP_ASSIGN_OR_RETURN(std::optional<uint32_t> atom, Atom(depth));
      if (!atom) continue;  // a flag
      TP_ASSIGN_OR_RETURN(const uint32_t part, Quantifiers(*atom));
      node.parts.push_back(part);
    }
    if (node.parts.empty()) return Add({});
    if (node.parts.size() == 1) return node.parts[0];
    return Add(std::move(node));
  }

  // {m}, {m,}, {m,n}, also {,n}; false (nothing taken) where the brace is a literal.
  absl::StatusOr<bool> Braces(uint32_t& min, uint32_t& max) {
    size_t at = at_ + 1;
    const auto number = [&](uint64_t& out) {
      const size_t begin = at;
      out = 0;
      while (at < text_.size() && text_[at] >= '0' && text_[at] <= '9') {
        out = std::min<uint64_t>(out * 10 + static_cast<uint64_t>(text_[at] - '0'), kNoLimit);
        ++at;
      }
      return at > begin;
    };
    uint64_t low = 0, high = 0;
    const bool has_low = number(low);
    bool has_high = false, comma = false;
    if (at < text_.size() && text_[at] == ',') {
      comma = true;
      ++at;
      has_high = number(high);
    }
    if (at >= text_.size() || text_[at] != '}' || (!has_low && !has_high)) return false;
    if (!has_low && out_.syntax_.ecma) return false;
    if (!comma) high = low;
    const uint64_t limit = budget_.limits().repeat_max;
    if (low > limit || (has_high && high > limit)) {
      return absl::InvalidArgumentError(
          absl::StrCat("pattern, byte ", at_, ": a repetition above the limit of ", limit));
    }
    if (comma && !has_high) high = kNoLimit;
    if (low > high) return Error("a repetition {m,n} with m > n");
    min = static_cast<uint32_t>(low);
    max = static_cast<uint32_t>(high);
    at_ = at + 1;
    return true;
  }

  absl::StatusOr<uint32_t> Quantifiers(uint32_t atom) {
    for (int count = 0; More(); ++count) {
      uint32_t min = 0, max = kNoLimit;
      const char c = text_[at_];
      if (c == '*' || c == '+' || c == '?') {
        ++at_;
        if (c == '+') min = 1;
        if (c == '?') max = 1;
      } else if (c == '{') {
        TP_ASSIGN_OR_RETURN(const bool taken, Braces(min, max));
        if (!taken) return atom;
      } else {
        return atom;
      }
      if (count > 0) return Error("a repetition of a repetition; put parentheses round the inner one");
      Take("?");
      if (More() && text_[at_] == '+') return Unimplemented("a possessive repetition");
      const Kind kind = out_.nodes_[atom].kind;
      if (kind == Kind::kBegin || kind == Kind::kEnd) return Error("a repeated anchor");
      Regex::Node node;
      node.kind = Kind::kRepeat;
      node.parts = {atom};
      node.min = min;
      node.max = max;
      atom = Add(std::move(node));
    }
    return atom;
  }

  uint32_t Anchor(Kind kind) {
    out_.anchors_ = true;
    Regex::Node node;
    node.kind = kind;
    return Add(std::move(node));
  }

  // nullopt: a flag group, which stands for nothing.
  absl::StatusOr<std::optional<uint32_t>> Atom(int depth) {
    const char c = text_[at_];
    switch (c) {
      case '(':
        return Group(depth);
      case '[': {
        TP_ASSIGN_OR_RETURN(CharSet set, Class());
        return AddSet(std::move(set));
      }
      case '.': {
        ++at_;
        CharSet set = CharSet::Any();
        if (!flags_.s) {
          CharSet breaks = CharSet::Of('\n');
          if (out_.syntax_.ecma) {
            breaks.Add('\r', '\r');
            breaks.Add(0x2028, 0x2029);
          }
          set = set.Without(breaks);
        }
        return AddSet(std::move(set));
      }
      case '^':
        ++at_;
        return Anchor(Kind::kBegin);
      case '$':
        ++at_;
        return Anchor(Kind::kEnd);
      case '*':
      case '+':
      case '?':
        return Error("nothing to repeat");
      case '\\': {
        if (Take("\\A")) return Anchor(Kind::kBegin);
        if (Take("\\z") || Take("\\Z")) return Anchor(Kind::kEnd);
        if (Ahead("\\b") || Ahead("\\B")) return Unimplemented("a word boundary");
        if (Ahead("\\k") || (at_ + 1 < text_.size() && text_[at_ + 1] >= '1' && text_[at_ + 1] <= '9')) {
          return Unimplemented("a back reference");
        }
        TP_ASSIGN_OR_RETURN(CharSet set, Escape(false));
        return AddSet(Fold(std::move(set)));
      }
      default:
        return AddSet(Fold(CharSet::Of(utf8::Next(text_, at_))));
    }
  }

  absl::StatusOr<std::optional<uint32_t>> Group(int depth) {
    const Flags outer = flags_;
    for (const std::string_view look : {"(?=", "(?!", "(?<=", "(?<!"}) {
      if (Ahead(look)) return Unimplemented("look-around");
    }
    if (Ahead("(?>")) return Unimplemented("an atomic group");
    if (Ahead("(?(")) return Unimplemented("a conditional group");
    if (Ahead("(?P=") || Ahead("(?P>") || Ahead("(?R") || Ahead("(?&")) {
      return Unimplemented("a reference to a group");
    }
    if (Take("(?#")) {
      const size_t end = text_.find(')', at_);
      if (end == text_.npos) return Error("an unclosed comment");
      at_ = end + 1;
      return std::nullopt;
    }
    if (Take("(?P<") || Take("(?<")) {
      const size_t end = text_.find('>', at_);
      if (end == text_.npos || end == at_) return Error("a group without a name");
      at_ = end + 1;
    } else if (Take("(?")) {
      bool value = true;
      for (;; ++at_) {
        if (!More()) return Error("an unclosed group");
        const char c = text_[at_];
        if (c == '-') {
          value = false;
        } else if (c == 'i') {
          flags_.i = value;
        } else if (c == 's') {
          flags_.s = value;
        } else if (c == 'u' && value) {
          // Unicode: always.
        } else if (c == ':' || c == ')') {
          break;
        } else {
          return Unimplemented(absl::StrCat("the flag or group '(?", std::string(1, c), "'"));
        }
      }
      // Until the end of the group that holds it: Choice restores.
      if (Take(")")) return std::nullopt;
      ++at_;
    } else {
      ++at_;
    }
    TP_ASSIGN_OR_RETURN(const uint32_t inner, Choice(depth + 1));
    flags_ = outer;
    if (!Take(")")) return Error("an unclosed group");
    return inner;
  }

  absl::StatusOr<uint32_t> Hex(size_t digits) {
    uint32_t value = 0;
    for (size_t i = 0; i < digits; ++i) {
      const int digit = More() ? HexValue(text_[at_]) : -1;
      if (digit < 0) return Error("a malformed hexadecimal escape");
      value = value * 16 + static_cast<uint32_t>(digit);
      ++at_;
    }
    return value;
  }
  absl::StatusOr<uint32_t> BracedHex() {
    uint32_t value = 0;
    size_t digits = 0;
    for (; More() && HexValue(text_[at_]) >= 0 && digits < 8; ++digits, ++at_) {
      value = value * 16 + static_cast<uint32_t>(HexValue(text_[at_]));
      if (value > 0x10FFFF) return Error("a code point above U+10FFFF");
    }
    if (digits == 0 || !Take("}")) return Error("a malformed hexadecimal escape");
    return value;
  }

  // The set that an escape stands for; at the backslash.
  absl::StatusOr<CharSet> Escape(bool in_class) {
    ++at_;
    if (!More()) return Error("a trailing backslash");
    const bool ecma = out_.syntax_.ecma;
    const char c = text_[at_];
    if (static_cast<uint8_t>(c) >= 0x80) return CharSet::Of(utf8::Next(text_, at_));
    ++at_;
    switch (c) {
      case 'd':
        return CharSet::Digit();
      case 'D':
        return CharSet::Digit().Negated();
      case 'w':
        return CharSet::Word();
      case 'W':
        return CharSet::Word().Negated();
      case 's':
        return CharSet::Space(ecma);
      case 'S':
        return CharSet::Space(ecma).Negated();
      case 'n':
        return CharSet::Of('\n');
      case 'r':
        return CharSet::Of('\r');
      case 't':
        return CharSet::Of('\t');
      case 'f':
        return CharSet::Of('\f');
      case 'v':
        return CharSet::Of('\v');
      case '0':
        if (More() && text_[at_] >= '0' && text_[at_] <= '9') return Error("an octal escape");
        return CharSet::Of(0);
      case 'b':
        if (in_class) return CharSet::Of('\b');
        break;
      case 'a':
        if (!ecma) return CharSet::Of('\a');
        break;
      case 'e':
        if (!ecma) return CharSet::Of(0x1B);
        break;
      case 'c':
        if (More() && ((text_[at_] | 0x20) >= 'a' && (text_[at_] | 0x20) <= 'z')) {
          return CharSet::Of(static_cast<uint32_t>(text_[at_++] & 0x1F));
        }
        return Error("a malformed control escape");
      case 'x': {
        if (Take("{")) {
          TP_ASSIGN_OR_RETURN(const uint32_t cp, BracedHex());
          return CharSet::Of(cp);
        }
        TP_ASSIGN_OR_RETURN(const uint32_t cp, Hex(2));
        return CharSet::Of(cp);
      }
      case 'u': {
        if (Take("{")) {
          TP_ASSIGN_OR_RETURN(const uint32_t cp, BracedHex());
          return CharSet::Of(cp);
        }
        TP_ASSIGN_OR_RETURN(uint32_t cp, Hex(4));
        if (cp >= 0xD800 && cp < 0xDC00 && Take("\\u")) {
          TP_ASSIGN_OR_RETURN(const uint32_t low, Hex(4));
          if (low < 0xDC00 || low > 0xDFFF) return Error("half a surrogate pair");
          cp = 0x10000 + ((cp - 0xD800) << 10) + (low - 0xDC00);
        }
        return CharSet::Of(cp);
      }
      case 'p':
      case 'P': {
        std::string_view name;
        if (Take("{")) {
          const size_t end = text_.find('}', at_);
          if (end == text_.npos) return Error("an unclosed property");
          name = text_.substr(at_, end - at_);
          at_ = end + 1;
        } else if (!ecma && More()) {
          name = text_.substr(at_++, 1);
        }
        bool negated = c == 'P';
        if (!name.empty() && name[0] == '^') {
          negated = !negated;
          name.remove_prefix(1);
        }
        std::optional<CharSet> set = CharSet::Property(name);
        if (!set) {
          return absl::UnimplementedError(absl::StrCat("pattern, byte ", at_, ": the Unicode property '",
                                                       std::string(name), "' is not supported"));
        }
        return negated ? set->Negated() : *std::move(set);
      }
      default:
        break;
    }
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (letter) return Error(absl::StrCat("an unknown escape '\\", std::string(1, c), "'"));
    return CharSet::Of(static_cast<uint8_t>(c));
  }

  absl::StatusOr<CharSet> Class() {
    const bool ecma = out_.syntax_.ecma;
    const size_t begin = at_++;
    const bool negated = Take("^");
    CharSet set;
    bool first = true;
    while (true) {
      if (!More()) {
        at_ = begin;
        return Error("an unclosed character class");
      }
      TP_RETURN_IF_ERROR(budget_.Work(set.ranges().size() + 1));
      if (text_[at_] == ']' && (!first || ecma)) break;
      first = false;
      if (!ecma && Ahead("[:")) {
        const size_t end = text_.find(":]", at_);
        if (end != text_.npos) {
          std::string_view name = text_.substr(at_ + 2, end - at_ - 2);
          const bool inverse = !name.empty() && name[0] == '^';
          if (inverse) name.remove_prefix(1);
          const std::optional<CharSet> posix = PosixClass(name);
          if (!posix) return Error(absl::StrCat("an unknown class '[:", std::string(name), ":]'"));
          set.Add(inverse ? posix->Negated() : *posix);
          at_ = end + 2;
          continue;
        }
      }
      TP_ASSIGN_OR_RETURN(const CharSet low, ClassAtom());
      const bool single = low.Size() == 1;
      if (single && Ahead("-") && at_ + 1 < text_.size() && text_[at_ + 1] != ']') {
        const size_t dash = at_++;
        TP_ASSIGN_OR_RETURN(const CharSet high, ClassAtom());
        if (high.Size() == 1) {
          const uint32_t lo = low.ranges()[0].lo, hi = high.ranges()[0].lo;
          if (lo > hi) {
            at_ = dash;
            return Error("a range whose end precedes its begin");
          }
          set.Add(lo, hi);
          continue;
        }
        // [a-\d]: the dash stands for itself.
        set.Add('-', '-');
        set.Add(high);
      }
      set.Add(low);
    }
    ++at_;
    set = Fold(std::move(set));
    return negated ? set.Negated() : set;
  }

  absl::StatusOr<CharSet> ClassAtom() {
    if (!More()) return Error("an unclosed character class");
    if (text_[at_] == '\\') return Escape(true);
    return CharSet::Of(utf8::Next(text_, at_));
  }

  const std::string_view text_;
  Budget& budget_;
  Regex out_;
  size_t at_ = 0;
  Flags flags_;
};

absl::StatusOr<Regex> Regex::Parse(std::string_view pattern, const RegexSyntax& syntax, Budget& budget) {
  return RegexParser(pattern, syntax, budget).Run();
}

absl::Status Regex::Emit(uint32_t index, Nfa& nfa, uint32_t from, uint32_t to, Budget& budget) const {
  const Node& node = nodes_[index];
  TP_RETURN_IF_ERROR(budget.Work(4));
  TP_RETURN_IF_ERROR(budget.CheckNfa(nfa.states.size()));
  switch (node.kind) {
    case Kind::kEmpty:
      nfa.Epsilon(from, to);
      return absl::OkStatus();
    case Kind::kSet:
      node.set.AddTo(nfa, from, to);
      return budget.Work(node.set.ranges().size());
    case Kind::kBegin:
    case Kind::kEnd:
      passes_.push_back({from, to, node.kind == Kind::kBegin});
      return absl::OkStatus();
    case Kind::kSequence: {
      uint32_t at = from;
      for (size_t i = 0; i < node.parts.size(); ++i) {
        const uint32_t next = i + 1 == node.parts.size() ? to : nfa.Add();
        TP_RETURN_IF_ERROR(Emit(node.parts[i], nfa, at, next, budget));
        at = next;
      }
      return absl::OkStatus();
    }
    case Kind::kChoice:
      for (const uint32_t part : node.parts) {
        // Own ends, so that loops of one branch do not leak into another.
        const uint32_t begin = nfa.Add(), end = nfa.Add();
        nfa.Epsilon(from, begin);
        nfa.Epsilon(end, to);
        TP_RETURN_IF_ERROR(Emit(part, nfa, begin, end, budget));
      }
      return absl::OkStatus();
    case Kind::kRepeat: {
      uint32_t at = nfa.Add();
      nfa.Epsilon(from, at);
      for (uint32_t i = 0; i < node.min; ++i) {
        const uint32_t next = nfa.Add();
        TP_RETURN_IF_ERROR(Emit(node.parts[0], nfa, at, next, budget));
        at = next;
      }
      if (node.max == kNoLimit) {
        const uint32_t begin = nfa.Add(), end = nfa.Add();
        nfa.Epsilon(at, begin);
        TP_RETURN_IF_ERROR(Emit(node.parts[0], nfa, begin, end, budget));
        nfa.Epsilon(end, begin);
        nfa.Epsilon(begin, to);
        return absl::OkStatus();
      }
      for (uint32_t i = node.min; i < node.max; ++i) {
        nfa.Epsilon(at, to);
        const uint32_t next = nfa.Add();
        TP_RETURN_IF_ERROR(Emit(node.parts[0], nfa, at, next, budget));
        at = next;
      }
      nfa.Epsilon(at, to);
      return absl::OkStatus();
    }
  }
  return absl::InternalError("unknown regex node");
}

absl::StatusOr<Dfa> Regex::ToDfa(Budget& budget) const {
  Nfa nfa;
  const uint32_t start = nfa.Add(), begin = nfa.Add(), end = nfa.Add(), last = nfa.Add();
  nfa.Epsilon(start, begin);
  nfa.Epsilon(end, last);
  if (syntax_.search) {
    CharSet::Any().AddTo(nfa, start, start);
    CharSet::Any().AddTo(nfa, last, last);
  }
  passes_.clear();
  TP_RETURN_IF_ERROR(Emit(root_, nfa, begin, end, budget));
  if (passes_.empty()) return Determinize(nfa, start, last, budget);

  // Four copies: 0 nothing read yet; 1 something read; 2 something read, and the end was asserted; 3 nothing
  // read and the end was asserted.
  const auto n = static_cast<uint32_t>(nfa.states.size());
  TP_RETURN_IF_ERROR(budget.Work(size_t{n} * 64));
  Nfa layered;
  layered.states.resize(size_t{n} * 4 + 1);
  const uint32_t final = n * 4;
  for (uint32_t s = 0; s < n; ++s) {
    for (const Nfa::Edge& e : nfa.states[s].edges) {
      layered.Connect(s, e.lo, e.hi, n + e.to);
      layered.Connect(n + s, e.lo, e.hi, n + e.to);
    }
    for (const uint32_t to : nfa.states[s].epsilon) {
      for (uint32_t layer = 0; layer < 4; ++layer) layered.Epsilon(layer * n + s, layer * n + to);
    }
  }
  for (const Anchor& pass : passes_) {
    if (pass.begin) {
      layered.Epsilon(pass.from, pass.to);
      layered.Epsilon(3 * n + pass.from, 3 * n + pass.to);
    } else {
      layered.Epsilon(pass.from, 3 * n + pass.to);
      layered.Epsilon(n + pass.from, 2 * n + pass.to);
      layered.Epsilon(2 * n + pass.from, 2 * n + pass.to);
      layered.Epsilon(3 * n + pass.from, 3 * n + pass.to);
    }
  }
  for (uint32_t layer = 0; layer < 4; ++layer) layered.Epsilon(layer * n + last, final);
  return Determinize(layered, start, final, budget);
}

std::optional<Regex::Repetition> Regex::AsRepetition() const {
  const Node* node = &nodes_[root_];
  bool begin = !syntax_.search, end = !syntax_.search;
  if (node->kind == Kind::kSequence) {
    size_t first = 0, last = node->parts.size();
    for (; first < last && nodes_[node->parts[first]].kind == Kind::kBegin; ++first) begin = true;
    for (; last > first && nodes_[node->parts[last - 1]].kind == Kind::kEnd; --last) end = true;
    if (last - first != 1) return std::nullopt;
    node = &nodes_[node->parts[first]];
  }
  if (!begin || !end) return std::nullopt;
  Repetition out{{}, 1, 1};
  if (node->kind == Kind::kRepeat) {
    out.min = node->min;
    out.max = node->max;
    node = &nodes_[node->parts[0]];
  }
  if (node->kind != Kind::kSet || node->set.empty()) return std::nullopt;
  out.set = node->set;
  return out;
}

}  // namespace tidepool::structured
