#include "server/model/strings/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <vector>

#include "server/model/strings/utf8.h"

namespace tidepool::unicode {

namespace {

utf8proc_category_t Category(uint32_t cp) { return utf8proc_category(static_cast<utf8proc_int32_t>(cp)); }

// The character that ends at `end`, and where it begins.
uint32_t Previous(std::string_view text, size_t end, size_t& begin) {
  begin = end - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
  size_t pos = begin;
  return utf8::Next(text, pos);
}

template <typename Drop>
std::string_view StripIf(std::string_view text, bool left, bool right, Drop drop) {
  size_t begin = 0, end = text.size();
  while (left && begin < end) {
    size_t next = begin;
    if (!drop(utf8::Next(text, next))) break;
    begin = next;
  }
  while (right && end > begin) {
    size_t start = 0;
    if (!drop(Previous(text, end, start))) break;
    end = start;
  }
  return text.substr(begin, end - begin);
}

void AppendUpper(uint32_t cp, std::string& out) {
  if (cp == 0xDF) {
    out.append("SS");
  } else {
    utf8::Append(static_cast<uint32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(cp))), out);
  }
}

void AppendLower(uint32_t cp, std::string& out) {
  utf8::Append(static_cast<uint32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(cp))), out);
}

void AppendTitle(uint32_t cp, std::string& out) {
  if (cp == 0xDF) {
    out.append("Ss");
  } else {
    utf8::Append(static_cast<uint32_t>(utf8proc_totitle(static_cast<utf8proc_int32_t>(cp))), out);
  }
}

}  // namespace

bool IsWhiteSpace(uint32_t cp) {
  if (cp < 0x80) return cp == ' ' || (cp >= 9 && cp <= 13);
  return cp == 0x85 || cp == 0xA0 || cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 ||
         cp == 0x2029 || cp == 0x202F || cp == 0x205F || cp == 0x3000;
}

bool IsSpace(uint32_t cp) { return IsWhiteSpace(cp) || (cp >= 0x1C && cp <= 0x1F); }

bool IsNumeric(uint32_t cp) {
  if (cp < 0x80) return cp >= '0' && cp <= '9';
  const auto c = Category(cp);
  return c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_NL || c == UTF8PROC_CATEGORY_NO;
}

bool IsPunctuation(uint32_t cp) {
  if (cp < 0x80) {
    return (cp >= 33 && cp <= 47) || (cp >= 58 && cp <= 64) || (cp >= 91 && cp <= 96) ||
           (cp >= 123 && cp <= 126);
  }
  const auto c = Category(cp);
  return c >= UTF8PROC_CATEGORY_PC && c <= UTF8PROC_CATEGORY_PO;
}

bool IsLetter(uint32_t cp) {
  const auto c = Category(cp);
  return c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_LO;
}

bool IsWord(uint32_t cp) {
  const auto c = Category(cp);
  return (c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_ME) || c == UTF8PROC_CATEGORY_ND ||
         c == UTF8PROC_CATEGORY_NL || c == UTF8PROC_CATEGORY_PC || cp == 0x200C || cp == 0x200D;
}

bool IsUpper(uint32_t cp) { return Category(cp) == UTF8PROC_CATEGORY_LU; }
bool IsLower(uint32_t cp) { return Category(cp) == UTF8PROC_CATEGORY_LL; }

bool IsPrintable(uint32_t cp) {
  if (cp < 0x80) return cp >= 32 && cp < 127;
  switch (Category(cp)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS:
      return false;
    default:
      return true;
  }
}

std::string Upper(std::string_view text) {
  std::string out;
  for (size_t pos = 0; pos < text.size();) AppendUpper(utf8::Next(text, pos), out);
  return out;
}

std::string Lower(std::string_view text) {
  std::string out;
  for (size_t pos = 0; pos < text.size();) AppendLower(utf8::Next(text, pos), out);
  return out;
}

std::string Title(std::string_view text) {
  std::string out;
  bool in_word = false;
  for (size_t pos = 0; pos < text.size();) {
    const uint32_t cp = utf8::Next(text, pos);
    in_word ? AppendLower(cp, out) : AppendTitle(cp, out);
    in_word = IsLetter(cp);
  }
  return out;
}

std::string Capitalize(std::string_view text) {
  std::string out;
  for (size_t pos = 0; pos < text.size();) {
    const bool first = pos == 0;
    const uint32_t cp = utf8::Next(text, pos);
    first ? AppendTitle(cp, out) : AppendLower(cp, out);
  }
  return out;
}

std::string_view Strip(std::string_view text, bool left, bool right) {
  return StripIf(text, left, right, IsSpace);
}

std::string_view StripWhiteSpace(std::string_view text, bool left, bool right) {
  return StripIf(text, left, right, IsWhiteSpace);
}

std::string_view StripChars(std::string_view text, std::string_view chars, bool left, bool right) {
  std::vector<uint32_t> set;
  for (size_t pos = 0; pos < chars.size();) set.push_back(utf8::Next(chars, pos));
  std::sort(set.begin(), set.end());
  return StripIf(text, left, right,
                 [&](uint32_t cp) { return std::binary_search(set.begin(), set.end(), cp); });
}

}  // namespace tidepool::unicode
