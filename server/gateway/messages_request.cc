#include "server/gateway/messages_request.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

constexpr size_t kMessagesMax = 16384;
constexpr size_t kBlocksMax = 4096;
constexpr int64_t kTokensMax = 1 << 24;
constexpr size_t kUserChars = 4096;

constexpr RefusedField kRefused[] = {
    {"container"},
    {"context_management", {}, "shorten the messages yourself"},
    {"mcp_servers"},
    {"diagnostics"},
    {"inference_geo"},
    {"speed", "\"standard\""},
    {"user_profile_id"},
    {"workspace_id"},
    // OpenAI's names: a client that sends them has the wrong endpoint, and would wonder.
    {"stop", {}, "use stop_sequences"},
    {"max_completion_tokens", {}, "use max_tokens"},
    {"response_format", {}, "use output_config.format"},
    {"reasoning_effort", {}, "use output_config.effort"},
    {"logprobs", "false"},
    {"top_logprobs", "0"},
    {"functions", {}, "use tools"},
    {"function_call", {}, "use tool_choice"},
    {"stream_options", {}, "the usage always comes with the stream"},
    {"include_reasoning", "true", "use thinking.display"},
    {"parallel_tool_calls", "true", "use tool_choice.disable_parallel_tool_use"},
    {"n", "1", "send one request for each"},
    {"best_of", "1"},
    {"echo", "false"},
    {"prompt_logprobs"},
    {"return_token_ids", "false"},
    {"add_generation_prompt", "true"},
    {"continue_final_message", "false", "end the messages with the assistant's turn"},
};

// Chat has fields of these names, too, but not with this meaning, or they were refused above.
constexpr std::string_view kOwnFields[] = {"messages",
                                           "max_tokens",
                                           "max_completion_tokens",
                                           "metadata",
                                           "tools",
                                           "tool_choice",
                                           "parallel_tool_calls",
                                           "service_tier",
                                           "response_format",
                                           "reasoning_effort",
                                           "stop",
                                           "logprobs",
                                           "top_logprobs",
                                           "functions",
                                           "function_call",
                                           "n",
                                           "best_of",
                                           "echo",
                                           "prompt_logprobs",
                                           "return_token_ids",
                                           "stream_options",
                                           "add_generation_prompt",
                                           "continue_final_message",
                                           "include_reasoning"};

absl::StatusOr<std::string> NeedString(const std::string& where, const OrderedJson& object,
                                       const char* field) {
  const auto value = object.find(field);
  if (value == object.end() || !value->is_string())
    return FieldError(where + "." + field, "must be a string");
  return value->get<std::string>();
}

OrderedJson TextPart(std::string text) { return {{"type", "text"}, {"text", std::move(text)}}; }

absl::Status CheckCacheControl(const std::string& where, const OrderedJson& object) {
  const OrderedJson* control = FieldReader(object).Find("cache_control");
  if (control == nullptr) return absl::OkStatus();
  if (!control->is_object() || !control->contains("type") || (*control)["type"] != "ephemeral") {
    return FieldError(where + "cache_control", "must be {\"type\":\"ephemeral\"}");
  }
  return absl::OkStatus();
}

// The blocks of `object`[field], a string or a list, one by one: read(path, type, block).
template <typename Read>
absl::Status ForEachBlock(const std::string& path, const OrderedJson& content, Read read) {
  if (content.is_string()) return read(path, std::string("text"), OrderedJson{{"text", content}});
  if (!content.is_array()) return FieldError(path, "must be a string or a list of blocks");
  if (content.size() > kBlocksMax)
    return FieldError(path, absl::StrCat("must have at most ", kBlocksMax, " blocks"));
  for (size_t i = 0; i < content.size(); ++i) {
    const std::string where = absl::StrCat(path, "[", i, "]");
    if (!content[i].is_object()) return FieldError(where, "must be an object with a type");
    TP_ASSIGN_OR_RETURN(const std::string type, NeedString(where, content[i], "type"));
    TP_RETURN_IF_ERROR(CheckCacheControl(where + ".", content[i]));
    TP_RETURN_IF_ERROR(read(where, type, content[i]));
  }
  return absl::OkStatus();
}

absl::Status UnsupportedBlock(const std::string& where, const std::string& type, std::string_view served) {
  return UnsupportedField(where + ".type",
                          "'" + type.substr(0, 64) + "' is not supported here; " + std::string(served));
}

// Text of blocks that may hold nothing else, as parts.
absl::StatusOr<OrderedJson> ReadTextBlocks(const std::string& path, const OrderedJson& content) {
  OrderedJson parts = OrderedJson::array();
  TP_RETURN_IF_ERROR(ForEachBlock(
      path, content,
      [&](const std::string& where, const std::string& type, const OrderedJson& block) -> absl::Status {
        if (type != "text") return UnsupportedBlock(where, type, "only 'text' is");
        static constexpr RefusedField kRefusedHere[] = {{"citations"}};
        TP_RETURN_IF_ERROR(RefuseFields(block, where + ".", kRefusedHere));
        TP_ASSIGN_OR_RETURN(std::string text, NeedString(where, block, "text"));
        parts.push_back(TextPart(std::move(text)));
        return absl::OkStatus();
      }));
  return parts;
}

constexpr RefusedField kRefusedCaller[] = {{"caller", R"({"type":"direct"})"}, {"toolset_name"}};

// Turns: Anthropic's messages as those of a chat.
class Turns {
 public:
  Turns(OrderedJson& messages, FieldNames& names) : messages_(messages), names_(names) {}

  absl::Status Add(const std::string& where, const OrderedJson& message, bool last) {
    if (!message.is_object()) return FieldError(where, "must be an object with role and content");
    TP_ASSIGN_OR_RETURN(const std::string role, NeedString(where, message, "role"));
    const std::string path = where + ".content";
    const auto content = message.find("content");
    if (content == message.end() || !(content->is_string() || content->is_array())) {
      return FieldError(path, "must be a string or a list of blocks");
    }
    if (content->empty() || *content == "") {
      // As in Anthropic's API: nothing to go on with.
      if (last && role == "assistant") return absl::OkStatus();
      return FieldError(path, "must not be empty");
    }
    if (role == "system") return AddSystem(where, *content);
    const bool assistant = role == "assistant";
    if (!assistant && role != "user")
      return FieldError(where + ".role", "must be one of user, assistant, system");
    return ForEachBlock(
        path, *content,
        [&](const std::string& block_path, const std::string& type, const OrderedJson& block) {
          return assistant ? AddAssistant(where, block_path, type, block)
                           : AddUser(where, block_path, type, block);
        });
  }

 private:
  OrderedJson& Begin(const std::string& where, OrderedJson message) {
    names_.Add(absl::StrCat("messages[", messages_.size(), "]"), where);
    messages_.push_back(std::move(message));
    return messages_.back();
  }
  // The last message, if it is of that role, or a new one.
  OrderedJson& Of(const std::string& where, const char* role) {
    if (!messages_.empty() && messages_.back()["role"] == role) return messages_.back();
    return Begin(where, {{"role", role}, {"content", nullptr}});
  }
  static void AddText(OrderedJson& message, std::string text) {
    message["content"].push_back(TextPart(std::move(text)));
  }

  absl::Status AddSystem(const std::string& where, const OrderedJson& content) {
    TP_ASSIGN_OR_RETURN(OrderedJson parts, ReadTextBlocks(where + ".content", content));
    Begin(where, {{"role", "system"}, {"content", std::move(parts)}});
    return absl::OkStatus();
  }

  absl::Status AddUser(const std::string& where, const std::string& path, const std::string& type,
                       const OrderedJson& block) {
    if (type == "text") {
      TP_ASSIGN_OR_RETURN(std::string text, NeedString(path, block, "text"));
      AddText(Of(where, "user"), std::move(text));
      return absl::OkStatus();
    }
    if (type != "tool_result") return UnsupportedBlock(path, type, "'text' and 'tool_result' are");
    static constexpr RefusedField kRefusedHere[] = {{"toolset_name"}};
    TP_RETURN_IF_ERROR(RefuseFields(block, path + ".", kRefusedHere));
    TP_ASSIGN_OR_RETURN(std::string id, NeedString(path, block, "tool_use_id"));
    const FieldReader fields(block);
    const auto is_error = fields.Bool("is_error");
    if (!is_error.ok()) return FieldError(path + ".is_error", "must be true or false");
    OrderedJson parts = OrderedJson::array();
    if (const OrderedJson* content = fields.Find("content")) {
      TP_ASSIGN_OR_RETURN(parts, ReadTextBlocks(path + ".content", *content));
    }
    if (is_error->value_or(false)) {
      if (parts.empty()) parts.push_back(TextPart(""));
      parts[0]["text"] = "Error: " + parts[0]["text"].get<std::string>();
    }
    if (parts.empty()) parts = "";
    names_.Add(absl::StrCat("messages[", messages_.size(), "].tool_call_id"), path + ".tool_use_id");
    Begin(path, {{"role", "tool"}, {"tool_call_id", std::move(id)}, {"content", std::move(parts)}});
    return absl::OkStatus();
  }

  absl::Status AddAssistant(const std::string& where, const std::string& path, const std::string& type,
                            const OrderedJson& block) {
    if (type == "text") {
      TP_ASSIGN_OR_RETURN(std::string text, NeedString(path, block, "text"));
      AddText(Of(where, "assistant"), std::move(text));
      return absl::OkStatus();
    }
    if (type == "thinking") {
      TP_ASSIGN_OR_RETURN(std::string text, NeedString(path, block, "thinking"));
      OrderedJson& message = Of(where, "assistant");
      if (const auto before = message.find("reasoning_content"); before != message.end()) {
        text = before->get<std::string>() + "\n" + text;
      }
      message["reasoning_content"] = std::move(text);
      return absl::OkStatus();
    }
    if (type != "tool_use") return UnsupportedBlock(path, type, "'text', 'thinking' and 'tool_use' are");
    TP_RETURN_IF_ERROR(RefuseFields(block, path + ".", kRefusedCaller));
    TP_ASSIGN_OR_RETURN(std::string id, NeedString(path, block, "id"));
    TP_ASSIGN_OR_RETURN(std::string name, NeedString(path, block, "name"));
    const auto input = block.find("input");
    if (input == block.end() || !input->is_object()) return FieldError(path + ".input", "must be an object");
    OrderedJson& message = Of(where, "assistant");
    const size_t at = message.contains("tool_calls") ? message["tool_calls"].size() : 0;
    const std::string call = absl::StrCat("messages[", messages_.size() - 1, "].tool_calls[", at, "]");
    names_.Add(call, path);
    names_.Add(call + ".function", path);
    names_.Add(call + ".function.arguments", path + ".input");
    message["tool_calls"].push_back(
        {{"id", std::move(id)},
         {"type", "function"},
         {"function", {{"name", std::move(name)}, {"arguments", DumpJson(*input)}}}});
    return absl::OkStatus();
  }

  OrderedJson& messages_;
  FieldNames& names_;
};

// Conversion: one request on its way to a chat.
class Conversion {
 public:
  explicit Conversion(const OrderedJson& body) : body_(body), fields_(body) {}

  absl::Status Convert(bool count_only) {
    TP_RETURN_IF_ERROR(RefuseFields(body_, "", kRefused));
    TP_RETURN_IF_ERROR(CheckCacheControl("", body_));
    CopyShared(body_, kOwnFields, chat_);
    TP_RETURN_IF_ERROR(ReadMaxTokens(count_only));
    TP_RETURN_IF_ERROR(ReadMessages());
    TP_RETURN_IF_ERROR(ReadTools());
    TP_RETURN_IF_ERROR(ReadToolChoice());
    TP_RETURN_IF_ERROR(ReadThinking());
    TP_RETURN_IF_ERROR(ReadOutputConfig());
    TP_RETURN_IF_ERROR(ReadMetadata());
    if (const OrderedJson* stop = fields_.Find("stop_sequences")) {
      if (!stop->is_array()) return FieldError("stop_sequences", "must be a list of strings");
      chat_["stop"] = *stop;
      names_.Add("stop", "stop_sequences");
    }
    return absl::OkStatus();
  }

  const OrderedJson& chat() const { return chat_; }
  FieldNames TakeNames() { return std::move(names_); }

 private:
  absl::Status ReadMaxTokens(bool count_only);
  absl::Status ReadMessages();
  absl::Status ReadTools();
  absl::Status ReadToolChoice();
  absl::Status ReadThinking();
  absl::Status ReadOutputConfig();
  absl::Status ReadMetadata();

  const OrderedJson& body_;
  const FieldReader fields_;
  OrderedJson chat_ = OrderedJson::object();
  FieldNames names_;
};

absl::Status Conversion::ReadMaxTokens(bool count_only) {
  TP_ASSIGN_OR_RETURN(const auto max_tokens, fields_.Int("max_tokens", 1, kTokensMax));
  if (max_tokens) {
    chat_["max_tokens"] = *max_tokens;
  } else if (!count_only) {
    return FieldError("max_tokens", "is needed: the most tokens that the answer may have");
  }
  names_.Add("max_completion_tokens", "max_tokens");
  return absl::OkStatus();
}

absl::Status Conversion::ReadMessages() {
  OrderedJson& messages = chat_["messages"] = OrderedJson::array();
  if (const OrderedJson* system = fields_.Find("system")) {
    TP_ASSIGN_OR_RETURN(OrderedJson parts, ReadTextBlocks("system", *system));
    if (!parts.empty()) {
      names_.Add("messages[0]", "system");
      names_.Add("messages[0].content", "system");
      messages.push_back({{"role", "system"}, {"content", std::move(parts)}});
    }
  }
  const OrderedJson* given = fields_.Find("messages");
  if (given == nullptr || !given->is_array() || given->empty()) {
    return FieldError("messages", "must be a list of at least one message");
  }
  if (given->size() > kMessagesMax) {
    return FieldError("messages", absl::StrCat("must have at most ", kMessagesMax, " messages"));
  }
  Turns turns(messages, names_);
  for (size_t i = 0; i < given->size(); ++i) {
    TP_RETURN_IF_ERROR(turns.Add(absl::StrCat("messages[", i, "]"), (*given)[i], i + 1 == given->size()));
  }
  if (messages.empty()) return FieldError("messages", "must say something");
  if (const OrderedJson& last = messages.back(); last["role"] == "assistant") {
    if (last.contains("tool_calls")) {
      return FieldError("messages", "end with a tool_use; send its tool_result");
    }
    if (last["content"].is_null()) {
      return FieldError("messages", "end with a thinking block alone; an answer cannot go on from there");
    }
    chat_["continue_final_message"] = true;
    chat_["add_generation_prompt"] = false;
    names_.Add("continue_final_message", "messages");
  }
  return absl::OkStatus();
}

absl::Status Conversion::ReadTools() {
  const OrderedJson* tools = fields_.Find("tools");
  if (tools == nullptr) return absl::OkStatus();
  if (!tools->is_array()) return FieldError("tools", "must be a list of tools");
  for (size_t i = 0; i < tools->size(); ++i) {
    const OrderedJson& tool = (*tools)[i];
    const std::string where = absl::StrCat("tools[", i, "]");
    if (!tool.is_object()) return FieldError(where, "must be an object with name and input_schema");
    TP_RETURN_IF_ERROR(CheckCacheControl(where + ".", tool));
    if (const OrderedJson* type = FieldReader(tool).Find("type"); type != nullptr && *type != "custom") {
      if (!type->is_string()) return FieldError(where + ".type", "must be a string");
      return UnsupportedBlock(where, type->get<std::string>(), "only 'custom' is: there are no server tools");
    }
    static constexpr RefusedField kRefusedHere[] = {
        {"defer_loading", "false"}, {"allowed_callers", R"(["direct"])"}, {"input_examples"}};
    TP_RETURN_IF_ERROR(RefuseFields(tool, where + ".", kRefusedHere));
    const auto schema = tool.find("input_schema");
    if (schema == tool.end() || !schema->is_object()) {
      return FieldError(where + ".input_schema", "must be a JSON schema, an object");
    }
    OrderedJson function = {{"parameters", *schema}};
    for (const char* field : {"name", "description", "strict"}) {
      if (const OrderedJson* value = FieldReader(tool).Find(field)) function[field] = *value;
    }
    names_.Add(where + ".function", where);
    names_.Add(where + ".function.parameters", where + ".input_schema");
    chat_["tools"].push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  return absl::OkStatus();
}

absl::Status Conversion::ReadToolChoice() {
  const OrderedJson* choice = fields_.Find("tool_choice");
  if (choice == nullptr) return absl::OkStatus();
  if (!choice->is_object()) return FieldError("tool_choice", "must be an object with a type");
  TP_ASSIGN_OR_RETURN(const std::string type, NeedString("tool_choice", *choice, "type"));
  if (type == "auto" || type == "none") {
    chat_["tool_choice"] = type;
  } else if (type == "any") {
    chat_["tool_choice"] = "required";
  } else if (type == "tool") {
    TP_ASSIGN_OR_RETURN(const std::string name, NeedString("tool_choice", *choice, "name"));
    chat_["tool_choice"] = {{"type", "function"}, {"function", {{"name", name}}}};
    names_.Add("tool_choice.function", "tool_choice");
  } else {
    return FieldError("tool_choice.type", "must be one of auto, any, tool, none");
  }
  const auto alone = FieldReader(*choice).Bool("disable_parallel_tool_use");
  if (!alone.ok()) return FieldError("tool_choice.disable_parallel_tool_use", "must be true or false");
  if (alone->value_or(false)) {
    chat_["parallel_tool_calls"] = false;
    names_.Add("parallel_tool_calls", "tool_choice.disable_parallel_tool_use");
  }
  return absl::OkStatus();
}

absl::Status Conversion::ReadThinking() {
  const OrderedJson* thinking = fields_.Find("thinking");
  if (thinking == nullptr) return absl::OkStatus();
  if (!thinking->is_object()) return FieldError("thinking", "must be an object with a type");
  TP_ASSIGN_OR_RETURN(const std::string type, NeedString("thinking", *thinking, "type"));
  if (type == "between_tools") {
    return UnsupportedField("thinking.type",
                            "'between_tools' is not supported; enabled, adaptive and disabled are");
  }
  if (type != "enabled" && type != "adaptive" && type != "disabled") {
    return FieldError("thinking.type", "must be one of enabled, adaptive, disabled");
  }
  if (type == "enabled") {
    const OrderedJson* max = FieldReader(chat_).Find("max_tokens");
    const auto most = max == nullptr ? kTokensMax : max->get<int64_t>();
    const auto budget = FieldReader(*thinking).Int("budget_tokens", 1, std::max<int64_t>(1, most - 1));
    if (!budget.ok() || !*budget) {
      return FieldError("thinking.budget_tokens", "must be a whole number from 1 to less than max_tokens");
    }
  }
  if (const OrderedJson* display = FieldReader(*thinking).Find("display")) {
    if (*display != "summarized" && *display != "omitted") {
      return FieldError("thinking.display", "must be one of summarized, omitted");
    }
    if (*display == "omitted") chat_["include_reasoning"] = false;
  }
  // What templates that can think with and without call the switch (Qwen 3; DeepSeek V3.1, Granite).
  OrderedJson& kwargs = chat_["chat_template_kwargs"];
  if (kwargs.is_null()) kwargs = OrderedJson::object();
  if (!kwargs.is_object()) return FieldError("chat_template_kwargs", "must be an object");
  for (const char* name : {"enable_thinking", "thinking"}) {
    if (!kwargs.contains(name)) kwargs[name] = type != "disabled";
  }
  return absl::OkStatus();
}

absl::Status Conversion::ReadOutputConfig() {
  const OrderedJson* config = fields_.Find("output_config");
  const OrderedJson* format = fields_.Find("output_format");  // its older place
  const char* field = "output_format";
  if (config != nullptr) {
    if (!config->is_object()) return FieldError("output_config", "must be an object");
    if (const OrderedJson* effort = FieldReader(*config).Find("effort")) {
      chat_["reasoning_effort"] = *effort;
      names_.Add("reasoning_effort", "output_config.effort");
    }
    if (const OrderedJson* inner = FieldReader(*config).Find("format")) {
      format = inner;
      field = "output_config.format";
    }
  }
  if (format == nullptr) return absl::OkStatus();
  if (!format->is_object() || !format->contains("type") || (*format)["type"] != "json_schema") {
    return FieldError(std::string(field) + ".type", "must be json_schema");
  }
  const auto schema = format->find("schema");
  if (schema == format->end()) return FieldError(std::string(field) + ".schema", "must be a JSON schema");
  chat_["response_format"] = {{"type", "json_schema"},
                              {"json_schema", {{"name", "answer"}, {"schema", *schema}, {"strict", true}}}};
  names_.Add("response_format", field);
  names_.Add("response_format.json_schema", field);
  return absl::OkStatus();
}

absl::Status Conversion::ReadMetadata() {
  if (const OrderedJson* tier = fields_.Find("service_tier")) {
    if (*tier != "auto" && *tier != "standard_only") {
      return FieldError("service_tier", "must be one of auto, standard_only");
    }
  }
  const OrderedJson* metadata = fields_.Find("metadata");
  if (metadata == nullptr) return absl::OkStatus();
  if (!metadata->is_object()) return FieldError("metadata", "must be an object");
  // For the client's own bookkeeping.
  const auto user = FieldReader(*metadata).String("user_id", kUserChars);
  if (!user.ok()) {
    return FieldError("metadata.user_id",
                      absl::StrCat("must be a string of at most ", kUserChars, " characters"));
  }
  return absl::OkStatus();
}

OrError<MessagesRequest> Parse(std::string_view body, bool count_only) {
  const auto json = ParseJson(body);
  if (!json.ok()) {
    return MakeError(errors::kInvalidJson,
                     "the body is not valid JSON: " + std::string(json.status().message()));
  }
  if (!json->is_object()) return MakeError(errors::kInvalidJson, "the body must be a JSON object");
  Conversion conversion(*json);
  if (const auto status = conversion.Convert(count_only); !status.ok()) return ConversionError(status);
  auto read = ReadChatCompletion(conversion.chat());
  MessagesRequest out;
  out.names = conversion.TakeNames();
  if (auto* error = std::get_if<ApiError>(&read)) return out.names.Own(std::move(*error));
  out.request = std::get<InferenceRequest>(std::move(read));
  return out;
}

}  // namespace

OrError<MessagesRequest> ParseMessages(std::string_view body) { return Parse(body, /*count_only=*/false); }

OrError<MessagesRequest> ParseCountTokens(std::string_view body) { return Parse(body, /*count_only=*/true); }

}  // namespace tidepool
