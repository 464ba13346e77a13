#include "server/cli/jsonl.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/model/strings/hex.h"
#include "server/model/strings/utf8.h"

namespace tidepool {
namespace {

constexpr size_t kReadBytes = 1 << 20;
constexpr size_t kLineBytesMax = size_t{256} << 20;

// The code unit of the \uXXXX at text[at], or -1.
int CodeUnit(std::string_view text, size_t at) {
  if (at + 6 > text.size() || text[at] != '\\' || text[at + 1] != 'u') return -1;
  return HexValue(text.substr(at + 2, 4));
}

// Surrogate escapes without their other half become U+FFFD. Outside of strings there are no backslashes.
std::string MendSurrogates(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    if (text[i] != '\\') {
      out.push_back(text[i++]);
      continue;
    }
    const int unit = CodeUnit(text, i);
    if (unit < 0) {  // another escape: two characters, the second of which may be a backslash
      out.append(text.substr(i, 2));
      i += 2;
      continue;
    }
    const int next = unit >= 0xD800 && unit < 0xDC00 ? CodeUnit(text, i + 6) : -1;
    if (next >= 0xDC00 && next < 0xE000) {
      out.append(text.substr(i, 12));
      i += 12;
    } else {
      out.append(unit >= 0xD800 && unit < 0xE000 ? std::string_view("\\ufffd") : text.substr(i, 6));
      i += 6;
    }
  }
  return out;
}

}  // namespace

absl::StatusOr<OrderedJson> ParseJsonLine(std::string_view line) {
  auto json = ParseJson(line);
  if (json.ok()) return json;
  const std::string mended = MendSurrogates(utf8::Sanitize(line));
  if (mended == line) return json;
  return ParseJson(mended);
}

int RunJsonLines(int in, std::FILE* out, std::string_view error_prefix, const LineFn& fn) {
  std::vector<char> buffer(kReadBytes);
  std::string rest, written;
  uint64_t number = 0, bad = 0;
  const auto flush = [&] {
    std::fwrite(written.data(), 1, written.size(), out);
    written.clear();
  };
  const auto take = [&](std::string_view line) {
    ++number;
    if (line.find_first_not_of(" \t\r") == line.npos) return;
    const size_t begin = written.size();
    auto json = ParseJsonLine(line);
    absl::Status status = json.status();
    if (status.ok() && !json->is_object()) status = absl::InvalidArgumentError("must be a JSON object");
    if (status.ok()) status = fn(*json, written);
    if (!status.ok()) {
      ++bad;
      written.resize(begin);
      absl::StrAppend(&written, "{", std::string(error_prefix), "\"error\":");
      AppendJsonString(absl::StrCat("line ", number, ": ", std::string(status.message())), written);
      written.push_back('}');
    }
    written.push_back('\n');
    if (written.size() >= kReadBytes) flush();
  };
  ssize_t n = 0;
  // read(2), not fread: that waits for a full buffer, and whoever feeds line by line waits for the answers.
  while ((n = ::read(in, buffer.data(), buffer.size())) != 0) {
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) break;
    std::string_view chunk(buffer.data(), static_cast<size_t>(n));
    for (size_t end = chunk.find('\n'); end != chunk.npos; end = chunk.find('\n')) {
      if (rest.empty()) {
        take(chunk.substr(0, end));
      } else {
        rest.append(chunk.substr(0, end));
        take(std::exchange(rest, {}));
      }
      chunk.remove_prefix(end + 1);
    }
    rest.append(chunk);
    if (rest.size() > kLineBytesMax) {
      flush();
      std::fprintf(stderr, "tidepool: line %llu is longer than %zu MB\n",
                   static_cast<unsigned long long>(number + 1), kLineBytesMax >> 20);
      return 1;
    }
    if (static_cast<size_t>(n) < buffer.size()) {
      flush();
      std::fflush(out);
    }
  }
  if (!rest.empty()) take(rest);
  flush();
  // A write that failed earlier is not seen by the last flush: what could not be written is dropped.
  if (std::fflush(out) != 0 || std::ferror(out) != 0 || n < 0) {
    std::fprintf(stderr, "tidepool: %s\n", std::strerror(errno));
    return 1;
  }
  if (bad == 0) return 0;
  std::fprintf(stderr, "tidepool: %llu of %llu lines could not be read; see their \"error\"\n",
               static_cast<unsigned long long>(bad), static_cast<unsigned long long>(number));
  return 1;
}

}  // namespace tidepool
