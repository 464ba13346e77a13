#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace tidepool {

// MultipartReader: multipart/form-data (RFC 7578, RFC 2046 5.1) as it comes in (Core). Holds at most a part's
// headers and a delimiter, whatever the size of the parts. Errors, all InvalidArgument, are final.
class MultipartReader {
 public:
  static constexpr size_t kHeaderBytesMax = 8 << 10;
  static constexpr int kPartsMax = 16;

  struct Part {
    std::string name;      // of the form's field
    std::string filename;  // empty: a plain field
  };
  struct Events {
    std::function<absl::Status(const Part&)> begin;
    std::function<absl::Status(std::string_view)> data;  // of the part that began last
    std::function<absl::Status()> end;
  };

  // The boundary of a Content-Type header. Errors: InvalidArgument (another type, no boundary, a bad one).
  static absl::StatusOr<std::string> BoundaryOf(std::string_view content_type);

  MultipartReader(std::string_view boundary, Events events);

  absl::Status Feed(std::string_view bytes);
  // The body is over. Errors also: it ended before its last delimiter.
  absl::Status Finish();

 private:
  enum class State { kPreamble, kAfterDelimiter, kHeaders, kData, kEpilogue, kFailed };

  absl::Status Step(bool& more);
  absl::Status Fail(std::string message);
  absl::StatusOr<Part> ParseHeaders(std::string_view text) const;

  const std::string delimiter_;  // "\r\n--BOUNDARY"
  const Events events_;
  State state_ = State::kPreamble;
  std::string buffer_;
  int parts_ = 0;
};

}  // namespace tidepool
