#include "server/structured/ebnf.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/strings/utf8.h"

namespace tidepool::structured {
namespace {

using Id = ExpressionPool::Id;

class EbnfParser {
 public:
  EbnfParser(std::string_view text, ExpressionPool& pool) : text_(text), pool_(pool) {}

  absl::StatusOr<Id> Run() {
    const size_t limit = pool_.budget().limits().source_bytes_max;
    if (text_.size() > limit) {
      return absl::InvalidArgumentError(
          absl::StrCat("the grammar is longer than the limit of ", limit, " bytes"));
    }
    if (!utf8::IsValid(text_)) return absl::InvalidArgumentError("the grammar is not valid UTF-8");
    for (SkipSpace(); More(); SkipSpace()) TP_RETURN_IF_ERROR(Rule());
    const auto root = rules_.find("root");
    if (root == rules_.end() || !root->second.defined) {
      return absl::InvalidArgumentError("the grammar has no rule 'root'");
    }
    const Entry* missing = nullptr;
    std::string name;
    for (const auto& [rule_name, entry] : rules_) {
      if (entry.defined || (missing != nullptr && missing->first_use <= entry.first_use)) continue;
      missing = &entry;
      name = rule_name;
    }
    if (missing != nullptr) {
      at_ = missing->first_use;
      return Error(absl::StrCat("the rule '", name, "' is not defined"));
    }
    return pool_.Rule(root->second.rule);
  }

 private:
  struct Entry {
    uint32_t rule = 0;
    bool defined = false;
    size_t first_use = 0;
  };

  absl::Status Error(std::string_view what) const {
    size_t line = 1, column = 1;
    for (size_t i = 0; i < std::min(at_, text_.size()); ++i) {
      if (text_[i] == '\n') {
        ++line;
        column = 1;
      } else {
        ++column;
      }
    }
    return absl::InvalidArgumentError(
        absl::StrCat("grammar, line ", line, ", column ", column, ": ", std::string(what)));
  }
  bool More() const { return at_ < text_.size(); }
  bool Take(std::string_view what) {
    if (text_.substr(at_, what.size()) != what) return false;
    at_ += what.size();
    return true;
  }
  void SkipSpace() {
    while (More()) {
      const char c = text_[at_];
      if (c == ' ' || c == '\t' || c == '\n' || c == '\r') {
        ++at_;
      } else if (c == '#') {
        const size_t end = text_.find('\n', at_);
        at_ = end == text_.npos ? text_.size() : end;
      } else {
        return;
      }
    }
  }
  static bool NameChar(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
  }
  std::string_view Name() {
    const size_t begin = at_;
    while (More() && NameChar(text_[at_])) ++at_;
    return text_.substr(begin, at_ - begin);
  }
  Entry& RuleOf(std::string_view name) {
    const auto [it, fresh] = rules_.try_emplace(std::string(name));
    if (fresh) {
      it->second.rule = pool_.AddRule(std::string(name));
      it->second.first_use = at_;
      pool_.MergeRegular(it->second.rule);
    }
    return it->second;
  }

  absl::Status Rule() {
    const size_t begin = at_;
    const std::string_view name = Name();
    if (name.empty()) return Error("expected the name of a rule");
    Entry& entry = RuleOf(name);
    if (entry.defined) {
      at_ = begin;
      return Error(absl::StrCat("the rule '", std::string(name), "' is defined twice"));
    }
    entry.defined = true;
    const uint32_t rule = entry.rule;
    SkipSpace();
    if (!Take("::=")) return Error("expected '::='");
    TP_ASSIGN_OR_RETURN(const Id body, Choice(0));
    pool_.DefineRule(rule, body);
    return absl::OkStatus();
  }

  absl::StatusOr<Id> Choice(int depth) {
    if (depth > pool_.budget().limits().nesting_max) {
      return Error(absl::StrCat("nested deeper than the limit of ", pool_.budget().limits().nesting_max));
    }
    std::vector<Id> options;
    do {
      TP_ASSIGN_OR_RETURN(const Id option, Sequence(depth));
      options.push_back(option);
    } while (Take("|"));
    return pool_.Choice(std::move(options));
  }

  absl::StatusOr<Id> Sequence(int depth) {
    std::vector<Id> parts;
    while (true) {
      SkipSpace();
      TP_RETURN_IF_ERROR(pool_.budget().Work(8));
      if (!More() || text_[at_] == '|' || text_[at_] == ')') break;
      if (NameChar(text_[at_])) {
        const size_t begin = at_;
        const std::string_view name = Name();
        const size_t behind = at_;
        SkipSpace();
        const bool next_rule = depth == 0 && text_.substr(at_, 3) == "::=";
        at_ = next_rule ? begin : behind;
        if (next_rule) break;
        at_ = begin;
        const uint32_t rule = RuleOf(name).rule;
        at_ = behind;
        parts.push_back(pool_.Rule(rule));
      } else {
        TP_ASSIGN_OR_RETURN(const Id atom, Atom(depth));
        parts.push_back(atom);
      }
      TP_ASSIGN_OR_RETURN(parts.back(), Repeats(parts.back()));
    }
    return pool_.Sequence(std::move(parts));
  }

  absl::StatusOr<Id> Repeats(Id atom) {
    while (true) {
      // Blanks may stand before the operator, a line end may not: it could be another rule's.
      size_t ahead = at_;
      while (ahead < text_.size() && (text_[ahead] == ' ' || text_[ahead] == '\t')) ++ahead;
      const char c = ahead < text_.size() ? text_[ahead] : '\0';
      if (c != '*' && c != '+' && c != '?' && c != '{') return atom;
      at_ = ahead + 1;
      if (c == '*') {
        atom = pool_.Repeat(atom, 0, UINT32_MAX);
      } else if (c == '+') {
        atom = pool_.Repeat(atom, 1, UINT32_MAX);
      } else if (c == '?') {
        atom = pool_.Repeat(atom, 0, 1);
      } else {
        TP_ASSIGN_OR_RETURN(atom, Braces(atom));
      }
      TP_RETURN_IF_ERROR(pool_.status());
    }
  }

  bool Number(uint32_t& out) {
    const size_t begin = at_;
    uint64_t value = 0;
    while (More() && text_[at_] >= '0' && text_[at_] <= '9') {
      value = std::min<uint64_t>(value * 10 + static_cast<uint64_t>(text_[at_] - '0'), UINT32_MAX - 1);
      ++at_;
    }
    out = static_cast<uint32_t>(value);
    return at_ > begin;
  }

  absl::StatusOr<Id> Braces(Id atom) {
    uint32_t min = 0, max = UINT32_MAX;
    SkipSpace();
    const bool has_min = Number(min);
    SkipSpace();
    if (Take(",")) {
      SkipSpace();
      if (!Number(max)) max = UINT32_MAX;
      SkipSpace();
    } else {
      if (!has_min) return Error("expected a number");
      max = min;
    }
    if (!Take("}")) return Error("expected '}'");
    const uint32_t limit = pool_.budget().limits().repeat_max;
    if (min > limit || (max != UINT32_MAX && max > limit)) {
      return Error(absl::StrCat("a repetition above the limit of ", limit));
    }
    if (min > max) return Error("a repetition {m,n} with m > n");
    return pool_.Repeat(atom, min, max);
  }

  absl::StatusOr<Id> Atom(int depth) {
    const char c = text_[at_];
    if (c == '"') {
      ++at_;
      std::string bytes;
      while (true) {
        if (!More() || text_[at_] == '\n') return Error("an unclosed literal");
        if (Take("\"")) break;
        TP_RETURN_IF_ERROR(Character(bytes));
      }
      return pool_.Literal(bytes);
    }
    if (c == '[') return Class();
    if (c == '.') {
      ++at_;
      return pool_.Set(CharSet::Any());
    }
    if (c == '(') {
      ++at_;
      TP_ASSIGN_OR_RETURN(const Id inner, Choice(depth + 1));
      SkipSpace();
      if (!Take(")")) return Error("expected ')'");
      return inner;
    }
    if (c == '<' || c == '!') {
      return absl::UnimplementedError(
          absl::StrCat(Error("").message(), "references to vocabulary tokens are not supported"));
    }
    return Error("expected a rule's name, a literal, a character class or a group");
  }

  // One character or escape; \x80 and above is that code point, as in llama.cpp.
  absl::Status Character(std::string& out) {
    TP_ASSIGN_OR_RETURN(const uint32_t cp, CodePoint());
    utf8::Append(cp, out);
    return absl::OkStatus();
  }

  absl::StatusOr<uint32_t> CodePoint() {
    if (text_[at_] != '\\') return utf8::Next(text_, at_);
    ++at_;
    if (!More()) return Error("a trailing backslash");
    const char c = text_[at_++];
    size_t digits = 0;
    switch (c) {
      case 'n':
        return uint32_t{'\n'};
      case 'r':
        return uint32_t{'\r'};
      case 't':
        return uint32_t{'\t'};
      case '"':
      case '\\':
      case '[':
      case ']':
      case '-':
      case '^':
      case '\'':
      case '/':
        return static_cast<uint32_t>(c);
      case 'x':
        digits = 2;
        break;
      case 'u':
        digits = 4;
        break;
      case 'U':
        digits = 8;
        break;
      default:
        --at_;
        return Error("an unknown escape");
    }
    uint32_t value = 0;
    for (size_t i = 0; i < digits; ++i, ++at_) {
      const char h = More() ? text_[at_] : '\0';
      const int digit = h >= '0' && h <= '9'   ? h - '0'
                        : h >= 'a' && h <= 'f' ? h - 'a' + 10
                        : h >= 'A' && h <= 'F' ? h - 'A' + 10
                                               : -1;
      if (digit < 0 || value > 0x10FFFF) return Error("a malformed escape");
      value = value * 16 + static_cast<uint32_t>(digit);
    }
    if (value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) {
      return Error("an escape that is no Unicode character");
    }
    return value;
  }

  absl::StatusOr<Id> Class() {
    ++at_;
    const bool negated = Take("^");
    std::vector<CharSet::Range> ranges;
    while (true) {
      if (!More()) return Error("an unclosed character class");
      if (Take("]")) break;
      TP_RETURN_IF_ERROR(pool_.budget().Work(8));
      TP_ASSIGN_OR_RETURN(const uint32_t lo, CodePoint());
      uint32_t hi = lo;
      if (at_ + 1 < text_.size() && text_[at_] == '-' && text_[at_ + 1] != ']') {
        ++at_;
        TP_ASSIGN_OR_RETURN(hi, CodePoint());
        if (lo > hi) return Error("a range whose end precedes its begin");
      }
      ranges.push_back({lo, hi});
    }
    CharSet set = CharSet::OfRanges(std::move(ranges));
    return pool_.Set(negated ? set.Negated() : std::move(set));
  }

  const std::string_view text_;
  ExpressionPool& pool_;
  size_t at_ = 0;
  absl::flat_hash_map<std::string, Entry> rules_;
};

}  // namespace

absl::StatusOr<ExpressionPool::Id> ParseEbnf(std::string_view grammar, ExpressionPool& pool) {
  return EbnfParser(grammar, pool).Run();
}

}  // namespace tidepool::structured
