#include "server/model/template/jinja_lexer.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>

#include "absl/strings/str_cat.h"
#include "server/model/strings/unicode.h"
#include "server/model/strings/utf8.h"
#include "server/model/template/jinja_value.h"

namespace tidepool::jinja {

void SyntaxError(int line, std::string message) {
  Fail("TemplateSyntaxError", absl::StrCat("line ", line, ": ", message));
}

namespace {

// \r\n and \r read as \n, and one newline at the very end is dropped.
std::string NormalizeNewlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out.push_back('\n');
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out.push_back(source[i]);
    }
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string source) : src_(std::move(source)) {}

  std::vector<Token> Run() {
    while (pos_ < src_.size()) {
      const size_t tag = FindTag(pos_);
      if (tag == src_.npos) {
        Text(src_.substr(pos_));
        break;
      }
      const char kind = src_[tag + 1];
      size_t inside = tag + 2;
      char sign = 0;
      if (inside < src_.size() && (src_[inside] == '-' || src_[inside] == '+')) sign = src_[inside];
      // `{{+x}}` is a sign of the expression, not of the tag, only for variables.
      if (sign == '+' && kind == '{') sign = 0;
      if (sign != 0) ++inside;
      Text(CutBefore(src_.substr(pos_, tag - pos_), sign, kind == '{'));
      pos_ = inside;
      if (kind == '#') {
        Comment();
      } else if (kind == '{') {
        Emit(TokenKind::kVariableBegin, "{{");
        Inside("}}", TokenKind::kVariableEnd);
      } else if (const auto raw = MatchRawBegin()) {
        pos_ = *raw;
        Raw();
      } else {
        Emit(TokenKind::kBlockBegin, "{%");
        Inside("%}", TokenKind::kBlockEnd);
      }
    }
    Emit(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  size_t FindTag(size_t from) const {
    for (size_t at = src_.find('{', from); at != src_.npos; at = src_.find('{', at + 1)) {
      if (at + 1 < src_.size() && (src_[at + 1] == '{' || src_[at + 1] == '%' || src_[at + 1] == '#'))
        return at;
    }
    return src_.npos;
  }

  void Emit(TokenKind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }

  void CountLines(std::string_view consumed) {
    line_ += static_cast<int>(std::count(consumed.begin(), consumed.end(), '\n'));
  }

  // The lines of a text that is cut are still counted: `original` covers them.
  void Text(std::string_view text) {
    if (!text.empty()) Emit(TokenKind::kText, std::string(text));
    line_ += pending_lines_;
    pending_lines_ = 0;
  }

  // White space control of the text before a tag.
  std::string_view CutBefore(std::string text, char sign, bool variable) {
    pending_lines_ = static_cast<int>(std::count(text.begin(), text.end(), '\n'));
    before_ = std::move(text);
    std::string_view view = before_;
    if (sign == '-') return unicode::Strip(view, false, true);
    if (sign == '+' || variable) return view;
    // lstrip_blocks: from the last newline (or the beginning, if that begins a line) to the tag.
    const size_t newline = view.rfind('\n');
    const size_t line_begin = newline == view.npos ? 0 : newline + 1;
    if (line_begin == 0 && !line_starting_) return view;
    if (unicode::Strip(view.substr(line_begin), true, true).empty()) return view.substr(0, line_begin);
    return view;
  }

  // Behind a closing delimiter that begins at `close`: `-` takes all white space, a block takes one newline.
  void After(size_t close, size_t delimiter_end, char sign, bool trim_newline) {
    size_t end = delimiter_end;
    if (sign == '-') {
      while (end < src_.size()) {
        size_t next = end;
        if (!unicode::IsSpace(utf8::Next(src_, next))) break;
        end = next;
      }
    } else if (sign != '+' && trim_newline && end < src_.size() && src_[end] == '\n') {
      ++end;
    }
    CountLines(std::string_view(src_).substr(close, end - close));
    line_starting_ = src_[end - 1] == '\n';
    pos_ = end;
  }

  void Comment() {
    const size_t close = src_.find("#}", pos_);
    if (close == src_.npos) SyntaxError(line_, "comment without #}");
    const char sign =
        close > pos_ && (src_[close - 1] == '-' || src_[close - 1] == '+') ? src_[close - 1] : 0;
    After(pos_, close + 2, sign, true);
  }

  // The position behind `raw %}` if the block at pos_ is that.
  std::optional<size_t> MatchRawBegin() const {
    size_t at = pos_;
    const auto skip_space = [&] {
      while (at < src_.size() && std::isspace(static_cast<unsigned char>(src_[at])) != 0) ++at;
    };
    skip_space();
    if (src_.compare(at, 3, "raw") != 0) return std::nullopt;
    at += 3;
    skip_space();
    const bool minus = src_.compare(at, 1, "-") == 0;
    if (minus) ++at;
    if (src_.compare(at, 2, "%}") != 0) return std::nullopt;
    at += 2;
    if (minus) skip_space();
    return at;
  }

  void Raw() {
    line_starting_ = src_[pos_ - 1] == '\n';
    for (size_t open = src_.find("{%", pos_); open != src_.npos; open = src_.find("{%", open + 2)) {
      size_t at = open + 2;
      char sign = 0;
      if (at < src_.size() && (src_[at] == '-' || src_[at] == '+')) sign = src_[at++];
      while (at < src_.size() && std::isspace(static_cast<unsigned char>(src_[at])) != 0) ++at;
      if (src_.compare(at, 6, "endraw") != 0) continue;
      at += 6;
      while (at < src_.size() && std::isspace(static_cast<unsigned char>(src_[at])) != 0) ++at;
      char end_sign = 0;
      if (at < src_.size() && (src_[at] == '-' || src_[at] == '+')) end_sign = src_[at++];
      if (src_.compare(at, 2, "%}") != 0) continue;
      Text(CutBefore(src_.substr(pos_, open - pos_), sign, false));
      After(open, at + 2, end_sign, true);
      return;
    }
    SyntaxError(line_, "raw block without endraw");
  }

  void Inside(std::string_view close, TokenKind end_kind) {
    std::string brackets;
    while (true) {
      while (pos_ < src_.size() && std::isspace(static_cast<unsigned char>(src_[pos_])) != 0) {
        line_ += src_[pos_] == '\n';
        ++pos_;
      }
      if (pos_ >= src_.size()) SyntaxError(line_, absl::StrCat("tag without ", std::string(close)));
      if (brackets.empty()) {
        const char c = src_[pos_];
        const bool block = end_kind == TokenKind::kBlockEnd;
        const bool signed_close = (c == '-' || (c == '+' && block)) && src_.compare(pos_ + 1, 2, close) == 0;
        if (signed_close || src_.compare(pos_, 2, close) == 0) {
          Emit(end_kind, std::string(close));
          After(pos_, pos_ + (signed_close ? 3 : 2), signed_close ? c : 0, block);
          return;
        }
      }
      One(brackets);
    }
  }

  void One(std::string& brackets) {
    const char c = src_[pos_];
    size_t next = pos_;
    const uint32_t cp = utf8::Next(src_, next);
    if (c == '_' || unicode::IsLetter(cp)) {
      const size_t begin = pos_;
      while (pos_ < src_.size()) {
        size_t after = pos_;
        if (!unicode::IsWord(utf8::Next(src_, after))) break;
        pos_ = after;
      }
      Emit(TokenKind::kName, src_.substr(begin, pos_ - begin));
      return;
    }
    if (c >= '0' && c <= '9') return Number();
    if (c == '\'' || c == '"') return String(c);
    static constexpr std::array<std::string_view, 27> kOperators = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]",
        "(",  ")",  "{",  "}",  ">",  "<",  "=", ".", ":", "|", ",", ";", "@"};
    for (const std::string_view op : kOperators) {
      if (src_.compare(pos_, op.size(), op) != 0 || op == "@") continue;
      if (op == "(" || op == "[" || op == "{") brackets.push_back(op[0]);
      if (op == ")" || op == "]" || op == "}") {
        const char open = op == ")" ? '(' : op == "]" ? '[' : '{';
        if (brackets.empty() || brackets.back() != open) {
          SyntaxError(line_, absl::StrCat("unexpected '", std::string(op), "'"));
        }
        brackets.pop_back();
      }
      Emit(TokenKind::kOperator, std::string(op));
      pos_ += op.size();
      return;
    }
    SyntaxError(line_, absl::StrCat("unexpected character '", src_.substr(pos_, next - pos_), "'"));
  }

  void Number() {
    const size_t begin = pos_;
    const auto digits = [&] {
      while (pos_ < src_.size() && (std::isdigit(static_cast<unsigned char>(src_[pos_])) != 0 ||
                                    (src_[pos_] == '_' && pos_ > begin))) {
        ++pos_;
      }
    };
    const auto digit_at = [&](size_t i) {
      return i < src_.size() && std::isdigit(static_cast<unsigned char>(src_[i])) != 0;
    };
    bool is_float = false;
    if (src_[pos_] == '0' && pos_ + 1 < src_.size() &&
        std::string_view("xXoObB").find(src_[pos_ + 1]) != std::string_view::npos) {
      pos_ += 2;
      while (pos_ < src_.size() &&
             (std::isxdigit(static_cast<unsigned char>(src_[pos_])) != 0 || src_[pos_] == '_'))
        ++pos_;
    } else {
      digits();
      // `a.0.1` is two subscripts; only outside of those is `0.1` a number.
      const bool after_dot =
          !tokens_.empty() && tokens_.back().kind == TokenKind::kOperator && tokens_.back().text == ".";
      if (!after_dot && pos_ + 1 < src_.size() && src_[pos_] == '.' && digit_at(pos_ + 1)) {
        is_float = true;
        ++pos_;
        digits();
      }
      if (pos_ < src_.size() && (src_[pos_] == 'e' || src_[pos_] == 'E') &&
          (digit_at(pos_ + 1) || (pos_ + 1 < src_.size() &&
                                  (src_[pos_ + 1] == '+' || src_[pos_ + 1] == '-') && digit_at(pos_ + 2)))) {
        is_float = true;
        pos_ += 2;
        digits();
      }
    }
    std::string text = src_.substr(begin, pos_ - begin);
    std::erase(text, '_');
    Emit(is_float ? TokenKind::kFloat : TokenKind::kInteger, std::move(text));
  }

  uint32_t Hex(size_t at, size_t n) const {
    uint32_t value = 0;
    for (size_t i = at; i < at + n; ++i) {
      if (i >= src_.size() || std::isxdigit(static_cast<unsigned char>(src_[i])) == 0) {
        SyntaxError(line_, "bad escape in a string");
      }
      const char c = src_[i];
      value = value * 16 + static_cast<uint32_t>(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
    }
    return value;
  }

  void String(char quote) {
    const int line = line_;
    std::string text;
    for (++pos_;; ++pos_) {
      if (pos_ >= src_.size()) SyntaxError(line, "string without an end");
      const char c = src_[pos_];
      if (c == quote) break;
      if (c == '\n') ++line_;
      if (c != '\\') {
        text.push_back(c);
        continue;
      }
      if (++pos_ >= src_.size()) SyntaxError(line, "string without an end");
      Escape(text);
    }
    ++pos_;
    tokens_.push_back({TokenKind::kString, std::move(text), line});
  }

  // pos_ is at the character behind the backslash; left at the last one consumed.
  void Escape(std::string& text) {
    const char c = src_[pos_];
    static constexpr std::string_view kFrom = "ntrabfv\\'\"", kTo = "\n\t\r\a\b\f\v\\'\"";
    if (const size_t i = kFrom.find(c); i != kFrom.npos) {
      text.push_back(kTo[i]);
    } else if (c == '\n') {
      ++line_;
    } else if (c >= '0' && c <= '7') {
      uint32_t value = 0;
      size_t n = 0;
      for (; n < 3 && pos_ + n < src_.size() && src_[pos_ + n] >= '0' && src_[pos_ + n] <= '7'; ++n) {
        value = value * 8 + static_cast<uint32_t>(src_[pos_ + n] - '0');
      }
      utf8::Append(value, text);
      pos_ += n - 1;
    } else if (c == 'x' || c == 'u' || c == 'U') {
      const size_t n = c == 'x' ? 2 : c == 'u' ? 4 : 8;
      utf8::Append(Hex(pos_ + 1, n), text);
      pos_ += n;
    } else {
      text.push_back('\\');
      text.push_back(c);
    }
  }

  std::string src_;
  std::string before_;
  size_t pos_ = 0;
  int line_ = 1;
  int pending_lines_ = 0;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> Tokenize(std::string_view source) {
  return Lexer(NormalizeNewlines(utf8::IsValid(source) ? std::string(source) : utf8::Sanitize(source))).Run();
}

}  // namespace tidepool::jinja
