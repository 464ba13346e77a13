#include "server/http/router.h"

#include "base/status.h"

namespace tidepool {
namespace {

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

void Router::Add(std::string_view method, std::string_view path, HttpHandler handler) {
  const size_t brace = path.find('{');
  if (brace == std::string_view::npos) {
    exact_[std::string(path)][std::string(method)] = std::move(handler);
    return;
  }
  TP_CHECK(brace > 0 && path[brace - 1] == '/' && path.back() == '}');
  prefix_[std::string(path.substr(0, brace))][std::string(method)] = std::move(handler);
}

Router::Match Router::Find(std::string_view method, std::string_view path) const {
  Match match;
  const Methods* methods = nullptr;
  if (auto it = exact_.find(path); it != exact_.end()) {
    methods = &it->second;
  } else {
    size_t best = 0;
    for (const auto& [prefix, candidates] : prefix_) {
      if (prefix.size() > best && path.size() > prefix.size() && path.starts_with(prefix)) {
        best = prefix.size();
        methods = &candidates;
      }
    }
    if (methods != nullptr) match.param = std::string(path.substr(best));
  }
  if (methods == nullptr) return match;
  if (auto it = methods->find(method); it != methods->end()) {
    match.handler = &it->second;
    return match;
  }
  for (const auto& [name, unused] : *methods) match.allow += (match.allow.empty() ? "" : ", ") + name;
  return match;
}

std::optional<std::string> PercentDecode(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    if (text.size() - i < 3) return std::nullopt;
    const int hi = HexValue(text[i + 1]), lo = HexValue(text[i + 2]);
    if (hi < 0 || lo < 0 || (hi == 0 && lo == 0)) return std::nullopt;
    out += static_cast<char>(hi * 16 + lo);
    i += 2;
  }
  return out;
}

}  // namespace tidepool
