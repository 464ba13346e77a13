#define PCRE2_CODE_UNIT_WIDTH 8
#include "server/model/text/regex.h"

#include <pcre2.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <span>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/unicode_classes.h"

namespace tidepool {

namespace {

// A pattern's steps are linear in the text for every tokenizer that we know; this bound is for hostile ones.
// The JIT counts backtracking points only, so it is far above what a 64 MB text needs.
constexpr uint32_t kMatchLimit = 500'000'000;
constexpr size_t kJitStackBytesMax = size_t{16} << 20;

// Scratch of one thread: PCRE2's match data and JIT stack may not be shared by two matches at once.
struct Scratch {
  Scratch()
      : data(pcre2_match_data_create(8, nullptr)),
        context(pcre2_match_context_create(nullptr)),
        stack(pcre2_jit_stack_create(64 << 10, kJitStackBytesMax, nullptr)) {
    if (context != nullptr) {
      pcre2_set_match_limit(context, kMatchLimit);
      pcre2_jit_stack_assign(context, nullptr, stack);
    }
  }
  ~Scratch() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  pcre2_match_data* data;
  pcre2_match_context* context;
  pcre2_jit_stack* stack;
};

std::string Message(int code) {
  PCRE2_UCHAR buffer[256];
  if (pcre2_get_error_message(code, buffer, sizeof(buffer)) < 0) return absl::StrCat("PCRE2 error ", code);
  return reinterpret_cast<const char*>(buffer);
}

constexpr uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C | PCRE2_MULTILINE;

pcre2_code* CompileRaw(std::string_view pattern, int* error, PCRE2_SIZE* offset) {
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  if (context != nullptr) {
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_set_parens_nest_limit(context, 64);
  }
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), kOptions,
                                   error, offset, context);
  pcre2_compile_context_free(context);
  return code;
}

using unicode_classes::Range;

std::string Class(std::span<const Range> ranges) {
  std::string text;
  for (const Range& r : ranges) absl::StrAppendFormat(&text, "\\x{%X}-\\x{%X}", r.first, r.last);
  return text;
}

// The code points that PCRE2 gives this property, by asking it.
std::vector<Range> PcreProperty(std::string_view name) {
  static const std::string* const kAll = [] {
    auto* text = new std::string;
    for (uint32_t cp = 0; cp < 0x110000; ++cp) {
      if (cp < 0xD800 || cp > 0xDFFF) utf8::Append(cp, *text);
    }
    return text;
  }();
  const std::string pattern = absl::StrCat("\\p{", absl::string_view(name.data(), name.size()), "}+");
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = CompileRaw(pattern, &error, &offset);
  pcre2_match_data* data = pcre2_match_data_create(4, nullptr);
  std::vector<Range> ranges;
  for (size_t pos = 0; code != nullptr && data != nullptr;) {
    const int rc = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(kAll->data()), kAll->size(), pos,
                               PCRE2_NO_UTF_CHECK, data, nullptr);
    if (rc < 0) break;
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data);
    size_t first = span[0], last = span[1];
    do --last;
    while ((static_cast<unsigned char>((*kAll)[last]) & 0xC0) == 0x80);
    ranges.push_back({utf8::Next(*kAll, first), utf8::Next(*kAll, last)});
    pos = span[1];
  }
  pcre2_match_data_free(data);
  pcre2_code_free(code);
  return ranges;
}

// What the library's engine gives a property beyond PCRE2's older tables: only these are spelled out, since a
// class of hundreds of ranges is slow. Computed once per property and process.
const std::string& Additions(std::string_view name) {
  static std::mutex mutex;
  static auto* const cache = new std::map<std::string, std::string, std::less<>>;
  const std::lock_guard lock(mutex);
  if (const auto it = cache->find(name); it != cache->end()) return it->second;
  const std::vector<Range> ours = PcreProperty(name);
  std::vector<Range> more;
  for (const Range& range : unicode_classes::RegexProperty(name == "Nd" ? "d" : name)) {
    uint32_t at = range.first;
    for (const Range& r : ours) {
      if (r.last < at || r.first > range.last) continue;
      if (r.first > at) more.push_back({at, r.first - 1});
      at = r.last + 1;
    }
    if (at <= range.last) more.push_back({at, range.last});
  }
  return cache->emplace(std::string(name), Class(more)).first->second;
}

constexpr Range kSpaces[] = {{9, 13},          {0x20, 0x20},     {0x85, 0x85},     {0xA0, 0xA0},
                             {0x1680, 0x1680}, {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F},
                             {0x205F, 0x205F}, {0x3000, 0x3000}};

// An Oniguruma pattern (Ruby syntax) as PCRE2 has to be asked for the same: the same sets of characters for
// \s, \w, \d, \h and the general categories. Errors: Unimplemented for what would silently mean something
// else.
absl::StatusOr<std::string> Translate(std::string_view pattern) {
  std::string out;
  int depth = 0;  // of character classes
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (depth > 0 && c == '&' && pattern.substr(i).starts_with("&&")) {
      return absl::UnimplementedError("regex: an intersection (&&) in a character class is not supported");
    }
    if (c == '[') {
      if (depth > 0 && !pattern.substr(i).starts_with("[:")) {
        return absl::UnimplementedError("regex: a character class inside a character class is not supported");
      }
      if (depth == 0) {
        depth = 1;
        out.push_back(c);
        // "]" right behind the opening is a member.
        if (pattern.substr(i + 1).starts_with("^")) out.push_back(pattern[++i]);
        if (pattern.substr(i + 1).starts_with("]")) out.append("\\]"), ++i;
        continue;
      }
      const size_t end = pattern.find(":]", i + 2);
      if (end == pattern.npos) {
        out.append("\\[");
        continue;
      }
      out.append(pattern.substr(i, end + 2 - i));
      i = end + 1;
      continue;
    }
    if (c == ']' && depth > 0) depth = 0;
    if (c != '\\' || i + 1 == pattern.size()) {
      out.push_back(c);
      continue;
    }
    const char escape = pattern[++i];
    std::string_view name = "Nd";  // of the property, for \d and \p
    std::string members;           // of the class that the escape stands for
    bool negated = false;
    switch (escape) {
      case 's':
      case 'S':
        members = Class(kSpaces);
        negated = escape == 'S';
        break;
      case 'h':
      case 'H':
        members = "0-9A-Fa-f";
        negated = escape == 'H';
        break;
      case 'w':
      case 'W': {
        const auto ranges = unicode_classes::RegexProperty("w");
        members = Class(ranges);
        negated = escape == 'W';
        break;
      }
      case 'd':
      case 'D':
      case 'p':
      case 'P': {
        std::string whole = "\\p{Nd}";
        if (escape == 'p' || escape == 'P') {
          const size_t end = pattern.substr(i).starts_with("p{") || pattern.substr(i).starts_with("P{")
                                 ? pattern.find('}', i)
                                 : pattern.npos;
          if (end == pattern.npos) return absl::InvalidArgumentError(R"(regex: \p must be \p{...})");
          name = pattern.substr(i + 2, end - i - 2);
          i = end;
          negated = escape == 'P';
          if (name.starts_with("^")) {
            name.remove_prefix(1);
            negated = !negated;
          }
          whole = absl::StrCat("\\p{", absl::string_view(name.data(), name.size()), "}");
        } else {
          negated = escape == 'D';
        }
        const bool known = !unicode_classes::RegexProperty(name == "Nd" ? "d" : name).empty();
        members = known ? whole + Additions(name) : whole;
        break;
      }
      default:
        out.push_back(c);
        out.push_back(escape);
        continue;
    }
    if (depth == 0) {
      absl::StrAppend(&out, negated ? "[^" : "[", members, "]");
    } else if (!negated) {
      out.append(members);
    } else {
      // The complement, spelled out.
      const std::string set = escape == 'S'   ? ""
                              : escape == 'W' ? "w"
                              : escape == 'D' ? "d"
                                              : std::string(name);
      const std::span<const Range> ranges =
          escape == 'S' ? std::span<const Range>(kSpaces) : unicode_classes::RegexProperty(set);
      if (escape == 'H' || ranges.empty()) {
        return absl::UnimplementedError(
            absl::StrCat("regex: \\", std::string(1, escape), " inside a character class is not supported"));
      }
      std::vector<Range> rest;
      uint32_t from = 0;
      for (const Range& r : ranges) {
        if (r.first > from) rest.push_back({from, r.first - 1});
        from = r.last + 1;
      }
      rest.push_back({from, 0x10FFFF});
      out.append(Class(rest));
    }
  }
  return out;
}

}  // namespace

absl::StatusOr<Regex> Regex::Compile(std::string_view pattern) {
  if (pattern.size() > kPatternBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("regex: ", pattern.size(), " bytes; at most ", kPatternBytesMax, " are allowed"));
  }
  int error = 0;
  PCRE2_SIZE offset = 0;
  // The pattern as it was written first, so that a message points into it.
  pcre2_code* code = CompileRaw(pattern, &error, &offset);
  if (code == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("regex: ", Message(error), " at offset ", offset));
  }
  pcre2_code_free(code);
  TP_ASSIGN_OR_RETURN(const std::string translated, Translate(pattern));
  code = CompileRaw(translated, &error, &offset);
  if (code == nullptr) return absl::InvalidArgumentError(absl::StrCat("regex: ", Message(error)));
  // Without the JIT (a hardened kernel that forbids executable pages) the interpreter gives the same matches.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  Regex regex;
  regex.code_ = std::shared_ptr<const void>(
      code, [](const void* p) { pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p))); });
  return regex;
}

absl::StatusOr<Regex> Regex::Literal(std::string text) {
  if (text.empty()) return absl::InvalidArgumentError("must not be empty");
  Regex regex;
  regex.literal_ = std::move(text);
  return regex;
}

absl::Status Regex::FindAll(std::string_view text, std::vector<Span>& out) const {
  out.clear();
  if (is_literal()) {
    for (size_t pos = text.find(literal_); pos != text.npos;
         pos = text.find(literal_, pos + literal_.size())) {
      out.push_back({static_cast<uint32_t>(pos), static_cast<uint32_t>(pos + literal_.size())});
    }
    return absl::OkStatus();
  }
  thread_local Scratch scratch;
  if (scratch.data == nullptr || scratch.context == nullptr) {
    return absl::ResourceExhaustedError("no memory for a regex match");
  }
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  size_t pos = 0;
  while (pos <= text.size()) {
    const int rc = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), pos,
                               PCRE2_NO_UTF_CHECK, scratch.data, scratch.context);
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("text too hard for the tokenizer's regex near byte ", pos, ": ", Message(rc)));
    }
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(scratch.data);
    if (span[1] > span[0]) {
      out.push_back({static_cast<uint32_t>(span[0]), static_cast<uint32_t>(span[1])});
      pos = span[1];
    } else {
      // An empty match: go on one character further.
      do {
        ++pos;
      } while (pos < text.size() && (static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80);
    }
  }
  return absl::OkStatus();
}

}  // namespace tidepool
