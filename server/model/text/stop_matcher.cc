#include "server/model/text/stop_matcher.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace tidepool {

absl::StatusOr<StopMatcher> StopMatcher::Create(std::vector<std::string> stops, bool include_stop_str) {
  if (stops.size() > kStopsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("stop has ", stops.size(), " strings; at most ", kStopsMax, " are allowed"));
  }
  for (size_t i = 0; i < stops.size(); ++i) {
    if (stops[i].empty()) return absl::InvalidArgumentError(absl::StrCat("stop[", i, "] must not be empty"));
    if (stops[i].size() > kStopBytesMax) {
      return absl::InvalidArgumentError(absl::StrCat("stop[", i, "] has ", stops[i].size(),
                                                     " bytes; at most ", kStopBytesMax, " are allowed"));
    }
  }
  return StopMatcher(std::move(stops), include_stop_str);
}

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include) : include_(include) {
  for (std::string& text : stops) {
    Stop stop{std::move(text), {0, 0}, 0};
    for (size_t n = 1; n < stop.text.size(); ++n) {
      uint32_t k = stop.border[n];
      while (k > 0 && stop.text[k] != stop.text[n]) k = stop.border[k];
      stop.border.push_back(stop.text[k] == stop.text[n] ? k + 1 : 0);
    }
    stops_.push_back(std::move(stop));
  }
}

StopMatcher::Result StopMatcher::Push(std::string_view text, bool may_match) {
  Result result;
  if (matched_) return result;
  for (size_t i = 0; i < text.size(); ++i) {
    size_t longest = 0;
    for (size_t s = 0; s < stops_.size(); ++s) {
      Stop& stop = stops_[s];
      while (stop.state > 0 && stop.text[stop.state] != text[i]) stop.state = stop.border[stop.state];
      if (stop.text[stop.state] == text[i]) ++stop.state;
      if (stop.state < stop.text.size()) continue;
      if (!may_match) {
        stop.state = stop.border[stop.state];
      } else if (stop.text.size() > longest) {
        longest = stop.text.size();
        result.matched = s;
      }
    }
    if (result.matched) {
      held_.append(text.substr(0, i + 1));
      result.emit = held_.substr(0, include_ ? held_.size() : held_.size() - longest);
      held_.clear();
      matched_ = true;
      return result;
    }
  }
  held_.append(text);
  size_t keep = 0;
  for (const Stop& stop : stops_) keep = std::max<size_t>(keep, stop.state);
  result.emit = held_.substr(0, held_.size() - keep);
  held_.erase(0, result.emit.size());
  return result;
}

std::string StopMatcher::Flush() { return std::exchange(held_, {}); }

}  // namespace tidepool
