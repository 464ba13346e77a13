#include "server/model/template/chat_template.h"

#include <algorithm>
#include <exception>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/model/template/jinja_interpreter.h"
#include "server/model/template/jinja_parser.h"

namespace tidepool {

namespace {

absl::Status ToStatus(const jinja::Failure& failure) {
  const std::string message = absl::StrCat("chat template ", failure.message);
  return failure.kind == jinja::Failure::kLimit ? absl::ResourceExhaustedError(message)
                                                : absl::InvalidArgumentError(message);
}

// `messages`: data, but for the roles that we know.
jinja::Value MessagesValue(const nlohmann::ordered_json& messages) {
  if (!messages.is_array()) return jinja::Value::FromJson(messages, /*data=*/true);
  std::vector<jinja::Value> items;
  items.reserve(messages.size());
  for (const auto& message : messages) {
    const auto role = message.is_object() ? message.find("role") : message.end();
    const bool known = role != message.end() && role->is_string() &&
                       std::ranges::find(ChatTemplate::kTrustedRoles, role->get_ref<const std::string&>()) !=
                           std::end(ChatTemplate::kTrustedRoles);
    jinja::Value value = jinja::Value::FromJson(message, /*data=*/true, /*depth=*/1);
    if (known) {
      jinja::Dict dict = value.dict();
      dict.Set(jinja::Text::Trusted("role"), jinja::Value::FromJson(*role, /*data=*/false));
      value = jinja::Value::MakeDict(std::move(dict)).MarkedIf(true);
    }
    items.push_back(std::move(value));
  }
  return jinja::Value::MakeList(std::move(items)).MarkedIf(true);
}

}  // namespace

absl::StatusOr<ChatTemplate> ChatTemplate::Parse(std::string source) {
  if (source.size() > kSourceBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("chat template has ", source.size(), " bytes; at most ", kSourceBytesMax, " are read"));
  }
  try {
    return ChatTemplate(jinja::ParseTemplate(source));
  } catch (const jinja::Failure& failure) {
    return ToStatus(failure);
  }
}

absl::StatusOr<MarkedText> ChatTemplate::Render(const nlohmann::ordered_json& request,
                                                const nlohmann::ordered_json& trusted,
                                                const Limits& limits) const {
  if (!request.is_object() || !trusted.is_object()) {
    return absl::InvalidArgumentError("chat template: the variables must be an object");
  }
  try {
    auto root = std::make_shared<jinja::Scope>();
    for (const auto& [key, value] : request.items()) {
      root->variables.insert_or_assign(
          key, key == "messages" ? MessagesValue(value) : jinja::Value::FromJson(value, /*data=*/true));
    }
    for (const auto& [key, value] : trusted.items()) {
      root->variables.insert_or_assign(key, jinja::Value::FromJson(value, /*data=*/false));
    }
    jinja::Interpreter interpreter({.steps_max = limits.steps_max,
                                    .output_bytes_max = limits.output_bytes_max,
                                    .alloc_bytes_max = limits.alloc_bytes_max,
                                    .depth_max = limits.depth_max,
                                    .time_max = limits.time_max,
                                    .now = limits.now.value_or(absl::Now()),
                                    .zone = limits.zone},
                                   std::move(root));
    return interpreter.Run(*parsed_);
  } catch (const jinja::Failure& failure) {
    return ToStatus(failure);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("chat template: no memory left");
  } catch (const std::exception& error) {
    // Whatever a template finds next must not take the process down.
    return absl::InternalError(absl::StrCat("chat template: ", error.what()));
  }
}

}  // namespace tidepool
