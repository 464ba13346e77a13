#include "server/gateway/chat/read_tools.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/errors.h"
#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

constexpr size_t kDescriptionChars = 1 << 20;
constexpr std::string_view kChoiceRule =
    "must be none, auto, required, {\"type\":\"function\",\"function\":{\"name\":...}} or "
    "{\"type\":\"allowed_tools\",\"allowed_tools\":{\"mode\":...,\"tools\":[...]}}";

// "where.field: what" out of FieldReader's "field: what".
absl::Status Inside(const std::string& where, const absl::Status& status) {
  return absl::InvalidArgumentError(where + "." + std::string(status.message()));
}

absl::StatusOr<Tool> ReadTool(const std::string& where, const OrderedJson& json, OrderedJson& shown) {
  if (!json.is_object()) return FieldError(where, "must be an object with type and function");
  const FieldReader outer(json);
  if (const OrderedJson* type = outer.Find("type"); type != nullptr && *type != "function") {
    return FieldError(where + ".type", "only 'function' is supported");
  }
  const OrderedJson* function = outer.Find("function");
  const std::string inside = where + ".function";
  if (function == nullptr || !function->is_object()) {
    return FieldError(inside, "must be an object with name, description and parameters");
  }
  const FieldReader fields(*function);
  Tool tool;
  tool.field = inside + ".parameters";
  const OrderedJson* name = fields.Find("name");
  if (name == nullptr || !name->is_string() || !IsToolName(name->get_ref<const std::string&>())) {
    return FieldError(inside + ".name", kToolNameRule);
  }
  tool.name = name->get<std::string>();
  const auto description = fields.String("description", kDescriptionChars);
  if (!description.ok()) return Inside(inside, description.status());
  tool.description = description->value_or("");
  if (const OrderedJson* parameters = fields.Find("parameters")) {
    if (!parameters->is_object())
      return FieldError(inside + ".parameters", "must be a JSON schema, an object");
    if (const auto type = parameters->find("type"); type != parameters->end() && *type != "object") {
      return FieldError(inside + ".parameters", "must have type object: arguments go by their names");
    }
    tool.parameters = *parameters;
  }
  const auto strict = fields.Bool("strict");
  if (!strict.ok()) return Inside(inside, strict.status());
  tool.strict = strict->value_or(false);
  // As the client wrote it: templates print it in its order. `strict` is for the server.
  OrderedJson clean = *function;
  clean.erase("strict");
  shown = {{"type", "function"}, {"function", std::move(clean)}};
  return tool;
}

// Leaves the tools with these names, here and for the template.
void Keep(const std::vector<std::string>& names, ToolOptions& tools, OrderedJson* shown) {
  std::vector<Tool> kept;
  OrderedJson kept_shown = OrderedJson::array();
  for (size_t i = 0; i < tools.tools.size(); ++i) {
    if (std::ranges::find(names, tools.tools[i].name) == names.end()) continue;
    kept.push_back(std::move(tools.tools[i]));
    if (shown != nullptr) kept_shown.push_back((*shown)[i]);
  }
  tools.tools = std::move(kept);
  if (shown != nullptr) *shown = std::move(kept_shown);
}

absl::StatusOr<std::string> ReadName(const OrderedJson& json, const ToolOptions& tools) {
  const auto type = json.find("type"), function = json.find("function");
  if (type == json.end() || *type != "function" || function == json.end() || !function->is_object() ||
      !function->contains("name") || !(*function)["name"].is_string()) {
    return FieldError("tool_choice", kChoiceRule);
  }
  auto name = (*function)["name"].get<std::string>();
  if (std::ranges::none_of(tools.tools, [&](const Tool& tool) { return tool.name == name; })) {
    return FieldError("tool_choice",
                      absl::StrCat("names '", name.substr(0, kToolNameBytesMax), "', which is not in tools"));
  }
  return name;
}

absl::StatusOr<ToolChoice> ReadMode(const OrderedJson& mode) {
  if (mode == "none") return ToolChoice::kNone;
  if (mode == "auto") return ToolChoice::kAuto;
  if (mode == "required") return ToolChoice::kRequired;
  return FieldError("tool_choice", kChoiceRule);
}

absl::Status ReadAllowed(const OrderedJson& choice, ToolOptions& tools, OrderedJson& shown) {
  const auto allowed = choice.find("allowed_tools");
  if (allowed == choice.end() || !allowed->is_object() || !allowed->contains("mode") ||
      !allowed->contains("tools") || !(*allowed)["tools"].is_array() || (*allowed)["tools"].empty() ||
      (*allowed)["tools"].size() > kToolsMax) {
    return FieldError("tool_choice", kChoiceRule);
  }
  TP_ASSIGN_OR_RETURN(tools.choice, ReadMode((*allowed)["mode"]));
  std::vector<std::string> names;
  for (const OrderedJson& one : (*allowed)["tools"]) {
    if (!one.is_object()) return FieldError("tool_choice", kChoiceRule);
    TP_ASSIGN_OR_RETURN(std::string name, ReadName(one, tools));
    names.push_back(std::move(name));
  }
  Keep(names, tools, &shown);
  return absl::OkStatus();
}

absl::Status ReadChoice(const OrderedJson* choice, ToolOptions& tools, OrderedJson& shown) {
  tools.choice = tools.tools.empty() ? ToolChoice::kNone : ToolChoice::kAuto;
  if (choice == nullptr || *choice == "none") {
    if (choice != nullptr) tools.choice = ToolChoice::kNone;
    return absl::OkStatus();
  }
  if (tools.tools.empty()) return FieldError("tool_choice", "needs tools");
  if (choice->is_string()) {
    TP_ASSIGN_OR_RETURN(tools.choice, ReadMode(*choice));
    return absl::OkStatus();
  }
  if (!choice->is_object()) return FieldError("tool_choice", kChoiceRule);
  if (const auto type = choice->find("type"); type != choice->end() && *type == "allowed_tools") {
    return ReadAllowed(*choice, tools, shown);
  }
  TP_ASSIGN_OR_RETURN(std::string name, ReadName(*choice, tools));
  tools.choice = ToolChoice::kNamed;
  // The model is shown the others, too, so that the prompt's prefix stays what it was.
  Keep({std::move(name)}, tools, nullptr);
  return absl::OkStatus();
}

}  // namespace

bool IsToolName(std::string_view name) {
  return !name.empty() && name.size() <= kToolNameBytesMax && std::ranges::all_of(name, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
  });
}

absl::Status ReadTools(const OrderedJson& body, ToolOptions& tools, ChatInput& chat) {
  const FieldReader fields(body);
  OrderedJson shown = OrderedJson::array();
  if (const OrderedJson* list = fields.Find("tools")) {
    if (!list->is_array() || list->size() > kToolsMax) {
      return FieldError("tools", absl::StrCat("must be a list of at most ", kToolsMax, " tools"));
    }
    for (size_t i = 0; i < list->size(); ++i) {
      const std::string where = absl::StrCat("tools[", i, "]");
      OrderedJson& one = shown.emplace_back();
      TP_ASSIGN_OR_RETURN(Tool tool, ReadTool(where, (*list)[i], one));
      if (std::ranges::any_of(tools.tools, [&](const Tool& other) { return other.name == tool.name; })) {
        return FieldError(where + ".function.name", "is the name of an earlier tool; each needs its own");
      }
      tools.tools.push_back(std::move(tool));
    }
  }
  TP_RETURN_IF_ERROR(ReadChoice(fields.Find("tool_choice"), tools, shown));
  TP_ASSIGN_OR_RETURN(const auto parallel, fields.Bool("parallel_tool_calls"));
  tools.parallel = parallel.value_or(true);
  if (tools.active()) {
    chat.tools = std::move(shown);
  } else {
    tools.tools.clear();
  }
  return absl::OkStatus();
}

}  // namespace tidepool
