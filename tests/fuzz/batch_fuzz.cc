// Batches: a form reads the same in whatever pieces it comes, and gives back no more than it was given; a
// line is read without a fault, and what is written about it reads back. The input is a form, the separator,
// lines.
#include <algorithm>

#include "server/batch/line.h"
#include "server/batch/prompt_path.h"
#include "server/gateway/files_multipart.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

struct Form {
  std::string seen;  // all parts, in order
  size_t data_bytes = 0;
  bool ok = false;

  bool operator==(const Form&) const = default;
};

Form Read(std::string_view body, size_t piece) {
  Form form;
  MultipartReader reader("B", {[&](const MultipartReader::Part& part) {
                                 form.seen += "<" + part.name + "|" + part.filename + ">";
                                 return absl::OkStatus();
                               },
                               [&](std::string_view bytes) {
                                 form.seen.append(bytes);
                                 form.data_bytes += bytes.size();
                                 return absl::OkStatus();
                               },
                               [&] {
                                 form.seen += "<end>";
                                 return absl::OkStatus();
                               }});
  for (size_t at = 0; at < body.size(); at += piece) {
    if (!reader.Feed(body.substr(at, piece)).ok()) return form;
  }
  form.ok = reader.Finish().ok();
  return form;
}

void ReadLine(std::string_view text) {
  const BatchLine line = ParseBatchLine(text, 1);
  if (line.error) {
    const auto back = ParseDoneLine(FormatFailure(line.custom_id, *line.error));
    TP_CHECK(back.ok() && !back->ok && back->custom_id == line.custom_id);
    TP_CHECK(!line.custom_id.empty() || back->line == 1);
    return;
  }
  TP_CHECK(!line.custom_id.empty() && std::ranges::count(BatchUrls(), line.url) == 1);
  const std::string body = DumpJson(line.body);
  const PromptPath path = PathOf(line.url, line.body);
  TP_CHECK(path.units.size() * kPathUnitBytes <= 6 * text.size() + kPathUnitBytes);
  const std::string answer = FormatAnswer(line.custom_id, 200, "id", body);
  TP_CHECK(std::ranges::count(answer, '\n') == 1);
  const auto back = ParseDoneLine(answer);
  // One level deeper than what was read: it may be one too many.
  TP_CHECK(!back.ok() || (back->ok && back->custom_id == line.custom_id));
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(batch) {
  const auto parts = fuzz::Split(input, 2);
  const Form whole = Read(parts[0], std::max<size_t>(1, parts[0].size()));
  TP_CHECK(whole.data_bytes <= parts[0].size());
  // What a broken form gave before its error depends on the pieces; whether it is broken does not.
  for (const size_t piece : {1, 7}) {
    const Form form = Read(parts[0], piece);
    TP_CHECK(form.ok == whole.ok && (!whole.ok || form == whole));
  }
  for (std::string_view rest = parts[1]; !rest.empty();) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    ReadLine(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  (void)ParseDoneLine(parts[1]);
}

}  // namespace tidepool
