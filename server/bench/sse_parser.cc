#include "server/bench/sse_parser.h"

namespace tidepool {

absl::Status SseParser::Feed(std::string_view bytes, EventFn event) {
  if (after_cr_ && !bytes.empty()) {
    if (bytes.front() == '\n') bytes.remove_prefix(1);
    after_cr_ = false;
  }
  while (!bytes.empty()) {
    const size_t end = bytes.find_first_of("\r\n");
    const std::string_view part = bytes.substr(0, end);
    if (line_.size() + part.size() > event_bytes_max_ || data_.size() + part.size() > event_bytes_max_) {
      return absl::ResourceExhaustedError("an event is larger than " + std::to_string(event_bytes_max_) +
                                          " bytes");
    }
    if (end == bytes.npos) {
      line_.append(part);
      break;
    }
    const bool cr = bytes[end] == '\r';
    bytes.remove_prefix(end + 1);
    if (cr && bytes.empty()) after_cr_ = true;
    if (cr && !bytes.empty() && bytes.front() == '\n') bytes.remove_prefix(1);
    if (line_.empty()) {
      Line(part, event);  // in one piece, as nearly always: no copy
    } else {
      line_.append(part);
      Line(line_, event);
      line_.clear();
    }
  }
  return absl::OkStatus();
}

void SseParser::Line(std::string_view line, EventFn event) {
  if (first_line_) {
    first_line_ = false;
    if (line.starts_with("\xEF\xBB\xBF")) line.remove_prefix(3);
  }
  if (line.empty()) {
    if (has_data_) event(name_, data_);
    name_.clear();
    data_.clear();
    has_data_ = false;
    return;
  }
  const size_t colon = line.find(':');
  const std::string_view field = line.substr(0, colon);
  std::string_view value = colon == line.npos ? std::string_view() : line.substr(colon + 1);
  if (value.starts_with(' ')) value.remove_prefix(1);
  if (field == "data") {
    if (has_data_) data_ += '\n';
    data_ += value;
    has_data_ = true;
  } else if (field == "event") {
    name_ = value;
  }
}

}  // namespace tidepool
