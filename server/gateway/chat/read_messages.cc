#include "server/gateway/chat/read_messages.h"

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/chat/read_tools.h"
#include "server/gateway/errors.h"

namespace tidepool {
namespace {

constexpr size_t kMessagesMax = 4096;
constexpr size_t kPartsMax = 1024;
constexpr size_t kIdBytes = 256;
constexpr std::string_view kRoles[] = {"system", "developer", "user", "assistant", "tool"};

// Null pointer: absent or null.
const OrderedJson* Find(const OrderedJson& object, const char* field) {
  const auto it = object.find(field);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

// Content as OpenAI allows it, a string or a list of text parts, to one string.
absl::StatusOr<OrderedJson> ReadContent(const std::string& where, const OrderedJson& content) {
  if (content.is_string() || content.is_null()) return content;
  if (!content.is_array()) return FieldError(where, "must be a string or a list of text parts");
  if (content.size() > kPartsMax)
    return FieldError(where, absl::StrCat("must have at most ", kPartsMax, " parts"));
  std::string text;
  for (size_t i = 0; i < content.size(); ++i) {
    const OrderedJson& part = content[i];
    const std::string path = absl::StrCat(where, "[", i, "]");
    if (!part.is_object() || !part.contains("type") || !part["type"].is_string()) {
      return FieldError(path, "must be an object with a type");
    }
    if (part["type"] != "text") return FieldError(path + ".type", "only 'text' is supported");
    if (!part.contains("text") || !part["text"].is_string()) {
      return FieldError(path + ".text", "must be a string");
    }
    // One part a line, as vLLM's "string" content format joins them.
    if (!text.empty()) text += '\n';
    text += part["text"].get_ref<const std::string&>();
  }
  return OrderedJson(std::move(text));
}

// A string of JSON, as OpenAI has it, or the object itself, as templates have it.
absl::StatusOr<OrderedJson> ReadArguments(const std::string& where, const OrderedJson* arguments) {
  const char* what = "must be a string that holds a JSON object";
  if (arguments == nullptr) return OrderedJson::object();
  if (arguments->is_object()) return *arguments;
  if (!arguments->is_string()) return FieldError(where, what);
  const auto& text = arguments->get_ref<const std::string&>();
  if (text.empty()) return OrderedJson::object();
  auto json = ParseJson(text);
  if (!json.ok() || !json->is_object()) return FieldError(where, what);
  return json;
}

absl::StatusOr<OrderedJson> ReadToolCall(const std::string& where, const OrderedJson& call) {
  if (!call.is_object()) return FieldError(where, "must be an object with id, type and function");
  if (const OrderedJson* type = Find(call, "type"); type != nullptr && *type != "function") {
    return FieldError(where + ".type", "only 'function' is supported");
  }
  const OrderedJson* id = Find(call, "id");
  if (id == nullptr || !id->is_string() || id->get_ref<const std::string&>().empty() ||
      id->get_ref<const std::string&>().size() > kIdBytes) {
    return FieldError(where + ".id", absl::StrCat("must be a string of at most ", kIdBytes, " bytes"));
  }
  const OrderedJson* function = Find(call, "function");
  if (function == nullptr || !function->is_object()) {
    return FieldError(where + ".function", "must be an object with name and arguments");
  }
  const OrderedJson* name = Find(*function, "name");
  if (name == nullptr || !name->is_string() || !IsToolName(name->get_ref<const std::string&>())) {
    return FieldError(where + ".function.name", kToolNameRule);
  }
  TP_ASSIGN_OR_RETURN(OrderedJson arguments,
                      ReadArguments(where + ".function.arguments", Find(*function, "arguments")));
  return OrderedJson{{"id", *id},
                     {"type", "function"},
                     {"function", {{"name", *name}, {"arguments", std::move(arguments)}}}};
}

absl::Status ReadToolCalls(const std::string& where, const OrderedJson& message, OrderedJson& clean) {
  const OrderedJson* calls = Find(message, "tool_calls");
  if (calls == nullptr || (calls->is_array() && calls->empty())) return absl::OkStatus();
  const std::string field = where + ".tool_calls";
  if (clean["role"] != "assistant") return FieldError(field, "belongs to messages with role assistant only");
  if (!calls->is_array() || calls->size() > kToolsMax) {
    return FieldError(field, absl::StrCat("must be a list of at most ", kToolsMax, " calls"));
  }
  OrderedJson list = OrderedJson::array();
  for (size_t i = 0; i < calls->size(); ++i) {
    TP_ASSIGN_OR_RETURN(OrderedJson call, ReadToolCall(absl::StrCat(field, "[", i, "]"), (*calls)[i]));
    list.push_back(std::move(call));
  }
  clean["tool_calls"] = std::move(list);
  return absl::OkStatus();
}

absl::StatusOr<OrderedJson> ReadMessage(const std::string& where, const OrderedJson& message) {
  if (!message.is_object()) return FieldError(where, "must be an object with role and content");
  const OrderedJson* role = Find(message, "role");
  if (role == nullptr || !role->is_string() || role->get_ref<const std::string&>().empty()) {
    return FieldError(where + ".role", "must be a string such as 'user'");
  }
  const auto& name = role->get_ref<const std::string&>();
  if (std::ranges::find(kRoles, name) == std::end(kRoles)) {
    return FieldError(where + ".role", "must be one of system, developer, user, assistant, tool");
  }
  for (const char* field : {"function_call", "audio", "refusal"}) {
    if (const OrderedJson* value = Find(message, field);
        value != nullptr && !value->empty() && *value != "") {
      return FieldError(where + "." + field, "is not supported; leave it out");
    }
  }
  OrderedJson clean;
  // Templates know system; developer is OpenAI's later name for it.
  clean["role"] = name == "developer" ? "system" : name;
  TP_RETURN_IF_ERROR(ReadToolCalls(where, message, clean));
  const auto content = message.find("content");
  const bool may_lack = clean.contains("tool_calls") || (content != message.end() && name == "assistant");
  if ((content == message.end() || content->is_null()) && !may_lack) {
    return FieldError(where + ".content", "must be a string or a list of text parts");
  }
  clean["content"] = nullptr;
  if (content != message.end()) {
    TP_ASSIGN_OR_RETURN(clean["content"], ReadContent(where + ".content", *content));
  }
  for (const char* field : {"name", "reasoning_content", "reasoning", "tool_call_id"}) {
    if (const OrderedJson* extra = Find(message, field)) {
      if (!extra->is_string()) return FieldError(where + "." + field, "must be a string");
      clean[field] = *extra;
    }
  }
  if (name == "tool" && !clean.contains("tool_call_id")) {
    return FieldError(where + ".tool_call_id", "must be the id of the call that this is the result of");
  }
  // Templates know one of the names.
  if (clean.contains("reasoning") && !clean.contains("reasoning_content")) {
    clean["reasoning_content"] = OrderedJson(clean["reasoning"]);
  }
  return clean;
}

}  // namespace

absl::StatusOr<OrderedJson> ReadMessages(const OrderedJson& body) {
  const auto it = body.find("messages");
  if (it == body.end() || !it->is_array() || it->empty()) {
    return FieldError("messages", "must be a list of at least one message");
  }
  if (it->size() > kMessagesMax) {
    return FieldError("messages", absl::StrCat("must have at most ", kMessagesMax, " messages"));
  }
  OrderedJson messages = OrderedJson::array();
  for (size_t i = 0; i < it->size(); ++i) {
    TP_ASSIGN_OR_RETURN(OrderedJson message, ReadMessage(absl::StrCat("messages[", i, "]"), (*it)[i]));
    messages.push_back(std::move(message));
  }
  return messages;
}

}  // namespace tidepool
