#include "server/model/text/pretokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/normalizer.h"
#include "server/model/text/unicode.h"
#include "server/model/text/utf8.h"

namespace tidepool {

using nlohmann::json;

namespace byte_alphabet {

namespace {

struct Tables {
  std::array<std::string, 256> chars;
  std::array<int, 0x144> bytes;
  Tables() {
    bytes.fill(-1);
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      const uint32_t cp = printable ? b : next++;
      utf8::Append(cp, chars[b]);
      bytes[cp] = static_cast<int>(b);
    }
  }
};

const Tables& Get() {
  static const Tables tables;
  return tables;
}

}  // namespace

std::string_view Char(uint8_t byte) { return Get().chars[byte]; }
int Byte(uint32_t cp) { return cp < Get().bytes.size() ? Get().bytes[cp] : -1; }

}  // namespace byte_alphabet

namespace {

// Source: huggingface/tokenizers, pre_tokenizers/byte_level.rs.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

template <typename Match>
void MatchChars(std::string_view text, Match match, std::vector<Regex::Span>& out) {
  for (size_t pos = 0; pos < text.size();) {
    const size_t begin = pos;
    if (match(utf8::Next(text, pos))) out.push_back({begin, pos});
  }
}

}  // namespace

absl::StatusOr<PreTokenizer> PreTokenizer::Parse(const json& node, const std::string& where) {
  PreTokenizer pre;
  TP_RETURN_IF_ERROR(Append(node, where, pre.steps_));
  return pre;
}

absl::StatusOr<PreTokenizer::Behavior> PreTokenizer::ParseBehavior(const json& node, const std::string& where,
                                                                   std::string_view fallback) {
  TP_ASSIGN_OR_RETURN(const std::string name, json_reader::GetString(node, "behavior", where, fallback));
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  return absl::InvalidArgumentError(absl::StrCat(where, ".behavior is '", name,
                                                 "'; it may be Removed, Isolated, MergedWithPrevious, "
                                                 "MergedWithNext or Contiguous"));
}

absl::Status PreTokenizer::Append(const json& node, const std::string& where, std::vector<Step>& steps) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(node, where));
  TP_ASSIGN_OR_RETURN(const std::string type, json_reader::GetString(node, "type", where));
  if (type == "Sequence") {
    const json* list = json_reader::Member(node, "pretokenizers");
    if (list == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".pretokenizers is missing"));
    TP_RETURN_IF_ERROR(json_reader::RequireArray(*list, where + ".pretokenizers"));
    for (size_t i = 0; i < list->size(); ++i) {
      TP_RETURN_IF_ERROR(Append((*list)[i], absl::StrCat(where, ".pretokenizers[", i, "]"), steps));
    }
    return absl::OkStatus();
  }
  Step step{};
  if (type == "ByteLevel") {
    step.kind = Kind::kByteLevel;
    TP_ASSIGN_OR_RETURN(step.add_prefix_space, json_reader::GetBool(node, "add_prefix_space", where, true));
    TP_ASSIGN_OR_RETURN(const bool use_regex, json_reader::GetBool(node, "use_regex", where, true));
    if (use_regex) {
      TP_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(kGpt2Pattern));
      step.pattern.push_back(std::move(regex));
    }
  } else if (type == "Split") {
    step.kind = Kind::kSplit;
    TP_ASSIGN_OR_RETURN(Regex regex, ParsePattern(node, "pattern", where));
    step.pattern.push_back(std::move(regex));
    TP_ASSIGN_OR_RETURN(step.behavior, ParseBehavior(node, where, "Isolated"));
    TP_ASSIGN_OR_RETURN(step.invert, json_reader::GetBool(node, "invert", where, false));
  } else if (type == "Digits") {
    step.kind = Kind::kDigits;
    TP_ASSIGN_OR_RETURN(const bool individual, json_reader::GetBool(node, "individual_digits", where, false));
    step.behavior = individual ? Behavior::kIsolated : Behavior::kContiguous;
  } else if (type == "Punctuation") {
    step.kind = Kind::kPunctuation;
    TP_ASSIGN_OR_RETURN(step.behavior, ParseBehavior(node, where, "Isolated"));
  } else if (type == "Metaspace") {
    step.kind = Kind::kMetaspace;
    TP_ASSIGN_OR_RETURN(step.replacement, json_reader::GetString(node, "replacement", where, "\xE2\x96\x81"));
    TP_ASSIGN_OR_RETURN(const bool legacy_prefix,
                        json_reader::GetBool(node, "add_prefix_space", where, true));
    TP_ASSIGN_OR_RETURN(const std::string scheme, json_reader::GetString(node, "prepend_scheme", where,
                                                                         legacy_prefix ? "always" : "never"));
    if (scheme != "always" && scheme != "first" && scheme != "never") {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ".prepend_scheme is '", scheme, "'; it may be always, first or never"));
    }
    step.prepend = scheme == "always"  ? Prepend::kAlways
                   : scheme == "first" ? Prepend::kFirst
                                       : Prepend::kNever;
    TP_ASSIGN_OR_RETURN(step.split, json_reader::GetBool(node, "split", where, true));
    TP_ASSIGN_OR_RETURN(Regex regex, Regex::Literal(step.replacement));
    step.pattern.push_back(std::move(regex));
  } else if (type == "Whitespace") {
    step.kind = Kind::kWhitespace;
    TP_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(R"(\w+|[^\w\s]+)"));
    step.pattern.push_back(std::move(regex));
  } else if (type == "WhitespaceSplit") {
    step.kind = Kind::kWhitespaceSplit;
  } else {
    return absl::UnimplementedError(absl::StrCat(where, ": pre-tokenizer ", type, " is not supported"));
  }
  steps.push_back(std::move(step));
  return absl::OkStatus();
}

// Source of the five behaviours: huggingface/tokenizers, tokenizer/normalizer.rs, NormalizedString::split.
void PreTokenizer::Cut(std::string_view text, const std::vector<Regex::Span>& matches, Behavior behavior,
                       bool invert, std::vector<std::string>& out) {
  struct Part {
    size_t begin, end;
    bool match;
  };
  std::vector<Part> parts;
  parts.reserve(matches.size() * 2 + 1);
  size_t done = 0;
  for (const Regex::Span& m : matches) {
    if (m.begin > done) parts.push_back({done, m.begin, invert});
    parts.push_back({m.begin, m.end, !invert});
    done = m.end;
  }
  if (done < text.size()) parts.push_back({done, text.size(), invert});

  std::vector<Part> cut;
  cut.reserve(parts.size());
  bool previous = false;
  switch (behavior) {
    case Behavior::kIsolated:
      cut = std::move(parts);
      break;
    case Behavior::kRemoved:
      for (const Part& p : parts) {
        if (!p.match) cut.push_back(p);
      }
      break;
    case Behavior::kContiguous:
    case Behavior::kMergedWithPrevious:
      for (const Part& p : parts) {
        const bool join = behavior == Behavior::kContiguous ? p.match == previous : p.match && !previous;
        if (join && !cut.empty()) {
          cut.back().end = p.end;
        } else {
          cut.push_back(p);
        }
        previous = p.match;
      }
      break;
    case Behavior::kMergedWithNext:
      for (auto p = parts.rbegin(); p != parts.rend(); ++p) {
        if (p->match && !previous && !cut.empty()) {
          cut.back().begin = p->begin;
        } else {
          cut.push_back(*p);
        }
        previous = p->match;
      }
      std::reverse(cut.begin(), cut.end());
      break;
  }
  for (const Part& p : cut) out.emplace_back(text.substr(p.begin, p.end - p.begin));
}

absl::Status PreTokenizer::Run(const Step& step, std::string piece, bool at_start,
                               std::vector<std::string>& out) {
  std::vector<Regex::Span> matches;
  switch (step.kind) {
    case Kind::kByteLevel: {
      if (step.add_prefix_space && piece.front() != ' ') piece.insert(piece.begin(), ' ');
      std::vector<std::string> words;
      if (step.pattern.empty()) {
        words.push_back(std::move(piece));
      } else {
        TP_RETURN_IF_ERROR(step.pattern[0].FindAll(piece, matches));
        Cut(piece, matches, Behavior::kIsolated, false, words);
      }
      for (const std::string& word : words) {
        std::string& mapped = out.emplace_back();
        mapped.reserve(word.size() * 2);
        for (const char c : word) mapped.append(byte_alphabet::Char(static_cast<uint8_t>(c)));
      }
      return absl::OkStatus();
    }
    case Kind::kSplit:
      TP_RETURN_IF_ERROR(step.pattern[0].FindAll(piece, matches));
      Cut(piece, matches, step.behavior, step.invert, out);
      return absl::OkStatus();
    case Kind::kDigits:
      MatchChars(piece, unicode::IsNumeric, matches);
      Cut(piece, matches, step.behavior, false, out);
      return absl::OkStatus();
    case Kind::kPunctuation:
      MatchChars(piece, unicode::IsPunctuation, matches);
      Cut(piece, matches, step.behavior, false, out);
      return absl::OkStatus();
    case Kind::kMetaspace: {
      std::string text;
      text.reserve(piece.size() + 16);
      for (const char c : piece) c == ' ' ? text.append(step.replacement) : text.append(1, c);
      const bool prepend = step.prepend == Prepend::kAlways || (step.prepend == Prepend::kFirst && at_start);
      if (prepend && !text.starts_with(step.replacement)) text.insert(0, step.replacement);
      if (!step.split) {
        out.push_back(std::move(text));
        return absl::OkStatus();
      }
      TP_RETURN_IF_ERROR(step.pattern[0].FindAll(text, matches));
      Cut(text, matches, Behavior::kMergedWithNext, false, out);
      return absl::OkStatus();
    }
    case Kind::kWhitespace:
      TP_RETURN_IF_ERROR(step.pattern[0].FindAll(piece, matches));
      Cut(piece, matches, Behavior::kRemoved, true, out);
      return absl::OkStatus();
    case Kind::kWhitespaceSplit:
      MatchChars(piece, unicode::IsWhiteSpace, matches);
      Cut(piece, matches, Behavior::kRemoved, false, out);
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

absl::Status PreTokenizer::Apply(std::string_view text, bool at_start,
                                 std::vector<std::string>& pieces) const {
  pieces.clear();
  if (text.empty()) return absl::OkStatus();
  pieces.emplace_back(text);
  for (const Step& step : steps_) {
    std::vector<std::string> next;
    next.reserve(pieces.size() + text.size() / 4);
    for (size_t i = 0; i < pieces.size(); ++i) {
      TP_RETURN_IF_ERROR(Run(step, std::move(pieces[i]), at_start && i == 0, next));
    }
    pieces = std::move(next);
  }
  return absl::OkStatus();
}

}  // namespace tidepool
