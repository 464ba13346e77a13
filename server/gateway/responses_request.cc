#include "server/gateway/responses_request.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

constexpr size_t kItemsMax = 16384;
constexpr size_t kPartsMax = 1024;
constexpr size_t kHintChars = 4096;  // of user, safety_identifier, prompt_cache_key

constexpr RefusedField kRefused[] = {
    {"store", "false", "this server keeps no answers: send store false and the whole conversation as input"},
    {"previous_response_id", {}, "this server keeps no answers: send the whole conversation as input"},
    {"conversation", {}, "this server keeps no conversations: send the whole conversation as input"},
    {"background", "false", "wait for the answer, or stream it"},
    {"prompt", {}, "this server keeps no prompt templates: send instructions and input"},
    {"truncation", "\"disabled\"", "shorten the input yourself"},
    {"context_management", {}, "shorten the input yourself"},
    {"max_tool_calls", {}, "it limits built-in tools, and there are none"},
    {"moderation"},
    {"background_options"},
    {"access_programs"},
    {"image"},
    {"prompt_cache_options", {}, "prefixes are cached anyway"},
    {"prompt_cache_retention", "\"in_memory\"", "prefixes are cached anyway"},
    // Chat's names: a client that sends them has the wrong endpoint, and would wonder.
    {"messages", {}, "use input, or POST /v1/chat/completions"},
    {"max_tokens", {}, "use max_output_tokens"},
    {"max_completion_tokens", {}, "use max_output_tokens"},
    {"response_format", {}, "use text.format"},
    {"reasoning_effort", {}, "use reasoning.effort"},
    {"logprobs", "false", "use include: [\"message.output_text.logprobs\"]"},
    {"functions", {}, "use tools"},
    {"function_call", {}, "use tool_choice"},
    {"n", "1", "send one request for each"},
    {"best_of", "1"},
    {"echo", "false"},
    {"prompt_logprobs"},
    {"return_token_ids", "false"},
    {"add_generation_prompt", "true"},
    {"continue_final_message", "false"},
    {"include_reasoning", "true"},
};

// Chat has fields of these names, too, but not with this meaning, or they were refused above.
constexpr std::string_view kOwnFields[] = {"messages",
                                           "prompt",
                                           "max_tokens",
                                           "max_completion_tokens",
                                           "response_format",
                                           "tools",
                                           "tool_choice",
                                           "reasoning_effort",
                                           "stream_options",
                                           "logprobs",
                                           "top_logprobs",
                                           "functions",
                                           "function_call",
                                           "n",
                                           "best_of",
                                           "echo",
                                           "prompt_logprobs",
                                           "return_token_ids",
                                           "add_generation_prompt",
                                           "continue_final_message",
                                           "store",
                                           "background",
                                           "moderation",
                                           "prompt_cache_options",
                                           "prompt_cache_retention",
                                           "include_reasoning"};

// What a part of a message or of a tool's output says.
absl::StatusOr<OrderedJson> ReadPart(const std::string& where, const OrderedJson& part) {
  if (!part.is_object() || !part.contains("type") || !part["type"].is_string()) {
    return FieldError(where, "must be an object with a type");
  }
  const auto& type = part["type"].get_ref<const std::string&>();
  const bool refusal = type == "refusal";
  if (!refusal && type != "input_text" && type != "output_text" && type != "text") {
    return UnsupportedField(
        where + ".type",
        "'" + type.substr(0, 64) + "' is not supported; only text is (input_text, output_text)");
  }
  const char* field = refusal ? "refusal" : "text";
  const auto text = part.find(field);
  if (text == part.end() || !text->is_string()) return FieldError(where + "." + field, "must be a string");
  return OrderedJson{{"type", "text"}, {"text", *text}};
}

// A string or a list of parts; as chat has it.
absl::StatusOr<OrderedJson> ReadContent(const std::string& where, const OrderedJson& object,
                                        const char* field) {
  const std::string path = where + "." + field;
  const auto content = object.find(field);
  if (content == object.end() || !(content->is_string() || content->is_array())) {
    return FieldError(path, "must be a string or a list of text parts");
  }
  if (content->is_string()) return *content;
  if (content->size() > kPartsMax)
    return FieldError(path, absl::StrCat("must have at most ", kPartsMax, " parts"));
  OrderedJson parts = OrderedJson::array();
  for (size_t i = 0; i < content->size(); ++i) {
    TP_ASSIGN_OR_RETURN(OrderedJson part, ReadPart(absl::StrCat(path, "[", i, "]"), (*content)[i]));
    parts.push_back(std::move(part));
  }
  return parts;
}

absl::StatusOr<std::string> NeedString(const std::string& where, const OrderedJson& object,
                                       const char* field) {
  const auto value = object.find(field);
  if (value == object.end() || !value->is_string())
    return FieldError(where + "." + field, "must be a string");
  return value->get<std::string>();
}

// Turns: the items of an input as the messages of a chat.
class Turns {
 public:
  Turns(OrderedJson& messages, FieldNames& names) : messages_(messages), names_(names) {}

  absl::Status Add(const std::string& where, const OrderedJson& item) {
    if (!item.is_object()) return FieldError(where, "must be an object");
    const auto type = item.find("type");
    if (type == item.end() || *type == "message") return AddMessage(where, item);
    if (!type->is_string()) return FieldError(where + ".type", "must be a string");
    if (*type == "function_call") return AddCall(where, item);
    if (*type == "function_call_output") return AddOutput(where, item);
    if (*type == "reasoning") return AddReasoning(where, item);
    return UnsupportedField(
        where + ".type",
        "'" + type->get<std::string>().substr(0, 64) +
            "' is not supported; message, function_call, function_call_output and reasoning are");
  }

 private:
  void Begin(const std::string& where, OrderedJson message) {
    names_.Add(absl::StrCat("messages[", messages_.size(), "]"), where);
    assistant_ = message["role"] == "assistant";
    messages_.push_back(std::move(message));
  }
  // The assistant's message that an item belongs to. `fresh`: one that says nothing yet but thoughts.
  OrderedJson& Assistant(const std::string& where, bool fresh) {
    if (!assistant_ ||
        (fresh && (messages_.back().contains("tool_calls") || !messages_.back()["content"].is_null()))) {
      Begin(where, {{"role", "assistant"}, {"content", nullptr}});
    }
    return messages_.back();
  }

  absl::Status AddMessage(const std::string& where, const OrderedJson& item) {
    TP_ASSIGN_OR_RETURN(const std::string role, NeedString(where, item, "role"));
    if (role != "user" && role != "assistant" && role != "system" && role != "developer") {
      return FieldError(where + ".role", "must be one of user, assistant, system, developer");
    }
    TP_ASSIGN_OR_RETURN(OrderedJson content, ReadContent(where, item, "content"));
    if (role == "assistant") {
      Assistant(where, /*fresh=*/true)["content"] = std::move(content);
    } else {
      Begin(where, {{"role", role}, {"content", std::move(content)}});
    }
    return absl::OkStatus();
  }

  absl::Status AddCall(const std::string& where, const OrderedJson& item) {
    static constexpr RefusedField kRefusedHere[] = {
        {"namespace"}, {"caller", R"({"type":"direct"})"}, {"async", "false"}};
    TP_RETURN_IF_ERROR(RefuseFields(item, where + ".", kRefusedHere));
    TP_ASSIGN_OR_RETURN(std::string id, NeedString(where, item, "call_id"));
    TP_ASSIGN_OR_RETURN(std::string name, NeedString(where, item, "name"));
    TP_ASSIGN_OR_RETURN(std::string arguments, NeedString(where, item, "arguments"));
    OrderedJson& message = Assistant(where, /*fresh=*/false);
    const size_t at = message.contains("tool_calls") ? message["tool_calls"].size() : 0;
    const std::string call = absl::StrCat("messages[", messages_.size() - 1, "].tool_calls[", at, "]");
    names_.Add(call, where);
    names_.Add(call + ".function", where);
    names_.Add(call + ".id", where + ".call_id");
    message["tool_calls"].push_back(
        {{"id", std::move(id)},
         {"type", "function"},
         {"function", {{"name", std::move(name)}, {"arguments", std::move(arguments)}}}});
    return absl::OkStatus();
  }

  absl::Status AddOutput(const std::string& where, const OrderedJson& item) {
    static constexpr RefusedField kRefusedHere[] = {{"namespace"}, {"caller", R"({"type":"direct"})"}};
    TP_RETURN_IF_ERROR(RefuseFields(item, where + ".", kRefusedHere));
    TP_ASSIGN_OR_RETURN(std::string id, NeedString(where, item, "call_id"));
    TP_ASSIGN_OR_RETURN(OrderedJson output, ReadContent(where, item, "output"));
    const std::string message = absl::StrCat("messages[", messages_.size(), "]");
    names_.Add(message + ".tool_call_id", where + ".call_id");
    names_.Add(message + ".content", where + ".output");
    Begin(where, {{"role", "tool"}, {"tool_call_id", std::move(id)}, {"content", std::move(output)}});
    return absl::OkStatus();
  }

  absl::Status AddReasoning(const std::string& where, const OrderedJson& item) {
    static constexpr RefusedField kRefusedHere[] = {
        {"encrypted_content", {}, "this server gives and takes reasoning as it is, in content"}};
    TP_RETURN_IF_ERROR(RefuseFields(item, where + ".", kRefusedHere));
    std::string text;
    // Its own words, or else what they were summed up to.
    for (const char* list : {"content", "summary"}) {
      const auto parts = item.find(list);
      if (parts == item.end() || parts->is_null() || !text.empty()) continue;
      const std::string path = where + "." + list;
      if (!parts->is_array() || parts->size() > kPartsMax) {
        return FieldError(path, absl::StrCat("must be a list of at most ", kPartsMax, " parts"));
      }
      for (size_t i = 0; i < parts->size(); ++i) {
        const std::string part = absl::StrCat(path, "[", i, "]");
        if (!(*parts)[i].is_object()) return FieldError(part, "must be an object with a text");
        TP_ASSIGN_OR_RETURN(const std::string one, NeedString(part, (*parts)[i], "text"));
        absl::StrAppend(&text, text.empty() ? "" : "\n", one);
      }
    }
    if (text.empty()) return absl::OkStatus();
    OrderedJson& message = Assistant(where, /*fresh=*/true);
    if (const auto before = message.find("reasoning_content"); before != message.end()) {
      text = before->get<std::string>() + "\n" + text;
    }
    message["reasoning_content"] = std::move(text);
    return absl::OkStatus();
  }

  OrderedJson& messages_;
  FieldNames& names_;
  bool assistant_ = false;  // the last message is an assistant's
};

// Conversion: one request on its way to a chat.
class Conversion {
 public:
  explicit Conversion(const OrderedJson& body) : body_(body), fields_(body) {}

  absl::Status Convert() {
    TP_RETURN_IF_ERROR(RefuseFields(body_, "", kRefused));
    CopyShared(body_, kOwnFields, chat_);
    TP_RETURN_IF_ERROR(ReadInput());
    TP_RETURN_IF_ERROR(ReadTools());
    TP_RETURN_IF_ERROR(ReadToolChoice());
    TP_RETURN_IF_ERROR(ReadText());
    TP_RETURN_IF_ERROR(ReadReasoning());
    TP_RETURN_IF_ERROR(ReadLogprobs());
    TP_RETURN_IF_ERROR(ReadHints());
    if (const OrderedJson* max = fields_.Find("max_output_tokens")) chat_["max_completion_tokens"] = *max;
    for (const char* name : {"max_tokens", "max_completion_tokens"}) names_.Add(name, "max_output_tokens");
    names_.Add("messages", "input");
    return absl::OkStatus();
  }

  const OrderedJson& chat() const { return chat_; }
  FieldNames TakeNames() { return std::move(names_); }
  // In the order of OpenAI's answers. `request`: what became of the chat.
  OrderedJson Repeated(const InferenceRequest& request) const;

 private:
  OrderedJson Given(const char* field) const {
    const OrderedJson* value = fields_.Find(field);
    return value == nullptr ? OrderedJson(nullptr) : *value;
  }

  absl::Status ReadInput();
  absl::Status ReadTools();
  absl::Status ReadToolChoice();
  absl::Status ReadText();
  absl::Status ReadReasoning();
  absl::Status ReadLogprobs();
  absl::Status ReadHints();

  const OrderedJson& body_;
  const FieldReader fields_;
  OrderedJson chat_ = OrderedJson::object();
  FieldNames names_;
  OrderedJson tools_ = OrderedJson::array();  // as the answer repeats them
  OrderedJson format_ = {{"type", "text"}};
};

absl::Status Conversion::ReadInput() {
  OrderedJson& messages = chat_["messages"] = OrderedJson::array();
  TP_ASSIGN_OR_RETURN(const auto instructions,
                      fields_.String("instructions", std::numeric_limits<size_t>::max()));
  if (instructions && !instructions->empty()) {
    names_.Add("messages[0]", "instructions");
    messages.push_back({{"role", "system"}, {"content", *instructions}});
  }
  const OrderedJson* input = fields_.Find("input");
  if (input != nullptr && input->is_string()) {
    messages.push_back({{"role", "user"}, {"content", *input}});
    return absl::OkStatus();
  }
  if (input == nullptr || !input->is_array() || input->empty()) {
    return FieldError("input", "must be a string or a list of at least one item");
  }
  if (input->size() > kItemsMax) {
    return FieldError("input", absl::StrCat("must have at most ", kItemsMax, " items"));
  }
  Turns turns(messages, names_);
  for (size_t i = 0; i < input->size(); ++i) {
    TP_RETURN_IF_ERROR(turns.Add(absl::StrCat("input[", i, "]"), (*input)[i]));
  }
  if (messages.empty()) return FieldError("input", "must say something: all of its items are empty");
  return absl::OkStatus();
}

absl::Status Conversion::ReadTools() {
  const OrderedJson* tools = fields_.Find("tools");
  if (tools == nullptr) return absl::OkStatus();
  if (!tools->is_array()) return FieldError("tools", "must be a list of tools");
  for (size_t i = 0; i < tools->size(); ++i) {
    const OrderedJson& tool = (*tools)[i];
    const std::string where = absl::StrCat("tools[", i, "]");
    if (!tool.is_object()) return FieldError(where, "must be an object with a type");
    TP_ASSIGN_OR_RETURN(const std::string type, NeedString(where, tool, "type"));
    if (type != "function") {
      return UnsupportedField(where + ".type", "'" + type.substr(0, 64) +
                                                   "' is not supported; only 'function' is: there are no "
                                                   "built-in tools");
    }
    static constexpr RefusedField kRefusedHere[] = {
        {"defer_loading", "false"}, {"output_schema"}, {"allowed_callers", R"(["direct"])"}};
    TP_RETURN_IF_ERROR(RefuseFields(tool, where + ".", kRefusedHere));
    OrderedJson function = OrderedJson::object();
    OrderedJson repeated = {{"type", "function"}};
    for (const char* field : {"name", "description", "parameters", "strict"}) {
      const auto value = tool.find(field);
      const bool given = value != tool.end() && !value->is_null();
      if (given) function[field] = *value;
      repeated[field] = given ? *value : OrderedJson(nullptr);
    }
    names_.Add(where + ".function", where);
    chat_["tools"].push_back({{"type", "function"}, {"function", std::move(function)}});
    tools_.push_back(std::move(repeated));
  }
  return absl::OkStatus();
}

absl::Status Conversion::ReadToolChoice() {
  const OrderedJson* choice = fields_.Find("tool_choice");
  if (choice == nullptr) return absl::OkStatus();
  if (choice->is_string()) {
    // The default, which OpenAI's clients send without tools, too.
    const bool idle = tools_.empty() && (*choice == "auto" || *choice == "none");
    if (!idle) chat_["tool_choice"] = *choice;
    return absl::OkStatus();
  }
  if (!choice->is_object()) return FieldError("tool_choice", "must be a string or an object");
  TP_ASSIGN_OR_RETURN(const std::string type, NeedString("tool_choice", *choice, "type"));
  if (type == "function") {
    TP_ASSIGN_OR_RETURN(const std::string name, NeedString("tool_choice", *choice, "name"));
    chat_["tool_choice"] = {{"type", "function"}, {"function", {{"name", name}}}};
    names_.Add("tool_choice.function", "tool_choice");
    return absl::OkStatus();
  }
  if (type != "allowed_tools") {
    return UnsupportedField("tool_choice.type",
                            "'" + type.substr(0, 64) +
                                "' is not supported; 'function' and 'allowed_tools' are: there "
                                "are no built-in tools");
  }
  TP_ASSIGN_OR_RETURN(const std::string mode, NeedString("tool_choice", *choice, "mode"));
  const auto allowed = choice->find("tools");
  if (allowed == choice->end() || !allowed->is_array()) {
    return FieldError("tool_choice.tools", "must be a list of tools");
  }
  OrderedJson tools = OrderedJson::array();
  for (size_t i = 0; i < allowed->size(); ++i) {
    const std::string where = absl::StrCat("tool_choice.tools[", i, "]");
    const OrderedJson& tool = (*allowed)[i];
    if (!tool.is_object()) return FieldError(where, "must be an object with a type");
    if (!tool.contains("type") || tool["type"] != "function") {
      return UnsupportedField(where + ".type", "only 'function' is supported");
    }
    TP_ASSIGN_OR_RETURN(const std::string name, NeedString(where, tool, "name"));
    tools.push_back({{"type", "function"}, {"function", {{"name", name}}}});
  }
  chat_["tool_choice"] = {{"type", "allowed_tools"},
                          {"allowed_tools", {{"mode", mode}, {"tools", std::move(tools)}}}};
  names_.Add("tool_choice.allowed_tools", "tool_choice");
  return absl::OkStatus();
}

absl::Status Conversion::ReadText() {
  const OrderedJson* text = fields_.Find("text");
  if (text == nullptr) return absl::OkStatus();
  if (!text->is_object()) return FieldError("text", "must be an object");
  static constexpr RefusedField kRefusedHere[] = {{"verbosity", "\"medium\"", "say it in the instructions"}};
  TP_RETURN_IF_ERROR(RefuseFields(*text, "text.", kRefusedHere));
  const OrderedJson* format = FieldReader(*text).Find("format");
  if (format == nullptr) return absl::OkStatus();
  if (!format->is_object()) return FieldError("text.format", "must be an object with a type");
  TP_ASSIGN_OR_RETURN(const std::string type, NeedString("text.format", *format, "type"));
  format_ = *format;
  names_.Add("response_format", "text.format");
  names_.Add("response_format.json_schema", "text.format");
  if (type == "json_schema") {
    OrderedJson schema = *format;
    schema.erase("type");
    chat_["response_format"] = {{"type", type}, {"json_schema", std::move(schema)}};
  } else if (type == "json_object" || type == "text") {
    chat_["response_format"] = {{"type", type}};
  } else {
    return FieldError("text.format.type", "must be one of text, json_object, json_schema");
  }
  return absl::OkStatus();
}

absl::Status Conversion::ReadReasoning() {
  const OrderedJson* reasoning = fields_.Find("reasoning");
  if (reasoning == nullptr) return absl::OkStatus();
  if (!reasoning->is_object()) return FieldError("reasoning", "must be an object");
  static constexpr std::string_view kWhole = "reasoning comes whole, in the reasoning item's content";
  static constexpr RefusedField kRefusedHere[] = {{"summary", {}, kWhole},
                                                  {"generate_summary", {}, kWhole},
                                                  {"mode", "\"standard\""},
                                                  {"context", "\"auto\""}};
  TP_RETURN_IF_ERROR(RefuseFields(*reasoning, "reasoning.", kRefusedHere));
  if (const OrderedJson* effort = FieldReader(*reasoning).Find("effort")) {
    chat_["reasoning_effort"] = *effort;
    names_.Add("reasoning_effort", "reasoning.effort");
  }
  return absl::OkStatus();
}

absl::Status Conversion::ReadLogprobs() {
  static constexpr const char* kKnown[] = {
      "file_search_call.results",       "web_search_call.results",
      "web_search_call.action.sources", "message.input_image.image_url",
      "code_interpreter_call.outputs",  "computer_call_output.output.image_url",
  };
  bool logprobs = false;
  if (const OrderedJson* include = fields_.Find("include")) {
    if (!include->is_array() || include->size() > 64) {
      return FieldError("include", "must be a list of at most 64 strings");
    }
    for (size_t i = 0; i < include->size(); ++i) {
      const OrderedJson& one = (*include)[i];
      const std::string where = absl::StrCat("include[", i, "]");
      if (one == "message.output_text.logprobs") {
        logprobs = true;
        continue;
      }
      // Clients that keep the conversation themselves ask for it, so that they can send thoughts back; here
      // reasoning items have them in `content` and are taken so.
      if (one == "reasoning.encrypted_content") continue;
      for (const char* known : kKnown) {
        if (one == known) {
          return UnsupportedField(where, absl::StrCat("'", known, "' is not supported; leave it out"));
        }
      }
      return FieldError(where, "is not known; message.output_text.logprobs is supported");
    }
  }
  if (const OrderedJson* top = fields_.Find("top_logprobs")) {
    chat_["top_logprobs"] = *top;
    // Asked for by their number alone, as OpenAI takes it.
    logprobs = logprobs || *top != 0;
  }
  if (logprobs) chat_["logprobs"] = true;
  return absl::OkStatus();
}

absl::Status Conversion::ReadHints() {
  for (const char* field : {"user", "safety_identifier", "prompt_cache_key"}) {
    // For the client's own bookkeeping.
    TP_RETURN_IF_ERROR(fields_.String(field, kHintChars).status());
  }
  if (const OrderedJson* key = fields_.Find("prompt_cache_key"); key != nullptr && key->is_string()) {
    chat_["prompt_cache_key"] = *key;
  }
  if (const OrderedJson* tier = fields_.Find("service_tier");
      tier != nullptr && *tier != "auto" && *tier != "default") {
    return UnsupportedField("service_tier", "only 'auto' and 'default' are supported; leave it out");
  }
  if (const OrderedJson* options = fields_.Find("stream_options")) {
    if (!options->is_object()) return FieldError("stream_options", "must be an object");
    static constexpr RefusedField kRefusedHere[] = {{"include_obfuscation", "false"}};
    TP_RETURN_IF_ERROR(RefuseFields(*options, "stream_options.", kRefusedHere));
  }
  return absl::OkStatus();
}

OrderedJson Conversion::Repeated(const InferenceRequest& request) const {
  const OrderedJson* effort = FieldReader(chat_).Find("reasoning_effort");
  OrderedJson json;
  json["instructions"] = Given("instructions");
  json["max_output_tokens"] = Given("max_output_tokens");
  json["max_tool_calls"] = nullptr;
  json["parallel_tool_calls"] =
      fields_.Find("parallel_tool_calls") == nullptr || body_["parallel_tool_calls"];
  json["previous_response_id"] = nullptr;
  json["prompt_cache_key"] = Given("prompt_cache_key");
  json["reasoning"] = {{"effort", effort == nullptr ? OrderedJson(nullptr) : *effort}, {"summary", nullptr}};
  json["safety_identifier"] = Given("safety_identifier");
  json["service_tier"] = "default";
  json["store"] = false;
  // Null: the model's own.
  json["temperature"] = Given("temperature");
  json["text"] = {{"format", format_}, {"verbosity", "medium"}};
  json["tool_choice"] = fields_.Find("tool_choice") == nullptr ? OrderedJson("auto") : body_["tool_choice"];
  json["tools"] = tools_;
  json["top_logprobs"] = std::max(0, request.top_logprobs);
  json["top_p"] = Given("top_p");
  json["truncation"] = "disabled";
  json["user"] = Given("user");
  json["metadata"] = fields_.Find("metadata") == nullptr ? OrderedJson::object() : body_["metadata"];
  return json;
}

}  // namespace

OrError<ResponsesRequest> ParseResponses(std::string_view body) {
  const auto json = ParseJson(body);
  if (!json.ok()) {
    return MakeError(errors::kInvalidJson,
                     "the body is not valid JSON: " + std::string(json.status().message()));
  }
  if (!json->is_object()) return MakeError(errors::kInvalidJson, "the body must be a JSON object");
  Conversion conversion(*json);
  if (const auto status = conversion.Convert(); !status.ok()) return ConversionError(status);
  auto read = ReadChatCompletion(conversion.chat());
  ResponsesRequest out;
  if (auto* error = std::get_if<ApiError>(&read)) return conversion.TakeNames().Own(std::move(*error));
  out.request = std::get<InferenceRequest>(std::move(read));
  out.repeated = conversion.Repeated(out.request);
  out.names = conversion.TakeNames();
  return out;
}

}  // namespace tidepool
