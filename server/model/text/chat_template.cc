#include "server/model/text/chat_template.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/model/text/jinja_interpreter.h"
#include "server/model/text/jinja_parser.h"

namespace tidepool {

namespace {

absl::Status ToStatus(const jinja::Failure& failure) {
  const std::string message = absl::StrCat("chat template ", failure.message);
  return failure.kind == jinja::Failure::kLimit ? absl::ResourceExhaustedError(message)
                                                : absl::InvalidArgumentError(message);
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

absl::StatusOr<std::string> ChatTemplate::Render(const nlohmann::ordered_json& context,
                                                 const Limits& limits) const {
  if (!context.is_object()) {
    return absl::InvalidArgumentError("chat template: the context must be an object");
  }
  try {
    auto root = std::make_shared<jinja::Scope>();
    for (const auto& [key, value] : context.items()) {
      root->variables.insert_or_assign(key, jinja::Value::FromJson(value));
    }
    jinja::Interpreter interpreter({.steps_max = limits.steps_max,
                                    .output_bytes_max = limits.output_bytes_max,
                                    .alloc_bytes_max = limits.alloc_bytes_max,
                                    .depth_max = limits.depth_max,
                                    .now = limits.now.value_or(absl::Now()),
                                    .zone = limits.zone},
                                   std::move(root));
    return interpreter.Run(*parsed_);
  } catch (const jinja::Failure& failure) {
    return ToStatus(failure);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("chat template: no memory left");
  }
}

}  // namespace tidepool
