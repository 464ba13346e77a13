#include "server/bench/trace.h"

#include <simdjson.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/rng.h"
#include "base/small_file.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr uint64_t kTraceBytesMax = uint64_t{4} << 30;
constexpr size_t kEntriesMax = 50'000'000;
constexpr uint64_t kTokensMax = 100'000'000;

class Lines {
 public:
  explicit Lines(std::string_view text) : rest_(text) {
    if (rest_.starts_with("\xEF\xBB\xBF")) rest_.remove_prefix(3);
  }

  // The next line that is not blank, without its end.
  bool Next(std::string_view& line) {
    while (!rest_.empty()) {
      const size_t end = rest_.find('\n');
      line = rest_.substr(0, end);
      rest_.remove_prefix(end == rest_.npos ? rest_.size() : end + 1);
      ++number_;
      if (line.ends_with('\r')) line.remove_suffix(1);
      if (line.find_first_not_of(" \t") != line.npos) return true;
    }
    return false;
  }
  size_t number() const { return number_; }

 private:
  std::string_view rest_;
  size_t number_ = 0;
};

// One CSV line (RFC 4180; quotes, but no line breaks within).
std::vector<std::string> SplitCsv(std::string_view line) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '"') {
      if (quoted && i + 1 < line.size() && line[i + 1] == '"') {
        fields.back() += line[++i];
      } else {
        quoted = !quoted;
      }
    } else if (line[i] == ',' && !quoted) {
      fields.emplace_back();
    } else {
      fields.back() += line[i];
    }
  }
  return fields;
}

absl::StatusOr<uint32_t> Tokens(std::string_view text) {
  double number = 0;
  if (!absl::SimpleAtod(absl::string_view(text.data(), text.size()), &number) || !(number >= 0) ||
      number > kTokensMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", std::string(text.substr(0, 64)), "' is no token count"));
  }
  return static_cast<uint32_t>(number);
}

struct Csv {
  std::string format;
  size_t time = 0, input = 0, output = 0;
  bool dates = false;
};

std::optional<size_t> Column(const std::vector<std::string>& header, std::string_view name) {
  for (size_t i = 0; i < header.size(); ++i) {
    const std::string column(absl::StripAsciiWhitespace(header[i]));
    if (std::string_view(column) == name) return i;
  }
  return std::nullopt;
}

std::optional<Csv> CsvOf(const std::vector<std::string>& header) {
  const auto with = [&](const char* format, const char* time, const char* input, const char* output,
                        bool dates) -> std::optional<Csv> {
    const auto t = Column(header, time), i = Column(header, input), o = Column(header, output);
    if (!t || !i || !o) return std::nullopt;
    return Csv{format, *t, *i, *o, dates};
  };
  if (auto csv = with("burstgpt", "Timestamp", "Request tokens", "Response tokens", false)) return csv;
  return with("azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", true);
}

absl::StatusOr<absl::Duration> CsvTime(const std::string& text, bool dates) {
  if (dates) {
    absl::Time time;
    std::string why;
    if (!absl::ParseTime("%Y-%m-%d%ET%H:%M:%E*S", text, &time, &why) &&
        !absl::ParseTime("%Y-%m-%d %H:%M:%E*S", text, &time, &why) &&
        !absl::ParseTime("%Y-%m-%d %H:%M:%E*S%Ez", text, &time, &why)) {
      return absl::InvalidArgumentError(absl::StrCat("'", text.substr(0, 64), "' is no date and time"));
    }
    return time - absl::UnixEpoch();
  }
  double seconds = 0;
  if (!absl::SimpleAtod(text, &seconds) || !std::isfinite(seconds) || std::abs(seconds) > 1e12) {
    return absl::InvalidArgumentError(absl::StrCat("'", text.substr(0, 64), "' is no time in seconds"));
  }
  return absl::Seconds(seconds);
}

absl::StatusOr<TraceEntry> CsvEntry(const Csv& csv, std::string_view line) {
  const std::vector<std::string> fields = SplitCsv(line);
  if (fields.size() <= std::max({csv.time, csv.input, csv.output})) {
    return absl::InvalidArgumentError("has fewer fields than the header");
  }
  TraceEntry entry;
  TP_ASSIGN_OR_RETURN(entry.at, CsvTime(fields[csv.time], csv.dates));
  TP_ASSIGN_OR_RETURN(entry.input_tokens, Tokens(fields[csv.input]));
  TP_ASSIGN_OR_RETURN(entry.output_tokens, Tokens(fields[csv.output]));
  return entry;
}

absl::StatusOr<TraceEntry> JsonEntry(simdjson::dom::parser& parser, std::string_view line) {
  simdjson::dom::object object;
  if (parser.parse(line.data(), line.size()).get(object) != simdjson::SUCCESS) {
    return absl::InvalidArgumentError("is not a JSON object");
  }
  TraceEntry entry;
  double milliseconds = 0;
  uint64_t input = 0, output = 0;
  if (object["timestamp"].get(milliseconds) != simdjson::SUCCESS || std::abs(milliseconds) > 1e15) {
    return absl::InvalidArgumentError("timestamp must be a number of milliseconds");
  }
  if (object["input_length"].get(input) != simdjson::SUCCESS || input > kTokensMax) {
    return absl::InvalidArgumentError("input_length must be a token count");
  }
  if (object["output_length"].get(output) != simdjson::SUCCESS || output > kTokensMax) {
    return absl::InvalidArgumentError("output_length must be a token count");
  }
  simdjson::dom::element ids;
  if (object["hash_ids"].get(ids) == simdjson::SUCCESS) {
    simdjson::dom::array list;
    if (ids.get(list) != simdjson::SUCCESS) return absl::InvalidArgumentError("hash_ids must be a list");
    for (const auto id : list) {
      uint64_t number = 0;
      if (id.get(number) != simdjson::SUCCESS) {
        return absl::InvalidArgumentError("hash_ids must be whole numbers, 0 or more");
      }
      entry.blocks.push_back(number);
    }
  }
  entry.at = absl::Milliseconds(milliseconds);
  entry.input_tokens = static_cast<uint32_t>(input);
  entry.output_tokens = static_cast<uint32_t>(output);
  return entry;
}

class TraceSource final : public SessionSource {
 public:
  TraceSource(std::shared_ptr<const Trace> trace, const TraceReplay& replay, uint64_t seed)
      : trace_(std::move(trace)), replay_(replay), seed_(Mix64(seed)), rng_(~seed) {}

  std::optional<Session> Next() override {
    if (next_ >= trace_->entries.size()) return std::nullopt;
    const TraceEntry& entry = trace_->entries[next_++];
    Turn turn;
    uint32_t left = Scaled(entry.input_tokens);
    if (replay_.input_tokens_max > 0) left = std::min(left, replay_.input_tokens_max);
    const uint32_t block = Scaled(replay_.block_tokens);
    for (const uint64_t id : entry.blocks) {
      if (left == 0) break;
      const uint32_t tokens = std::min(block, left);
      turn.pieces.push_back({seed_ ^ Mix64(id), tokens});
      left -= tokens;
    }
    // Without blocks, or where the list is shorter than the length says.
    if (left > 0) turn.pieces.push_back({rng_.Next(), left});
    turn.output_tokens = Scaled(entry.output_tokens);
    if (replay_.output_tokens_max > 0) {
      turn.output_tokens = std::min(turn.output_tokens, replay_.output_tokens_max);
    }
    return Session{.start = entry.at / replay_.speed, .turns = {std::move(turn)}};
  }

 private:
  uint32_t Scaled(uint32_t tokens) const {
    return static_cast<uint32_t>(std::max(1.0, std::round(tokens * replay_.length_scale)));
  }

  const std::shared_ptr<const Trace> trace_;
  const TraceReplay replay_;
  const uint64_t seed_;
  Rng rng_;
  size_t next_ = 0;
};

}  // namespace

absl::StatusOr<Trace> ParseTrace(std::string_view text, const std::string& name) {
  Trace trace;
  Lines lines(text);
  std::string_view line;
  const auto at_line = [&](const absl::Status& status) {
    return Annotate(status, absl::StrCat(name, ":", lines.number()));
  };
  if (!lines.Next(line)) return absl::InvalidArgumentError(name + ": is empty");
  std::optional<Csv> csv;
  bool more = true;
  if (line[line.find_first_not_of(" \t")] == '{') {
    trace.format = "mooncake";
  } else {
    csv = CsvOf(SplitCsv(line));
    if (!csv) {
      return at_line(absl::InvalidArgumentError(
          "is neither a JSON object (Mooncake) nor a CSV header with Timestamp, Request tokens, Response "
          "tokens (BurstGPT) or TIMESTAMP, ContextTokens, GeneratedTokens (Azure)"));
    }
    trace.format = csv->format;
    more = lines.Next(line);
  }
  simdjson::dom::parser parser;
  for (; more; more = lines.Next(line)) {
    auto entry = csv ? CsvEntry(*csv, line) : JsonEntry(parser, line);
    if (!entry.ok()) return at_line(entry.status());
    if (entry->input_tokens == 0 || entry->output_tokens == 0) {
      ++trace.left_out;
      continue;
    }
    if (!trace.entries.empty() && entry->at < trace.entries.back().at - absl::Seconds(1)) {
      return at_line(absl::InvalidArgumentError("is earlier than the line before it"));
    }
    if (trace.entries.size() >= kEntriesMax) {
      return at_line(
          absl::InvalidArgumentError(absl::StrCat("is beyond the ", kEntriesMax, " entries taken")));
    }
    trace.entries.push_back(*std::move(entry));
  }
  if (trace.entries.empty()) return absl::InvalidArgumentError(name + ": holds no request");
  std::stable_sort(trace.entries.begin(), trace.entries.end(),
                   [](const TraceEntry& a, const TraceEntry& b) { return a.at < b.at; });
  const absl::Duration first = trace.entries.front().at;
  for (TraceEntry& entry : trace.entries) entry.at -= first;
  return trace;
}

absl::StatusOr<Trace> ReadTrace(const std::string& path) {
  TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kTraceBytesMax));
  return ParseTrace(text, path);
}

std::unique_ptr<SessionSource> MakeSource(std::shared_ptr<const Trace> trace, const TraceReplay& replay,
                                          uint64_t seed) {
  return std::make_unique<TraceSource>(std::move(trace), replay, seed);
}

}  // namespace tidepool
