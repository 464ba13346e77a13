#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

// What the `tokenizers` library takes each code point for. It mixes several versions of Unicode (its regex
// engine's, Rust's, and older ones for punctuation and normalisation), so neither utf8proc nor PCRE2 alone
// cuts text where it does. Source: tools/fidelity/make_unicode_classes.py, which asks the library itself.
namespace tidepool::unicode_classes {

enum Class : uint16_t {
  kLetter = 1 << 0,        // \p{L} of a Split regex
  kNumber = 1 << 1,        // \p{N} of a Split regex
  kSpace = 1 << 2,         // \s there, and White_Space everywhere else
  kNumeric = 1 << 3,       // Digits
  kPunctuation = 1 << 4,   // Punctuation, BertPreTokenizer
  kWord = 1 << 5,          // \w of Whitespace and of single_word tokens
  kBertControl = 1 << 6,   // dropped by BertNormalizer's clean_text
  kBertMark = 1 << 7,      // dropped by BertNormalizer's strip_accents
  kAccent = 1 << 8,        // dropped by StripAccents
  kChinese = 1 << 9,       // set off by BertNormalizer's handle_chinese_chars
  kNoNormal = 1 << 10,     // unknown to the normalisation tables: stands for itself, orders nothing
  kNormalStart = 1 << 11,  // no normalisation form joins it, or what it decomposes to, to what precedes
  kNfcInert = 1 << 12,     // kNormalStart, and NFC leaves it as it is
  kNfkcInert = 1 << 13,    // kNormalStart, and NFKC leaves it as it is
  kMark = 1 << 14,         // \p{M} of a Split regex
};

// Table: two levels, built once.
class Table {
 public:
  // The one table of the process.
  static const Table& Get();

  uint16_t operator[](uint32_t cp) const {
    return cp < 0x110000 ? pages_[page_[cp >> 8]][cp & 0xFF] : uint16_t{0};
  }
  bool Is(uint32_t cp, uint16_t classes) const { return ((*this)[cp] & classes) != 0; }

 private:
  Table();
  using Page = uint16_t[256];
  uint16_t page_[0x1100];
  std::unique_ptr<Page[]> pages_;
};

// Lower case, one to one (U+0130, which has two characters, stands for itself).
uint32_t Lower(uint32_t cp);

// The primary composite of a pair, Hangul included; 0 if there is none.
uint32_t Compose(uint32_t first, uint32_t second);

// Canonical combining class; 0 for kNoNormal.
int CombiningClass(uint32_t cp);

// Full decomposition, canonical or (`compat`) compatible, without reordering. Returns the number of code
// points written to `out`, which holds kDecompositionMax.
inline constexpr int kDecompositionMax = 32;  // the longest known has 18 (U+FDFA)
int Decompose(uint32_t cp, bool compat, uint32_t* out);

// The ranges of a regex property as the library's engine has it; empty for properties that we do not know.
// `name`: "L", "N", "M", "P", "S", "Lu", "Ll", "Lt", "Lm", "Lo", "Han", or "w" and "d" for \w and \d.
struct Range {
  uint32_t first, last;
};
std::span<const Range> RegexProperty(std::string_view name);

}  // namespace tidepool::unicode_classes
