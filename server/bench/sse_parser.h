#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace tidepool {

// SseParser: Codec of a stream of server-sent events, fed in pieces cut anywhere. Source: WHATWG HTML,
// section 9.2.6: lines end in LF, CR or CRLF; "field: value"; a line that begins with ':' is a comment; an
// empty line ends the event; several data lines are joined by LF; an event without data is none. What is left
// at the end of the stream is dropped, as the standard has it. Not thread-safe.
class SseParser {
 public:
  // name: of its event field, mostly "". Both borrowed for the call.
  using EventFn = absl::FunctionRef<void(std::string_view name, std::string_view data)>;

  // Of one event, and of one line.
  explicit SseParser(size_t event_bytes_max = size_t{16} << 20) : event_bytes_max_(event_bytes_max) {}

  // ResourceExhausted: an event beyond event_bytes_max; the parser is of no use then.
  absl::Status Feed(std::string_view bytes, EventFn event);

 private:
  void Line(std::string_view line, EventFn event);

  const size_t event_bytes_max_;
  std::string line_;  // a line's beginning, where a piece ended in it
  std::string name_, data_;
  bool has_data_ = false;
  bool after_cr_ = false;  // an LF now belongs to the line's end
  bool first_line_ = true;
};

}  // namespace tidepool
