// The bytes of one HTTP/1.1 connection: what RequestReader takes lies within its limits, does not depend on
// how the bytes were cut, and what it takes has one meaning (one length, one Host, no control characters).
#include <algorithm>
#include <cstring>

#include "server/http/request_reader.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

HttpLimits Limits() {
  HttpLimits limits;  // small, so that inputs reach them
  limits.body_bytes_max = 256;
  limits.header_bytes_max = 512;
  limits.header_field_bytes_max = 128;
  limits.header_count_max = 8;
  return limits;
}

size_t Count(const HttpRequest& request, std::string_view name) {
  return static_cast<size_t>(
      std::ranges::count_if(request.headers, [&](const auto& h) { return h.first == name; }));
}

void CheckRequest(const RequestReader::Taken& taken, const HttpLimits& limits) {
  const HttpRequest& request = taken.request;
  TP_CHECK(!request.method.empty());
  TP_CHECK(taken.bad_path ? request.path.empty() : !request.path.empty());
  TP_CHECK(request.path.find('\0') == std::string::npos);
  TP_CHECK(request.body.size() <= limits.body_bytes_max);
  TP_CHECK(request.headers.size() <= limits.header_count_max);
  for (const auto& [name, value] : request.headers) {
    TP_CHECK(name.size() + value.size() <= limits.header_bytes_max);
    for (const char c : name + value) TP_CHECK(c != '\r' && c != '\n' && c != '\0');
    for (const char c : name) TP_CHECK(c < 'A' || c > 'Z');
  }
  const size_t lengths = Count(request, "content-length"), encodings = Count(request, "transfer-encoding");
  TP_CHECK(lengths + encodings <= 1);
  TP_CHECK(Count(request, "host") <= 1 && (!taken.http11 || Count(request, "host") == 1));
  if (lengths == 0 && encodings == 0) TP_CHECK(request.body.empty());
}

struct Outcome {
  std::string taken;  // a summary of the requests
  int error = 0;      // the status that ended the connection
};

// What came of `input`, cut where `cuts` says.
Outcome Run(std::string_view input, fuzz::ByteReader cuts, const HttpLimits& limits) {
  RequestReader reader(limits);
  Outcome out;
  bool head = false;
  while (!input.empty()) {
    const size_t n = std::min<size_t>(input.size(), cuts.empty() ? input.size() : 1 + cuts.UpTo(15));
    const auto room = reader.Prepare(n);
    TP_CHECK(room.size() >= n);
    std::memcpy(room.data(), input.data(), n);
    reader.Commit(n);
    input.remove_prefix(n);
    for (;;) {
      const auto step = reader.Next();
      if (step == RequestReader::Step::kMore) break;
      if (step == RequestReader::Step::kError) {
        TP_CHECK(reader.unread() == 0);
        TP_CHECK(reader.error().kind.status >= 400 && !reader.error().message.empty());
        out.error = reader.error().kind.status;
        return out;
      }
      if (step == RequestReader::Step::kHead) {
        TP_CHECK(!head);
        head = true;
        continue;
      }
      TP_CHECK(head);
      head = false;
      const auto taken = reader.Take();
      CheckRequest(taken, limits);
      out.taken += taken.request.method + " " + taken.request.path + "?" + taken.request.query + "\n" +
                   taken.request.body + (taken.keep_alive ? "+" : "-");
    }
    TP_CHECK(reader.unread() <= limits.header_bytes_max + 16);
  }
  return out;
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(http) {
  const HttpLimits limits = Limits();
  const auto parts = fuzz::Split(input, 2);
  const std::string_view bytes = parts[1].empty() ? parts[0] : parts[1];
  const Outcome whole = Run(bytes, fuzz::ByteReader(""), limits);
  const Outcome cut = Run(bytes, fuzz::ByteReader(parts[0]), limits);
  // Heads, chunk headers and trailers are measured when they are parsed or when more has come than is
  // allowed: at the edge of a limit the cut decides whether they pass. What both took may not depend on it.
  const size_t both = std::min(whole.taken.size(), cut.taken.size());
  TP_CHECK(whole.taken.substr(0, both) == cut.taken.substr(0, both));
  if (whole.error == 0 && cut.error == 0) TP_CHECK(whole.taken.size() == cut.taken.size());
}

}  // namespace tidepool
