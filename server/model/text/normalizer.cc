#include "server/model/text/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/unicode_classes.h"

namespace tidepool {

using nlohmann::json;
using unicode_classes::Table;

// Writer: the result of one step, piece by piece, with the marks of where it comes from.
class Normalizer::Writer {
 public:
  Writer(std::string_view in, Trace& trace) : in_(in), trace_(trace), marks_(trace.marks) {
    out_.reserve(in.size() + in.size() / 8 + 16);
    if (marks_ != nullptr) out_marks_.reserve(out_.capacity());
  }
  // in[begin, end) as it is.
  void Keep(size_t begin, size_t end) {
    if (begin < trace_.front_bytes) front_bytes_ += std::min(end, trace_.front_bytes) - begin;
    out_.append(in_, begin, end - begin);
    if (marks_ != nullptr) {
      out_marks_.insert(out_marks_.end(), marks_->begin() + static_cast<ptrdiff_t>(begin),
                        marks_->begin() + static_cast<ptrdiff_t>(end));
    }
  }
  // `text` in place of in[begin, end), of which the first character makes `front` bytes.
  void Put(size_t begin, size_t end, std::string_view text) { Put(begin, end, text, text.size()); }
  void Put(size_t begin, size_t end, std::string_view text, size_t front) {
    if (begin < trace_.front_bytes) front_bytes_ += front;
    out_.append(text);
    if (marks_ == nullptr) return;
    const bool marked =
        std::any_of(marks_->begin() + static_cast<ptrdiff_t>(begin),
                    marks_->begin() + static_cast<ptrdiff_t>(end), [](uint8_t m) { return m; });
    out_marks_.resize(out_.size(), marked);
  }
  bool TooLong() const { return out_.size() > trace_.bytes_max; }
  // Hands the result out.
  absl::Status Finish(std::string& text) {
    if (TooLong()) {
      return TooLongError(trace_);
    }
    text = std::move(out_);
    trace_.front_bytes = front_bytes_;
    if (trace_.marks != nullptr) *trace_.marks = std::move(out_marks_);
    return absl::OkStatus();
  }

  static absl::Status TooLongError(const Trace& trace) {
    return absl::InvalidArgumentError(
        absl::StrCat("the tokenizer's normalizer makes more than ", trace.bytes_max, " bytes of the text"));
  }

 private:
  std::string_view in_;
  Trace& trace_;
  const std::vector<uint8_t>* marks_;
  std::string out_;
  std::vector<uint8_t> out_marks_;
  size_t front_bytes_ = 0;
};

namespace {

bool IsAscii(char c) { return static_cast<unsigned char>(c) < 0x80; }

// One of the Unicode normalisation forms of a stretch that no other stretch interacts with. Written here
// rather than left to utf8proc, whose ordering of combining marks is quadratic in a run of them, and which
// knows newer characters than the library does.
void NormalForm(std::string_view in, bool compose, bool compat, std::string& out) {
  struct Point {
    uint32_t cp;
    int ccc;
  };
  std::vector<Point> points;
  for (size_t pos = 0; pos < in.size();) {
    uint32_t parts[unicode_classes::kDecompositionMax];
    const int n = unicode_classes::Decompose(utf8::Next(in, pos), compat, parts);
    for (int i = 0; i < n; ++i) points.push_back({parts[i], unicode_classes::CombiningClass(parts[i])});
  }
  for (size_t i = 0; i < points.size();) {
    if (points[i].ccc == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < points.size() && points[end].ccc != 0) ++end;
    std::stable_sort(points.begin() + static_cast<ptrdiff_t>(i), points.begin() + static_cast<ptrdiff_t>(end),
                     [](const Point& a, const Point& b) { return a.ccc < b.ccc; });
    i = end;
  }
  size_t length = points.size();
  if (compose) {
    // Source: Unicode 15, section 3.11, D117: a character composes with the last starter unless one in
    // between has its class or a higher one, or is a starter.
    constexpr int kNothing = -1;
    size_t starter = points.size();
    int between = kNothing;
    length = 0;
    for (const Point& p : points) {
      if (starter < points.size() && (between == kNothing || between < p.ccc)) {
        if (const uint32_t composed = unicode_classes::Compose(points[starter].cp, p.cp); composed != 0) {
          points[starter].cp = composed;
          continue;
        }
      }
      if (p.ccc == 0) {
        starter = length;
        between = kNothing;
      } else {
        between = p.ccc;
      }
      points[length++] = p;
    }
  }
  for (size_t i = 0; i < length; ++i) utf8::Append(points[i].cp, out);
}

}  // namespace

absl::StatusOr<Regex> ParsePattern(const json& node, std::string_view key, const std::string& where) {
  const json* pattern = json_reader::Member(node, key);
  const std::string path = absl::StrCat(where, ".", absl::string_view(key.data(), key.size()));
  if (pattern == nullptr || !pattern->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, R"( must be {"String": ...} or {"Regex": ...})"));
  }
  if (json_reader::Member(*pattern, "Regex") != nullptr) {
    TP_ASSIGN_OR_RETURN(const std::string text, json_reader::GetString(*pattern, "Regex", path));
    auto regex = Regex::Compile(text);
    if (!regex.ok()) return Annotate(regex.status(), absl::StrCat(path, ".Regex"));
    return regex;
  }
  TP_ASSIGN_OR_RETURN(std::string text, json_reader::GetString(*pattern, "String", path));
  auto regex = Regex::Literal(std::move(text));
  if (!regex.ok()) return Annotate(regex.status(), absl::StrCat(path, ".String"));
  return regex;
}

absl::StatusOr<Normalizer> Normalizer::Parse(const json& node, const std::string& where) {
  Normalizer normalizer;
  TP_RETURN_IF_ERROR(Append(node, where, normalizer.steps_));
  if (normalizer.steps_.size() > kStepsMax) {
    return absl::InvalidArgumentError(absl::StrCat(where, " has ", normalizer.steps_.size(),
                                                   " steps; at most ", kStepsMax, " are allowed"));
  }
  return normalizer;
}

absl::Status Normalizer::Append(const json& node, const std::string& where, std::vector<Step>& steps) {
  TP_RETURN_IF_ERROR(json_reader::RequireObject(node, where));
  TP_ASSIGN_OR_RETURN(const std::string type, json_reader::GetString(node, "type", where));
  if (type == "Sequence") {
    const json* list = json_reader::Member(node, "normalizers");
    if (list == nullptr) return absl::InvalidArgumentError(absl::StrCat(where, ".normalizers is missing"));
    TP_RETURN_IF_ERROR(json_reader::RequireArray(*list, where + ".normalizers"));
    for (size_t i = 0; i < list->size(); ++i) {
      TP_RETURN_IF_ERROR(Append((*list)[i], absl::StrCat(where, ".normalizers[", i, "]"), steps));
    }
    return absl::OkStatus();
  }
  Step step{};
  if (type == "Prepend") {
    step.kind = Kind::kPrepend;
    TP_ASSIGN_OR_RETURN(step.content, json_reader::GetString(node, "prepend", where));
  } else if (type == "Replace") {
    step.kind = Kind::kReplace;
    TP_ASSIGN_OR_RETURN(step.content, json_reader::GetString(node, "content", where));
    TP_ASSIGN_OR_RETURN(Regex regex, ParsePattern(node, "pattern", where));
    step.pattern.push_back(std::move(regex));
  } else if (type == "Strip") {
    step.kind = Kind::kStrip;
    TP_ASSIGN_OR_RETURN(step.left, json_reader::GetBool(node, "strip_left", where, true));
    TP_ASSIGN_OR_RETURN(step.right, json_reader::GetBool(node, "strip_right", where, true));
  } else if (type == "StripAccents") {
    step.kind = Kind::kStripAccents;
  } else if (type == "Lowercase") {
    step.kind = Kind::kLowercase;
  } else if (type == "BertNormalizer") {
    step.kind = Kind::kBert;
    TP_ASSIGN_OR_RETURN(step.clean_text, json_reader::GetBool(node, "clean_text", where, true));
    TP_ASSIGN_OR_RETURN(step.chinese, json_reader::GetBool(node, "handle_chinese_chars", where, true));
    TP_ASSIGN_OR_RETURN(step.lowercase, json_reader::GetBool(node, "lowercase", where, true));
    TP_ASSIGN_OR_RETURN(step.strip_accents,
                        json_reader::GetBool(node, "strip_accents", where, step.lowercase));
  } else if (type == "Precompiled") {
    // Files of models without a map hold null there: nothing to do.
    TP_ASSIGN_OR_RETURN(const std::string base64,
                        json_reader::GetString(node, "precompiled_charsmap", where, ""));
    if (base64.empty()) return absl::OkStatus();
    auto charsmap = Charsmap::Parse(base64);
    if (!charsmap.ok()) return Annotate(charsmap.status(), where + ".precompiled_charsmap");
    step.kind = Kind::kPrecompiled;
    step.charsmap = std::make_shared<const Charsmap>(*std::move(charsmap));
  } else if (type == "NFC") {
    step.kind = Kind::kNfc;
  } else if (type == "NFD") {
    step.kind = Kind::kNfd;
  } else if (type == "NFKC") {
    step.kind = Kind::kNfkc;
  } else if (type == "NFKD") {
    step.kind = Kind::kNfkd;
  } else {
    return absl::UnimplementedError(absl::StrCat(where, ": normalizer ", type, " is not supported"));
  }
  steps.push_back(std::move(step));
  return absl::OkStatus();
}

namespace {

// The first byte at or behind `pos` that is not ASCII.
size_t SkipAscii(std::string_view text, size_t pos) {
  while (pos < text.size() && IsAscii(text[pos])) ++pos;
  return pos;
}

}  // namespace

absl::Status Normalizer::Run(const Step& step, std::string& text, Trace& trace) {
  const Table& table = Table::Get();
  const std::string_view in = text;
  switch (step.kind) {
    case Kind::kPrepend: {
      if (text.empty()) return absl::OkStatus();
      text.insert(0, step.content);
      if (trace.front_bytes > 0) trace.front_bytes += step.content.size();
      if (text.size() > trace.bytes_max) return Writer::TooLongError(trace);
      if (trace.marks != nullptr) trace.marks->insert(trace.marks->begin(), step.content.size(), 0);
      return absl::OkStatus();
    }
    case Kind::kReplace: {
      std::vector<Regex::Span> spans;
      TP_RETURN_IF_ERROR(step.pattern[0].FindAll(in, spans));
      if (spans.empty()) return absl::OkStatus();
      Writer out(in, trace);
      size_t done = 0;
      for (const Regex::Span& s : spans) {
        out.Keep(done, s.begin);
        out.Put(s.begin, s.end, step.content);
        if (out.TooLong()) break;
        done = s.end;
      }
      out.Keep(done, in.size());
      return out.Finish(text);
    }
    case Kind::kStrip: {
      size_t begin = 0, end = in.size();
      for (size_t pos = 0; step.left && pos < in.size(); begin = pos) {
        if (!table.Is(utf8::Next(in, pos), unicode_classes::kSpace)) break;
      }
      while (step.right && end > begin) {
        size_t at = end - 1;
        while (at > begin && (static_cast<unsigned char>(in[at]) & 0xC0) == 0x80) --at;
        const size_t start = at;
        if (!table.Is(utf8::Next(in, at), unicode_classes::kSpace)) break;
        end = start;
      }
      Writer out(in, trace);
      out.Keep(begin, end);
      return out.Finish(text);
    }
    case Kind::kStripAccents: {
      Writer out(in, trace);
      size_t done = 0;
      for (size_t pos = SkipAscii(in, 0); pos < in.size(); pos = SkipAscii(in, pos)) {
        const size_t begin = pos;
        if (!table.Is(utf8::Next(in, pos), unicode_classes::kAccent)) continue;
        out.Keep(done, begin);
        done = pos;
      }
      out.Keep(done, in.size());
      return out.Finish(text);
    }
    case Kind::kLowercase: {
      Writer out(in, trace);
      std::string lower;
      for (size_t pos = 0; pos < in.size();) {
        const size_t begin = pos;
        const uint32_t cp = utf8::Next(in, pos);
        lower.clear();
        if (cp == 0x130) {
          lower = "i\u0307";
        } else {
          utf8::Append(unicode_classes::Lower(cp), lower);
        }
        out.Put(begin, pos, lower);
      }
      return out.Finish(text);
    }
    case Kind::kNfc:
    case Kind::kNfd:
    case Kind::kNfkc:
    case Kind::kNfkd: {
      const bool compose = step.kind == Kind::kNfc || step.kind == Kind::kNfkc;
      const bool compat = step.kind == Kind::kNfkc || step.kind == Kind::kNfkd;
      const uint16_t inert = compat ? unicode_classes::kNfkcInert : unicode_classes::kNfcInert;
      if (SkipAscii(in, 0) == in.size()) return absl::OkStatus();
      Writer out(in, trace);
      std::string form;
      size_t done = 0;
      for (size_t pos = 0; pos < in.size();) {
        if (IsAscii(in[pos]) && (pos + 1 == in.size() || IsAscii(in[pos + 1]))) {
          ++pos;
          continue;
        }
        // A stretch from one character that begins something new to the next such.
        const size_t begin = pos;
        const uint32_t first = utf8::Next(in, pos);
        size_t end = pos;
        while (pos < in.size() && !table.Is(utf8::Next(in, pos), unicode_classes::kNormalStart)) end = pos;
        const bool alone = end == begin + utf8::SequenceLength(static_cast<unsigned char>(in[begin]));
        pos = end;
        if (alone && compose && table.Is(first, inert)) continue;
        form.clear();
        NormalForm(in.substr(begin, end - begin), compose, compat, form);
        if (in.substr(begin, end - begin) == form) continue;
        out.Keep(done, begin);
        out.Put(begin, end, form,
                alone ? form.size() : utf8::SequenceLength(static_cast<unsigned char>(form[0])));
        if (out.TooLong()) break;
        done = end;
      }
      if (done == 0) return absl::OkStatus();
      out.Keep(done, in.size());
      return out.Finish(text);
    }
    case Kind::kBert: {
      Step rest{};
      if (step.clean_text || step.chinese) {
        Writer out(in, trace);
        for (size_t pos = 0; pos < in.size();) {
          const size_t begin = pos;
          const uint32_t cp = utf8::Next(in, pos);
          const uint16_t classes = table[cp];
          if (step.clean_text && (classes & unicode_classes::kBertControl) != 0) continue;
          if (step.clean_text && (classes & unicode_classes::kSpace) != 0) {
            out.Put(begin, pos, " ");
          } else if (step.chinese && (classes & unicode_classes::kChinese) != 0) {
            out.Put(begin, begin, " ");
            out.Keep(begin, pos);
            out.Put(begin, begin, " ");
          } else {
            out.Keep(begin, pos);
          }
        }
        TP_RETURN_IF_ERROR(out.Finish(text));
      }
      if (step.strip_accents) {
        rest.kind = Kind::kNfd;
        TP_RETURN_IF_ERROR(Run(rest, text, trace));
        const std::string_view decomposed = text;
        Writer out(decomposed, trace);
        for (size_t pos = 0; pos < decomposed.size();) {
          const size_t begin = pos;
          if (!table.Is(utf8::Next(decomposed, pos), unicode_classes::kBertMark)) out.Keep(begin, pos);
        }
        TP_RETURN_IF_ERROR(out.Finish(text));
      }
      if (step.lowercase) {
        rest.kind = Kind::kLowercase;
        return Run(rest, text, trace);
      }
      return absl::OkStatus();
    }
    case Kind::kPrecompiled: {
      Writer out(in, trace);
      for (size_t pos = 0; pos < in.size() && !out.TooLong();) {
        // One grapheme cluster.
        const size_t begin = pos;
        uint32_t cp = utf8::Next(in, pos);
        utf8proc_int32_t state = 0;
        while (pos < in.size()) {
          size_t next = pos;
          const uint32_t after = utf8::Next(in, next);
          // Marks that are newer than utf8proc's tables behave like one that it knows.
          constexpr uint32_t kAnyMark = 0x300;
          const bool new_mark =
              table.Is(after, unicode_classes::kMark) &&
              utf8proc_category(static_cast<utf8proc_int32_t>(after)) == UTF8PROC_CATEGORY_CN;
          const uint32_t like = new_mark ? kAnyMark : after;
          if ((cp < 0x80 && like < 0x80 && !(cp == '\r' && like == '\n')) ||
              utf8proc_grapheme_break_stateful(static_cast<utf8proc_int32_t>(cp),
                                               static_cast<utf8proc_int32_t>(like), &state)) {
            break;
          }
          cp = like;
          pos = next;
        }
        const std::string_view cluster = in.substr(begin, pos - begin);
        // Source of the six: normalizers/precompiled.rs.
        if (cluster.size() < 6) {
          if (const auto found = step.charsmap->Find(cluster)) {
            out.Put(begin, pos, *found);
            continue;
          }
        }
        for (size_t at = begin; at < pos && !out.TooLong();) {
          const size_t from = at;
          utf8::Next(in, at);
          if (const auto found = step.charsmap->Find(in.substr(from, at - from))) {
            out.Put(from, at, *found);
          } else {
            out.Keep(from, at);
          }
        }
      }
      return out.Finish(text);
    }
  }
  return absl::OkStatus();
}

absl::Status Normalizer::Apply(std::string& text, Trace& trace) const {
  trace.front_bytes = text.empty() ? 0 : utf8::SequenceLength(static_cast<unsigned char>(text[0]));
  trace.bytes_max = std::min(kBytesMax, kGrowthMax * text.size() + 4096);
  for (const Step& step : steps_) TP_RETURN_IF_ERROR(Run(step, text, trace));
  return absl::OkStatus();
}

}  // namespace tidepool
