#include "server/gateway/files_multipart.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr size_t kBoundaryCharsMax = 70;  // RFC 2046 5.1.1

// The parameters of a header's value, "a; name=x; filename=\"y\"": the value of `key`, unquoted.
std::string Parameter(std::string_view value, std::string_view key) {
  size_t at = value.find(';');
  while (at != value.npos && at < value.size()) {
    ++at;
    while (at < value.size() && (value[at] == ' ' || value[at] == '\t')) ++at;
    const size_t equals = value.find('=', at);
    if (equals == value.npos) return "";
    const std::string name = absl::AsciiStrToLower(std::string(value.substr(at, equals - at)));
    std::string text;
    at = equals + 1;
    if (at < value.size() && value[at] == '"') {
      for (++at; at < value.size() && value[at] != '"'; ++at) {
        // Browsers write %22 for a quote and leave backslashes alone (Windows paths); others escape.
        if (value[at] == '\\' && at + 1 < value.size() && (value[at + 1] == '"' || value[at + 1] == '\\'))
          ++at;
        text.push_back(value[at]);
      }
      at = value.find(';', at);
    } else {
      const size_t end = std::min(value.find(';', at), value.size());
      text = std::string(absl::StripAsciiWhitespace(std::string(value.substr(at, end - at))));
      at = end;
    }
    if (name == key) return text;
  }
  return "";
}

}  // namespace

absl::StatusOr<std::string> MultipartReader::BoundaryOf(std::string_view content_type) {
  const std::string type = absl::AsciiStrToLower(
      absl::StripAsciiWhitespace(std::string(content_type.substr(0, content_type.find(';')))));
  if (type != "multipart/form-data") {
    return absl::InvalidArgumentError("Content-Type: must be multipart/form-data, with the file as a part");
  }
  std::string boundary = Parameter(content_type, "boundary");
  const bool fine = std::ranges::all_of(boundary, [](char c) { return c >= 0x20 && c < 0x7f; });
  if (boundary.empty() || boundary.size() > kBoundaryCharsMax || !fine) {
    return absl::InvalidArgumentError(
        absl::StrCat("Content-Type: needs a boundary of 1 to ", kBoundaryCharsMax, " printable characters"));
  }
  return boundary;
}

// The body begins as if a line had ended before it: the first delimiter needs none of its own.
MultipartReader::MultipartReader(std::string_view boundary, Events events)
    : delimiter_("\r\n--" + std::string(boundary)), events_(std::move(events)), buffer_("\r\n") {}

absl::Status MultipartReader::Fail(std::string message) {
  state_ = State::kFailed;
  buffer_.clear();
  return absl::InvalidArgumentError(message);
}

absl::Status MultipartReader::Feed(std::string_view bytes) {
  if (state_ == State::kFailed) return absl::InvalidArgumentError("the form is broken");
  // In pieces: a large one must not be moved to the front for each delimiter that it holds.
  constexpr size_t kPiece = 64 << 10;
  while (!bytes.empty() && state_ != State::kEpilogue) {
    buffer_.append(bytes.substr(0, kPiece));
    bytes.remove_prefix(std::min(kPiece, bytes.size()));
    for (bool more = true; more;) {
      if (const absl::Status status = Step(more); !status.ok()) {
        state_ = State::kFailed;
        return status;
      }
    }
  }
  return absl::OkStatus();
}

absl::Status MultipartReader::Step(bool& more) {
  more = false;
  switch (state_) {
    case State::kPreamble:
    case State::kData: {
      const size_t at = buffer_.find(delimiter_);
      // What cannot be the beginning of a delimiter.
      const size_t safe =
          at != buffer_.npos ? at : buffer_.size() - std::min(buffer_.size(), delimiter_.size() - 1);
      if (state_ == State::kData && safe > 0) {
        TP_RETURN_IF_ERROR(events_.data(std::string_view(buffer_).substr(0, safe)));
      }
      buffer_.erase(0, at == buffer_.npos ? safe : at + delimiter_.size());
      if (at == buffer_.npos) return absl::OkStatus();
      if (state_ == State::kData) TP_RETURN_IF_ERROR(events_.end());
      state_ = State::kAfterDelimiter;
      more = true;
      return absl::OkStatus();
    }
    case State::kAfterDelimiter: {
      if (buffer_.size() < 2) return absl::OkStatus();
      if (buffer_.starts_with("--")) {
        state_ = State::kEpilogue;
        buffer_.clear();
        return absl::OkStatus();
      }
      const size_t end = buffer_.find("\r\n");
      if (end == buffer_.npos ? buffer_.size() > kHeaderBytesMax : buffer_.find_first_not_of(" \t") != end) {
        return Fail("the form: a delimiter is followed by something else than the end of its line");
      }
      if (end == buffer_.npos) return absl::OkStatus();
      if (++parts_ > kPartsMax) return Fail(absl::StrCat("the form: more than ", kPartsMax, " parts"));
      buffer_.erase(0, end);  // its line end stays: a part without headers is "\r\n\r\n"
      state_ = State::kHeaders;
      more = true;
      return absl::OkStatus();
    }
    case State::kHeaders: {
      const size_t end = buffer_.find("\r\n\r\n");
      if (end == buffer_.npos || end > kHeaderBytesMax) {
        if (end != buffer_.npos || buffer_.size() > kHeaderBytesMax + 4) {
          return Fail(absl::StrCat("the form: a part's headers exceed ", kHeaderBytesMax, " bytes"));
        }
        return absl::OkStatus();
      }
      auto part = ParseHeaders(std::string_view(buffer_).substr(0, end));
      if (!part.ok()) return part.status();
      buffer_.erase(0, end + 4);
      TP_RETURN_IF_ERROR(events_.begin(*part));
      state_ = State::kData;
      more = true;
      return absl::OkStatus();
    }
    case State::kEpilogue:
    case State::kFailed:
      buffer_.clear();
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

absl::StatusOr<MultipartReader::Part> MultipartReader::ParseHeaders(std::string_view text) const {
  Part part;
  bool found = false;
  for (const std::string& line : std::vector<std::string>(absl::StrSplit(std::string(text), "\r\n"))) {
    const size_t colon = line.find(':');
    if (line.empty() || colon == std::string::npos) continue;
    if (!absl::EqualsIgnoreCase(line.substr(0, colon), "content-disposition")) continue;
    const std::string value(absl::StripAsciiWhitespace(line.substr(colon + 1)));
    if (!absl::EqualsIgnoreCase(value.substr(0, value.find(';')), "form-data")) continue;
    part.name = Parameter(value, "name");
    part.filename = Parameter(value, "filename");
    found = !part.name.empty();
  }
  if (!found) return absl::InvalidArgumentError("the form: a part has no Content-Disposition with its name");
  return part;
}

absl::Status MultipartReader::Finish() {
  if (state_ == State::kEpilogue) return absl::OkStatus();
  if (state_ == State::kFailed) return absl::InvalidArgumentError("the form is broken");
  return Fail("the form ends before its last delimiter");
}

}  // namespace tidepool
