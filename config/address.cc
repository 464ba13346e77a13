#include "config/address.h"

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace tidepool {

std::string HostPort::ToString() const {
  const bool v6 = host.find(':') != std::string::npos;
  return absl::StrCat(v6 ? "[" : "", host, v6 ? "]" : "", ":", port);
}

bool HostPort::IsLoopback() const {
  return host == "localhost" || host == "::1" || absl::StartsWith(host, "127.");
}

absl::StatusOr<HostPort> ParseHostPort(std::string_view text) {
  const auto error = [&](std::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("'", std::string(text), "' ", std::string(what),
                                                   "; write HOST:PORT as in 127.0.0.1:8000 or [::1]:8000"));
  };
  HostPort out;
  std::string_view port;
  if (!text.empty() && text.front() == '[') {
    const size_t close = text.find(']');
    if (close == std::string_view::npos) return error("lacks the closing bracket");
    out.host = text.substr(1, close - 1);
    if (close + 1 >= text.size() || text[close + 1] != ':') return error("has no port");
    port = text.substr(close + 2);
  } else {
    const size_t colon = text.rfind(':');
    if (colon == std::string_view::npos) return error("has no port");
    out.host = text.substr(0, colon);
    if (out.host.find(':') != std::string::npos) return error("has an IPv6 host without brackets");
    port = text.substr(colon + 1);
  }
  if (out.host.empty()) return error("has no host");
  uint32_t number = 0;
  const bool digits = port.find_first_not_of("0123456789") == std::string_view::npos && !port.empty();
  if (!digits || !absl::SimpleAtoi(std::string(port), &number) || number > 65535) {
    return error("has a port that is not in [0, 65535]");
  }
  out.port = static_cast<uint16_t>(number);
  return out;
}

}  // namespace tidepool
