#include "server/model/text/pretokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/normalizer.h"
#include "server/model/text/unicode_classes.h"

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

constexpr size_t kStepsMax = 32;  // the longest known sequence has 5

// Appends the stretches of text[piece) for which `match` says yes, one a character.
template <typename Match>
void MatchChars(std::string_view text, Regex::Span piece, Match match, std::vector<Regex::Span>& out) {
  for (size_t pos = piece.begin; pos < piece.end;) {
    const size_t begin = pos;
    if (match(utf8::Next(text, pos)))
      out.push_back({static_cast<uint32_t>(begin), static_cast<uint32_t>(pos)});
  }
}

}  // namespace

absl::StatusOr<PreTokenizer> PreTokenizer::Parse(const json& node, const std::string& where) {
  PreTokenizer pre;
  TP_RETURN_IF_ERROR(Append(node, where, pre.steps_));
  if (pre.steps_.size() > kStepsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, " has ", pre.steps_.size(), " steps; at most ", kStepsMax, " are allowed"));
  }
  pre.byte_level_ = !pre.steps_.empty() && pre.steps_.back().kind == Kind::kByteLevel;
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
    if (use_regex) step.scanner = SplitScanner::Gpt2();
  } else if (type == "Split") {
    step.kind = Kind::kSplit;
    const json* pattern = json_reader::Member(node, "pattern");
    const json* spelled = pattern == nullptr ? nullptr : json_reader::Member(*pattern, "Regex");
    if (spelled != nullptr && spelled->is_string()) {
      step.scanner = SplitScanner::For(spelled->get_ref<const std::string&>());
    }
    if (!step.scanner) {
      TP_ASSIGN_OR_RETURN(step.regex, ParsePattern(node, "pattern", where));
    }
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
    step.behavior = Behavior::kMergedWithNext;
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
    if (utf8::Count(step.replacement) != 1) {
      return absl::InvalidArgumentError(absl::StrCat(where, ".replacement must be one character"));
    }
  } else if (type == "Whitespace") {
    step.kind = Kind::kWhitespace;
  } else if (type == "WhitespaceSplit") {
    step.kind = Kind::kWhitespaceSplit;
    step.behavior = Behavior::kRemoved;
  } else if (type == "BertPreTokenizer") {
    step.kind = Kind::kBert;
  } else {
    return absl::UnimplementedError(absl::StrCat(where, ": pre-tokenizer ", type, " is not supported"));
  }
  steps.push_back(std::move(step));
  return absl::OkStatus();
}

// Source of the five behaviours: huggingface/tokenizers, tokenizer/normalizer.rs, NormalizedString::split.
void PreTokenizer::Cut(Regex::Span piece, const std::vector<Regex::Span>& matches, Behavior behavior,
                       bool invert, std::vector<Regex::Span>& out) {
  const size_t first = out.size();
  bool previous = false;
  // Takes the stretches one by one, matches and what lies between them.
  const auto take = [&](uint32_t begin, uint32_t end, bool match) {
    if (begin == end) return;
    switch (behavior) {
      case Behavior::kIsolated:
        out.push_back({begin, end});
        break;
      case Behavior::kRemoved:
        if (!match) out.push_back({begin, end});
        break;
      case Behavior::kContiguous:
        if (match == previous && out.size() > first) {
          out.back().end = end;
        } else {
          out.push_back({begin, end});
        }
        break;
      case Behavior::kMergedWithPrevious:
        if (match && !previous && out.size() > first) {
          out.back().end = end;
        } else {
          out.push_back({begin, end});
        }
        break;
      case Behavior::kMergedWithNext:
        // What follows joins a match that stands alone so far.
        if (!match && previous && out.size() > first) {
          out.back().end = end;
        } else {
          out.push_back({begin, end});
        }
        break;
    }
    previous = match;
  };
  uint32_t done = piece.begin;
  for (const Regex::Span& m : matches) {
    take(done, m.begin, invert);
    take(m.begin, m.end, !invert);
    done = m.end;
  }
  take(done, piece.end, invert);
}

absl::Status PreTokenizer::CutPiece(const Step& step, std::string_view text, Regex::Span piece,
                                    Scratch& scratch) {
  const unicode_classes::Table& table = unicode_classes::Table::Get();
  std::vector<Regex::Span>& matches = scratch.matches;
  std::vector<Regex::Span>& out = scratch.next;
  matches.clear();
  switch (step.kind) {
    case Kind::kByteLevel:
    case Kind::kSplit: {
      const std::string_view within = text.substr(piece.begin, piece.end - piece.begin);
      if (step.scanner) {
        if (step.behavior == Behavior::kIsolated) {
          step.scanner->Scan(within, piece.begin, out);
          return absl::OkStatus();
        }
        step.scanner->Scan(within, piece.begin, matches);
      } else if (step.regex) {
        TP_RETURN_IF_ERROR(step.regex->FindAll(within, matches));
        for (Regex::Span& m : matches) m.begin += piece.begin, m.end += piece.begin;
      } else {
        out.push_back(piece);
        return absl::OkStatus();
      }
      break;
    }
    case Kind::kDigits:
      MatchChars(
          text, piece, [&](uint32_t cp) { return table.Is(cp, unicode_classes::kNumeric); }, matches);
      break;
    case Kind::kPunctuation:
      MatchChars(
          text, piece, [&](uint32_t cp) { return table.Is(cp, unicode_classes::kPunctuation); }, matches);
      break;
    case Kind::kMetaspace:
      text = text.substr(0, piece.end);
      for (size_t pos = text.find(step.replacement, piece.begin); pos != text.npos;
           pos = text.find(step.replacement, pos + step.replacement.size())) {
        matches.push_back({static_cast<uint32_t>(pos), static_cast<uint32_t>(pos + step.replacement.size())});
      }
      break;
    case Kind::kWhitespaceSplit:
      MatchChars(
          text, piece, [&](uint32_t cp) { return table.Is(cp, unicode_classes::kSpace); }, matches);
      break;
    // Words, runs of anything else, and white space, which is dropped. Bert's: each punctuation mark alone.
    case Kind::kWhitespace:
    case Kind::kBert: {
      const bool bert = step.kind == Kind::kBert;
      int before = 0;
      for (size_t pos = piece.begin; pos < piece.end;) {
        const auto begin = static_cast<uint32_t>(pos);
        const uint16_t classes = table[utf8::Next(text, pos)];
        const int now = (classes & unicode_classes::kSpace) != 0 ? 0
                        : bert ? ((classes & unicode_classes::kPunctuation) != 0 ? 2 : 1)
                               : ((classes & unicode_classes::kWord) != 0 ? 1 : 2);
        const bool joins = now == before && !(bert && now == 2);
        if (now != 0 && joins) out.back().end = static_cast<uint32_t>(pos);
        if (now != 0 && !joins) out.push_back({begin, static_cast<uint32_t>(pos)});
        before = now;
      }
      return absl::OkStatus();
    }
  }
  Cut(piece, matches, step.behavior, step.invert, out);
  return absl::OkStatus();
}

absl::StatusOr<std::string_view> PreTokenizer::Apply(std::string_view text, bool at_start,
                                                     Scratch& scratch) const {
  scratch.spans.clear();
  if (text.empty()) return text;
  scratch.spans.push_back({0, static_cast<uint32_t>(text.size())});
  // One rewriting makes a character at most a few times as long; a file that chains them is after our memory.
  const size_t bytes_max = 32 * text.size() + 4096;
  int buffer = 0;
  // Writes the pieces anew, each by `write(piece, out)`.
  const auto rewrite = [&](auto write) {
    std::string& out = scratch.buffer[buffer];
    buffer ^= 1;
    out.clear();
    for (Regex::Span& span : scratch.spans) {
      const auto begin = static_cast<uint32_t>(out.size());
      write(span, out);
      span = {begin, static_cast<uint32_t>(out.size())};
    }
    text = out;
  };
  for (const Step& step : steps_) {
    if (text.size() > bytes_max) {
      return absl::InvalidArgumentError(
          absl::StrCat("pre_tokenizer makes more than ", bytes_max, " bytes of the text"));
    }
    if (step.kind == Kind::kMetaspace) {
      rewrite([&](const Regex::Span& span, std::string& out) {
        const std::string_view piece = text.substr(span.begin, span.end - span.begin);
        const bool prepend = step.prepend == Prepend::kAlways ||
                             (step.prepend == Prepend::kFirst && at_start && span.begin == 0);
        if (prepend && piece.front() != ' ' && !piece.starts_with(step.replacement))
          out.append(step.replacement);
        size_t done = 0;
        for (size_t pos = piece.find(' '); pos != piece.npos; pos = piece.find(' ', done)) {
          out.append(piece, done, pos - done).append(step.replacement);
          done = pos + 1;
        }
        out.append(piece.substr(done));
      });
      if (!step.split) continue;
    }
    if (step.kind == Kind::kByteLevel && step.add_prefix_space &&
        std::any_of(scratch.spans.begin(), scratch.spans.end(),
                    [&](const Regex::Span& span) { return text[span.begin] != ' '; })) {
      rewrite([&](const Regex::Span& span, std::string& out) {
        if (text[span.begin] != ' ') out.push_back(' ');
        out.append(text, span.begin, span.end - span.begin);
      });
    }
    scratch.next.clear();
    for (const Regex::Span& span : scratch.spans) TP_RETURN_IF_ERROR(CutPiece(step, text, span, scratch));
    std::swap(scratch.spans, scratch.next);
    if (step.kind == Kind::kByteLevel && &step != &steps_.back()) {
      rewrite([&](const Regex::Span& span, std::string& out) {
        for (uint32_t i = span.begin; i < span.end; ++i) {
          out.append(byte_alphabet::Char(static_cast<uint8_t>(text[i])));
        }
      });
    }
  }
  return text;
}

}  // namespace tidepool
