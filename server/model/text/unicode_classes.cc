#include "server/model/text/unicode_classes.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

namespace tidepool::unicode_classes {

namespace {

struct Composition {
  uint32_t first, second, composed;
};
struct LowerRun {
  uint32_t first, last, step;
  int32_t distance;
};

#include "server/model/text/unicode_classes_data.inc"

// Source: huggingface/tokenizers, normalizers/bert.rs, is_chinese_char (as the library behaves; U+2B820 to
// U+2B91F are left out there).
constexpr Range kChineseRanges[] = {{0x3400, 0x4DBF},   {0x4E00, 0x9FFF},   {0xF900, 0xFAFF},
                                    {0x20000, 0x2A6DF}, {0x2A700, 0x2B81F}, {0x2B920, 0x2CEAF},
                                    {0x2F800, 0x2FA1F}};
constexpr Range kSpaceRanges[] = {{9, 13},          {0x20, 0x20},     {0x85, 0x85},     {0xA0, 0xA0},
                                  {0x1680, 0x1680}, {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F},
                                  {0x205F, 0x205F}, {0x3000, 0x3000}};

// Hangul syllables. Source: Unicode 15, section 3.12.
constexpr uint32_t kSBase = 0xAC00, kLBase = 0x1100, kVBase = 0x1161, kTBase = 0x11A7;
constexpr uint32_t kLCount = 19, kVCount = 21, kTCount = 28, kSCount = kLCount * kVCount * kTCount;

template <size_t N>
bool Contains(const Range (&ranges)[N], uint32_t cp) {
  const Range* it = std::lower_bound(std::begin(ranges), std::end(ranges), cp,
                                     [](const Range& r, uint32_t c) { return r.last < c; });
  return it != std::end(ranges) && it->first <= cp;
}

}  // namespace

const Table& Table::Get() {
  static const Table table;
  return table;
}

Table::Table() {
  std::vector<uint16_t> flat(0x110000);
  const auto mark = [&](std::span<const Range> ranges, uint16_t bit) {
    for (const Range& r : ranges) {
      for (uint32_t cp = r.first; cp <= r.last; ++cp) flat[cp] |= bit;
    }
  };
  mark(kRegexLetterRanges, kLetter);
  mark(kRegexNumberRanges, kNumber);
  mark(kRegexMarkRanges, kMark);
  mark(kSpaceRanges, kSpace);
  mark(kNumericRanges, kNumeric);
  mark(kPunctuationRanges, kPunctuation);
  mark(kWordRanges, kWord);
  mark(kBertControlRanges, kBertControl);
  mark(kBertMarkRanges, kBertMark);
  mark(kAccentRanges, kAccent);
  mark(kChineseRanges, kChinese);
  mark(kNormalizationUnknownRanges, kNoNormal);

  std::vector<uint32_t> seconds, composed;
  for (const Composition& c : kCompositions) {
    seconds.push_back(c.second);
    composed.push_back(c.composed);
  }
  std::sort(seconds.begin(), seconds.end());
  std::sort(composed.begin(), composed.end());
  // No character from here on has a decomposition or a combining class.
  constexpr uint32_t kNormalEnd = 0x30000;
  for (uint32_t cp = kNormalEnd; cp < 0x110000; ++cp) flat[cp] |= kNormalStart | kNfcInert | kNfkcInert;
  for (uint32_t cp = 0; cp < kNormalEnd; ++cp) {
    uint32_t canonical[kDecompositionMax], compatible[kDecompositionMax];
    const int n = Decompose(cp, false, canonical), k = Decompose(cp, true, compatible);
    const auto starts = [&](uint32_t first) {
      return CombiningClass(first) == 0 && !std::binary_search(seconds.begin(), seconds.end(), first) &&
             !(first >= kVBase && first < kVBase + kVCount) && !(first > kTBase && first < kTBase + kTCount);
    };
    if (!starts(canonical[0]) || !starts(compatible[0])) continue;
    flat[cp] |= kNormalStart;
    const bool hangul = cp >= kSBase && cp < kSBase + kSCount;
    // What decomposes is taken for changed unless it is known to compose again. (Composition exclusions
    // aside, the first two of its parts do; so compare with the pair table.)
    const bool recomposes = hangul || std::binary_search(composed.begin(), composed.end(), cp);
    const bool canonical_same = (n == 1 && canonical[0] == cp) || recomposes;
    const bool compatible_same = k == n && std::equal(canonical, canonical + n, compatible);
    if (canonical_same) flat[cp] |= kNfcInert;
    if (canonical_same && compatible_same) flat[cp] |= kNfkcInert;
  }

  // Equal pages are kept once.
  std::vector<uint32_t> unique;
  for (uint32_t page = 0; page < 0x1100; ++page) {
    const auto same = std::find_if(unique.begin(), unique.end(), [&](uint32_t other) {
      return std::memcmp(&flat[page << 8], &flat[other << 8], sizeof(Page)) == 0;
    });
    page_[page] = static_cast<uint16_t>(same - unique.begin());
    if (same == unique.end()) unique.push_back(page);
  }
  pages_ = std::make_unique<Page[]>(unique.size());
  for (size_t i = 0; i < unique.size(); ++i) std::memcpy(pages_[i], &flat[unique[i] << 8], sizeof(Page));
}

uint32_t Lower(uint32_t cp) {
  if (cp < 0x80) return cp >= 'A' && cp <= 'Z' ? cp + 32 : cp;
  const auto* it = std::lower_bound(std::begin(kLowerRuns), std::end(kLowerRuns), cp,
                                    [](const LowerRun& r, uint32_t c) { return r.last < c; });
  if (it == std::end(kLowerRuns) || cp < it->first || (cp - it->first) % it->step != 0) return cp;
  return static_cast<uint32_t>(static_cast<int32_t>(cp) + it->distance);
}

uint32_t Compose(uint32_t first, uint32_t second) {
  if (first >= kLBase && first < kLBase + kLCount && second >= kVBase && second < kVBase + kVCount) {
    return kSBase + ((first - kLBase) * kVCount + (second - kVBase)) * kTCount;
  }
  if (first >= kSBase && first < kSBase + kSCount && (first - kSBase) % kTCount == 0 && second > kTBase &&
      second < kTBase + kTCount) {
    return first + (second - kTBase);
  }
  const auto* it =
      std::lower_bound(std::begin(kCompositions), std::end(kCompositions), std::pair(first, second),
                       [](const Composition& c, const std::pair<uint32_t, uint32_t>& key) {
                         return std::pair(c.first, c.second) < key;
                       });
  return it != std::end(kCompositions) && it->first == first && it->second == second ? it->composed : 0;
}

int CombiningClass(uint32_t cp) {
  const auto ccc = utf8proc_get_property(static_cast<utf8proc_int32_t>(cp))->combining_class;
  return ccc == 0 || Contains(kNormalizationUnknownRanges, cp) ? 0 : static_cast<int>(ccc);
}

int Decompose(uint32_t cp, bool compat, uint32_t* out) {
  static_assert(sizeof(utf8proc_int32_t) == sizeof(uint32_t));
  out[0] = cp;
  if (cp < 0xA0 || Contains(kNormalizationUnknownRanges, cp)) return 1;
  const auto options =
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compat ? UTF8PROC_COMPAT : 0));
  int last_class = 0;
  const auto n =
      utf8proc_decompose_char(static_cast<utf8proc_int32_t>(cp), reinterpret_cast<utf8proc_int32_t*>(out),
                              kDecompositionMax, options, &last_class);
  if (n > 0 && n <= kDecompositionMax) return static_cast<int>(n);
  out[0] = cp;
  return 1;
}

std::span<const Range> RegexProperty(std::string_view name) {
  struct Named {
    std::string_view name;
    std::span<const Range> ranges;
  };
  static const Named kNamed[] = {
      {"L", kRegexLetterRanges},      {"N", kRegexNumberRanges}, {"M", kRegexMarkRanges},
      {"P", kRegexPunctuationRanges}, {"S", kRegexSymbolRanges}, {"Lu", kRegexUpperRanges},
      {"Ll", kRegexLowerRanges},      {"Lt", kRegexTitleRanges}, {"Lm", kRegexModifierRanges},
      {"Lo", kRegexOtherRanges},      {"w", kRegexWordRanges},   {"d", kRegexDigitRanges},
      {"Han", kRegexHanRanges}};
  for (const Named& entry : kNamed) {
    if (entry.name == name) return entry.ranges;
  }
  return {};
}

}  // namespace tidepool::unicode_classes
