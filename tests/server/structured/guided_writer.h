#pragma once

#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "server/structured/matcher.h"

namespace tidepool {

// GuidedWriter: writes a JSON value in the spelling that a grammar has for it, if it has one: no white space,
// whole numbers without a point, and properties in an order that the grammar takes (the one given first, then
// others, with backtracking). So what is left is whether the *value* is in the language. Driver of `matcher`.
class GuidedWriter {
 public:
  using Json = nlohmann::ordered_json;
  // Tries of a property, over which a value is given up.
  static constexpr int kTriesMax = 3'000;

  explicit GuidedWriter(Matcher& matcher) : matcher_(matcher) {}

  // nullopt: the grammar has no spelling for it (or not within kTriesMax).
  std::optional<std::string> Write(const Json& value) {
    tries_ = 0;
    std::optional<std::string> text = Value("", value);
    if (!text || !Accepts(*text) || !matcher_.CanEnd()) return std::nullopt;
    return text;
  }

 private:
  bool Accepts(const std::string& prefix) {
    matcher_.Reset();
    return matcher_.AcceptBytes(prefix).ok();
  }

  static std::string Scalar(const Json& value) {
    if (value.is_number_float()) {
      const double v = value.get<double>();
      if (std::floor(v) == v && std::abs(v) < 1e15) return std::to_string(static_cast<int64_t>(v));
    }
    return value.dump();
  }

  std::optional<std::string> Value(const std::string& before, const Json& value) {
    if (value.is_array()) {
      std::string text = before + "[";
      for (size_t i = 0; i < value.size(); ++i) {
        std::optional<std::string> next = Value(i == 0 ? text : text + ",", value[i]);
        if (!next) return std::nullopt;
        text = *std::move(next);
      }
      return Checked(text + "]");
    }
    if (value.is_object()) {
      std::vector<std::string> names;
      for (const auto& item : value.items()) names.push_back(item.key());
      return Members(before + "{", value, names, true);
    }
    return Checked(before + Scalar(value));
  }

  std::optional<std::string> Checked(std::string text) {
    if (!Accepts(text)) return std::nullopt;
    return text;
  }

  std::optional<std::string> Members(const std::string& before, const Json& object,
                                     const std::vector<std::string>& names, bool first) {
    if (names.empty()) return Checked(before + "}");
    for (size_t i = 0; i < names.size(); ++i) {
      if (++tries_ > kTriesMax) return std::nullopt;
      const std::string head = before + (first ? "" : ",") + Json(names[i]).dump() + ":";
      if (!Accepts(head)) continue;
      const std::optional<std::string> text = Value(head, object[names[i]]);
      if (!text) continue;
      std::vector<std::string> rest = names;
      rest.erase(rest.begin() + static_cast<std::ptrdiff_t>(i));
      if (auto all = Members(*text, object, rest, false)) return all;
    }
    return std::nullopt;
  }

  Matcher& matcher_;
  int tries_ = 0;
};

// The names of all properties that a schema mentions, in the order in which it does; then `value`'s objects
// are given that order, so that GuidedWriter rarely has to search.
inline void PropertyOrder(const nlohmann::ordered_json& schema, std::vector<std::string>& out) {
  if (!schema.is_structured()) return;
  for (const auto& [name, item] : schema.items()) {
    if (schema.is_object()) {
      if (name == "properties" && item.is_object()) {
        for (const auto& property : item.items()) out.push_back(property.key());
      }
      if (name == "required" && item.is_array()) {
        for (const auto& property : item) {
          if (property.is_string()) out.push_back(property.get<std::string>());
        }
      }
    }
    PropertyOrder(item, out);
  }
}

}  // namespace tidepool
