#include "server/structured/char_set.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <string>

#include "server/structured/dfa.h"

namespace tidepool::structured {
namespace {

constexpr uint32_t kLast = 0x10FFFF;
constexpr uint32_t kSurrogateFirst = 0xD800, kSurrogateLast = 0xDFFF;

size_t Encode(uint32_t cp, uint8_t* out) {
  if (cp < 0x80) {
    out[0] = static_cast<uint8_t>(cp);
    return 1;
  }
  if (cp < 0x800) {
    out[0] = static_cast<uint8_t>(0xC0 | cp >> 6);
    out[1] = static_cast<uint8_t>(0x80 | (cp & 0x3F));
    return 2;
  }
  if (cp < 0x10000) {
    out[0] = static_cast<uint8_t>(0xE0 | cp >> 12);
    out[1] = static_cast<uint8_t>(0x80 | (cp >> 6 & 0x3F));
    out[2] = static_cast<uint8_t>(0x80 | (cp & 0x3F));
    return 3;
  }
  out[0] = static_cast<uint8_t>(0xF0 | cp >> 18);
  out[1] = static_cast<uint8_t>(0x80 | (cp >> 12 & 0x3F));
  out[2] = static_cast<uint8_t>(0x80 | (cp >> 6 & 0x3F));
  out[3] = static_cast<uint8_t>(0x80 | (cp & 0x3F));
  return 4;
}

// Paths for the characters lo..hi, whose UTF-8 forms have equal length: cut where the leading bytes differ,
// so that each piece is a product of byte ranges.
void AddRange(Nfa& nfa, uint32_t from, uint32_t to, uint32_t lo, uint32_t hi) {
  uint8_t a[4], b[4];
  const size_t n = Encode(lo, a);
  Encode(hi, b);
  for (size_t i = 1; i < n; ++i) {
    const uint32_t mask = (uint32_t{1} << (6 * i)) - 1;
    if ((lo & ~mask) == (hi & ~mask)) continue;
    if ((lo & mask) != 0) {
      AddRange(nfa, from, to, lo, lo | mask);
      AddRange(nfa, from, to, (lo | mask) + 1, hi);
      return;
    }
    if ((hi & mask) != mask) {
      AddRange(nfa, from, to, lo, (hi & ~mask) - 1);
      AddRange(nfa, from, to, hi & ~mask, hi);
      return;
    }
  }
  uint32_t at = from;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t next = i + 1 == n ? to : nfa.Add();
    nfa.Connect(at, a[i], b[i], next);
    at = next;
  }
}

const char* CategoryName(utf8proc_category_t category) {
  static constexpr std::array<const char*, 30> kNames = {
      "Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps",
      "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co"};
  return kNames[static_cast<size_t>(category)];
}

// Scripts that utf8proc has no table for: the blocks' letters that schemas in the wild ask for. Source:
// Unicode 15, Scripts.txt (unassigned code points inside a range are of no consequence: models do not write
// them, and validators differ on them anyway).
struct Script {
  const char* name;
  std::vector<CharSet::Range> ranges;
};
const std::vector<Script>& Scripts() {
  static const auto* scripts = new std::vector<Script>{
      {"Latin",
       {{'A', 'Z'},
        {'a', 'z'},
        {0xAA, 0xAA},
        {0xBA, 0xBA},
        {0xC0, 0xD6},
        {0xD8, 0xF6},
        {0xF8, 0x2B8},
        {0x1E00, 0x1EFF},
        {0x2C60, 0x2C7F},
        {0xFF21, 0xFF3A},
        {0xFF41, 0xFF5A}}},
      {"Greek",
       {{0x370, 0x373},
        {0x375, 0x377},
        {0x37A, 0x37D},
        {0x386, 0x386},
        {0x388, 0x38A},
        {0x38C, 0x38C},
        {0x38E, 0x3A1},
        {0x3A3, 0x3E1},
        {0x3F0, 0x3FF}}},
      {"Cyrillic", {{0x400, 0x484}, {0x487, 0x52F}}},
      {"Han",
       {{0x2E80, 0x2E99},
        {0x2E9B, 0x2EF3},
        {0x2F00, 0x2FD5},
        {0x3005, 0x3005},
        {0x3007, 0x3007},
        {0x3021, 0x3029},
        {0x3038, 0x303B},
        {0x3400, 0x4DBF},
        {0x4E00, 0x9FFF},
        {0xF900, 0xFA6D},
        {0xFA70, 0xFAD9},
        {0x20000, 0x2A6DF},
        {0x2A700, 0x2EBE0},
        {0x30000, 0x323AF}}},
      {"Hiragana", {{0x3041, 0x3096}, {0x309D, 0x309F}}},
      {"Katakana",
       {{0x30A1, 0x30FA}, {0x30FD, 0x30FF}, {0x31F0, 0x31FF}, {0xFF66, 0xFF6F}, {0xFF71, 0xFF9D}}},
      {"Hangul",
       {{0x1100, 0x11FF},
        {0x3131, 0x318E},
        {0xA960, 0xA97C},
        {0xAC00, 0xD7A3},
        {0xD7B0, 0xD7C6},
        {0xD7CB, 0xD7FB}}},
      {"Arabic",
       {{0x600, 0x604},
        {0x606, 0x60B},
        {0x60D, 0x61A},
        {0x61C, 0x61E},
        {0x620, 0x63F},
        {0x641, 0x64A},
        {0x656, 0x66F},
        {0x671, 0x6DC},
        {0x6DE, 0x6FF},
        {0x750, 0x77F}}},
      {"Hebrew", {{0x591, 0x5C7}, {0x5D0, 0x5EA}, {0x5EF, 0x5F4}}},
      {"Thai", {{0xE01, 0xE3A}, {0xE40, 0xE5B}}},
      {"Devanagari", {{0x900, 0x950}, {0x955, 0x963}, {0x966, 0x97F}}},
  };
  return *scripts;
}

}  // namespace

CharSet CharSet::Of(uint32_t lo, uint32_t hi) {
  CharSet out;
  out.Add(lo, hi);
  return out;
}

CharSet CharSet::OfRanges(std::vector<Range> ranges) {
  CharSet out;
  out.ranges_ = std::move(ranges);
  out.Normalize();
  return out;
}

CharSet CharSet::Any() { return Of(0, kLast); }

CharSet CharSet::Digit() { return Of('0', '9'); }

CharSet CharSet::Word() {
  CharSet out = Of('0', '9');
  out.Add('A', 'Z');
  out.Add('_', '_');
  out.Add('a', 'z');
  return out;
}

CharSet CharSet::Space(bool ecma) {
  CharSet out = Of('\t', '\r');
  out.Add(' ', ' ');
  if (ecma) {
    // ECMA-262, 12.2 White Space and 12.3 Line Terminators.
    for (const uint32_t cp : {0xA0u, 0x1680u, 0x2028u, 0x2029u, 0x202Fu, 0x205Fu, 0x3000u, 0xFEFFu}) {
      out.Add(cp, cp);
    }
    out.Add(0x2000, 0x200A);
  }
  return out;
}

std::optional<CharSet> CharSet::Property(std::string_view name) {
  static constexpr std::pair<std::string_view, std::string_view> kLong[] = {{"Letter", "L"},
                                                                            {"Lowercase_Letter", "Ll"},
                                                                            {"Uppercase_Letter", "Lu"},
                                                                            {"Titlecase_Letter", "Lt"},
                                                                            {"Modifier_Letter", "Lm"},
                                                                            {"Other_Letter", "Lo"},
                                                                            {"Mark", "M"},
                                                                            {"Number", "N"},
                                                                            {"Decimal_Number", "Nd"},
                                                                            {"digit", "Nd"},
                                                                            {"Letter_Number", "Nl"},
                                                                            {"Other_Number", "No"},
                                                                            {"Punctuation", "P"},
                                                                            {"punct", "P"},
                                                                            {"Symbol", "S"},
                                                                            {"Separator", "Z"},
                                                                            {"Space_Separator", "Zs"},
                                                                            {"Other", "C"},
                                                                            {"Control", "Cc"},
                                                                            {"cntrl", "Cc"},
                                                                            {"Math_Symbol", "Sm"},
                                                                            {"Currency_Symbol", "Sc"},
                                                                            {"Lowercase", "Ll"},
                                                                            {"Uppercase", "Lu"}};
  for (const std::string_view prefix : {"Script=", "sc=", "General_Category=", "gc=", "Is"}) {
    if (name.substr(0, prefix.size()) == prefix) name.remove_prefix(prefix.size());
  }
  for (const auto& [full, brief] : kLong) {
    if (name == full) name = brief;
  }
  if (name == "Any") return Any();
  if (name == "ASCII") return Of(0, 0x7F);
  for (const Script& script : Scripts()) {
    if (name != script.name) continue;
    return OfRanges(script.ranges);
  }
  if (name.empty() || name.size() > 2) return std::nullopt;
  if (std::string_view("LMNPSZC").find(name[0]) == std::string_view::npos) return std::nullopt;
  // A pass over all of Unicode takes some milliseconds: once per property and process.
  static std::mutex mutex;
  static auto* known = new std::map<std::string, CharSet, std::less<>>();
  const std::lock_guard lock(mutex);
  if (const auto it = known->find(name); it != known->end()) return it->second;
  CharSet out;
  for (uint32_t cp = 0; cp <= kLast; ++cp) {
    const char* category = CategoryName(utf8proc_category(static_cast<utf8proc_int32_t>(cp)));
    if (category[0] != name[0] || (name.size() == 2 && category[1] != name[1])) continue;
    if (!out.ranges_.empty() && out.ranges_.back().hi + 1 == cp) {
      out.ranges_.back().hi = cp;
    } else {
      out.ranges_.push_back({cp, cp});
    }
  }
  out.Normalize();
  if (out.empty()) return std::nullopt;
  return known->emplace(std::string(name), std::move(out)).first->second;
}

void CharSet::Add(uint32_t lo, uint32_t hi) {
  ranges_.push_back({lo, hi});
  Normalize();
}

void CharSet::Add(const CharSet& other) {
  ranges_.insert(ranges_.end(), other.ranges_.begin(), other.ranges_.end());
  Normalize();
}

void CharSet::Normalize() {
  std::vector<Range> in = std::move(ranges_);
  ranges_.clear();
  std::sort(in.begin(), in.end(), [](const Range& a, const Range& b) { return a.lo < b.lo; });
  const auto push = [&](uint32_t lo, uint32_t hi) {
    if (lo > hi) return;
    if (!ranges_.empty() && lo <= ranges_.back().hi + 1) {
      ranges_.back().hi = std::max(ranges_.back().hi, hi);
    } else {
      ranges_.push_back({lo, hi});
    }
  };
  for (Range r : in) {
    r.hi = std::min(r.hi, kLast);
    if (r.hi < kSurrogateFirst || r.lo > kSurrogateLast) {
      push(r.lo, r.hi);
    } else {
      if (r.lo < kSurrogateFirst) push(r.lo, kSurrogateFirst - 1);
      if (r.hi > kSurrogateLast) push(kSurrogateLast + 1, r.hi);
    }
  }
}

CharSet CharSet::Negated() const { return Any().Without(*this); }

CharSet CharSet::Without(const CharSet& other) const {
  CharSet out;
  size_t at = 0;
  for (const Range& r : ranges_) {
    uint32_t lo = r.lo;
    while (at < other.ranges_.size() && other.ranges_[at].hi < lo) ++at;
    size_t i = at;
    bool open = true;
    for (; i < other.ranges_.size() && other.ranges_[i].lo <= r.hi; ++i) {
      if (other.ranges_[i].lo > lo) out.ranges_.push_back({lo, other.ranges_[i].lo - 1});
      if (other.ranges_[i].hi >= r.hi) {
        open = false;
        break;
      }
      lo = other.ranges_[i].hi + 1;
    }
    if (open) out.ranges_.push_back({lo, r.hi});
  }
  out.Normalize();
  return out;
}

CharSet CharSet::Intersected(const CharSet& other) const { return Without(other.Negated()); }

CharSet CharSet::CaseFolded() const {
  // Pairs of simple case mapping, once per process.
  static const auto* pairs = [] {
    auto* out = new std::vector<std::pair<uint32_t, uint32_t>>();
    for (uint32_t cp = 0; cp <= kLast; ++cp) {
      const auto c = static_cast<utf8proc_int32_t>(cp);
      for (const utf8proc_int32_t other : {utf8proc_tolower(c), utf8proc_toupper(c)}) {
        if (other != c) {
          out->emplace_back(cp, static_cast<uint32_t>(other));
          out->emplace_back(static_cast<uint32_t>(other), cp);
        }
      }
    }
    return out;
  }();
  CharSet out = *this;
  bool wide = false;
  for (const Range& r : ranges_) wide |= r.hi >= 0x80;
  for (const auto& [from, to] : *pairs) {
    // ASCII stays ASCII: K would otherwise match the Kelvin sign.
    if (!wide && (from >= 0x80 || to >= 0x80)) continue;
    if (Has(from)) out.ranges_.push_back({to, to});
  }
  out.Normalize();
  return out;
}

bool CharSet::Has(uint32_t cp) const {
  const auto it = std::upper_bound(ranges_.begin(), ranges_.end(), cp,
                                   [](uint32_t value, const Range& r) { return value < r.lo; });
  return it != ranges_.begin() && std::prev(it)->hi >= cp;
}

size_t CharSet::Size() const {
  size_t out = 0;
  for (const Range& r : ranges_) out += r.hi - r.lo + 1;
  return out;
}

void CharSet::AddTo(Nfa& nfa, uint32_t from, uint32_t to) const {
  static constexpr uint32_t kEnds[] = {0x7F, 0x7FF, 0xFFFF, kLast};
  for (const Range& r : ranges_) {
    uint32_t lo = r.lo;
    for (const uint32_t end : kEnds) {
      if (lo > r.hi) break;
      if (lo > end) continue;
      AddRange(nfa, from, to, lo, std::min(r.hi, end));
      lo = end + 1;
    }
  }
}

}  // namespace tidepool::structured
