#include "server/model/text/pretokenizer_scan.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/unicode_classes.h"

namespace tidepool {

namespace {

using unicode_classes::kLetter;
using unicode_classes::kNumber;
using unicode_classes::kSpace;
using unicode_classes::Table;

// Source: meta-llama/llama3, tokenizer.py, pat_str; Qwen's differs in the digits only.
constexpr std::string_view kLlama3Head = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})";
constexpr std::string_view kLlama3Tail = R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// A cursor over valid UTF-8 with the class of the character under it.
struct Cursor {
  const Table& table;
  const char* const data;
  const size_t size;

  // The classes of the character at `pos` and the bytes it has; 0 and 0 at the end.
  uint16_t At(size_t pos, size_t& bytes) const {
    if (pos >= size) {
      bytes = 0;
      return 0;
    }
    const auto c = static_cast<unsigned char>(data[pos]);
    if (c < 0x80) {
      bytes = 1;
      return table[c];
    }
    size_t next = pos;
    const uint32_t cp = utf8::Next({data, size}, next);
    bytes = next - pos;
    return table[cp];
  }

  // Behind the run of characters that have one of `classes` (or, with `negate`, none of them).
  template <bool negate = false>
  size_t Run(size_t pos, uint16_t classes) const {
    size_t bytes = 0;
    while (pos < size) {
      const uint16_t got = At(pos, bytes);
      if (((got & classes) != 0) == negate) break;
      pos += bytes;
    }
    return pos;
  }
};

constexpr uint16_t kWordlike = kLetter | kNumber;
constexpr uint16_t kNotOther = kLetter | kNumber | kSpace;

char LowerAscii(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }

// Bytes of the contraction ('s, 't, 're, 've, 'm, 'll, 'd) at `pos`, where an apostrophe stands; 0 if none.
template <bool ignore_case>
size_t Contraction(std::string_view text, size_t pos) {
  if (pos + 1 >= text.size()) return 0;
  const auto at = [&](size_t i) {
    return i >= text.size() ? '\0' : ignore_case ? LowerAscii(text[i]) : text[i];
  };
  const char a = at(pos + 1), b = at(pos + 2);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
  // U+017F, the long s, is an s where case does not count.
  if (ignore_case && text[pos + 1] == '\xC5' && pos + 2 < text.size() && text[pos + 2] == '\xBF') return 3;
  return 0;
}

// \s+(?!\S)|\s+ at `pos`, where white space stands that goes on to `end`: all of it at the end of the text,
// else all but the last character, else that one. `last` is where the last character of the run begins.
size_t SpaceMatch(size_t pos, size_t end, size_t last, size_t size) {
  return end == size || last == pos ? end : last;
}

}  // namespace

std::optional<SplitScanner> SplitScanner::For(std::string_view pattern) {
  if (pattern == kGpt2Pattern) return Gpt2();
  if (!pattern.starts_with(kLlama3Head) || !pattern.ends_with(kLlama3Tail) ||
      pattern.size() < kLlama3Head.size() + kLlama3Tail.size()) {
    return std::nullopt;
  }
  const std::string_view digits =
      pattern.substr(kLlama3Head.size(), pattern.size() - kLlama3Head.size() - kLlama3Tail.size());
  if (digits.empty()) return SplitScanner(Kind::kLlama3, 1);
  if (digits == "{1,2}") return SplitScanner(Kind::kLlama3, 2);
  if (digits == "{1,3}") return SplitScanner(Kind::kLlama3, 3);
  return std::nullopt;
}

void SplitScanner::Scan(std::string_view text, uint32_t offset, std::vector<Regex::Span>& out) const {
  const Cursor in{Table::Get(), text.data(), text.size()};
  const auto emit = [&](size_t begin, size_t end) {
    out.push_back({offset + static_cast<uint32_t>(begin), offset + static_cast<uint32_t>(end)});
  };
  const bool llama3 = kind_ == Kind::kLlama3;
  for (size_t pos = 0; pos < text.size();) {
    const size_t begin = pos;
    const char c = text[pos];
    if (c == '\'') {
      if (const size_t n = llama3 ? Contraction<true>(text, pos) : Contraction<false>(text, pos); n > 0) {
        emit(begin, pos += n);
        continue;
      }
    }
    size_t bytes = 0, next_bytes = 0;
    const uint16_t classes = in.At(pos, bytes);
    if ((classes & kLetter) != 0) {
      emit(begin, pos = in.Run(pos + bytes, kLetter));
      continue;
    }
    const uint16_t next = in.At(pos + bytes, next_bytes);
    if (llama3) {
      if ((next & kLetter) != 0 && (classes & kNumber) == 0 && c != '\r' && c != '\n') {
        emit(begin, pos = in.Run(pos + bytes + next_bytes, kLetter));
        continue;
      }
      if ((classes & kNumber) != 0) {
        pos += bytes;
        uint16_t more = next;
        for (int n = 1; n < digits_max_ && (more & kNumber) != 0; ++n) {
          pos += next_bytes;
          more = in.At(pos, next_bytes);
        }
        emit(begin, pos);
        continue;
      }
    } else if (c == ' ' && (next & kWordlike) != 0) {
      emit(begin, pos = in.Run(pos + bytes + next_bytes, (next & kLetter) != 0 ? kLetter : kNumber));
      continue;
    } else if ((classes & kNumber) != 0) {
      emit(begin, pos = in.Run(pos + bytes, kNumber));
      continue;
    }
    if ((classes & kNotOther) == 0 || (c == ' ' && next_bytes > 0 && (next & kNotOther) == 0)) {
      pos = in.Run<true>(pos + bytes, kNotOther);
      if (llama3) {
        while (pos < text.size() && (text[pos] == '\r' || text[pos] == '\n')) ++pos;
      }
      emit(begin, pos);
      continue;
    }
    // White space: the run, its last character, and behind its last line break.
    size_t last = pos, line = pos;
    while (pos < text.size()) {
      const uint16_t got = in.At(pos, bytes);
      if ((got & kSpace) == 0) break;
      last = pos;
      pos += bytes;
      if (text[last] == '\r' || text[last] == '\n') line = pos;
    }
    if (llama3 && line > begin) {
      pos = line;
    } else {
      pos = SpaceMatch(begin, pos, last, text.size());
    }
    emit(begin, pos);
  }
}

}  // namespace tidepool
