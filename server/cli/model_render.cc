// `tidepool model render TEMPLATE`: chat templates outside of a server, one request or a stream of them.
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "base/small_file.h"
#include "base/status.h"
#include "server/cli/config_flags.h"
#include "server/cli/jsonl.h"
#include "server/cli/model_commands.h"
#include "server/model/template/chat_template.h"
#include "server/model/text/json_reader.h"

namespace tidepool {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::string path, now, timezone = "UTC";
  bool jsonl = false, data = false;
};

// A template with the variables that come from the tokenizer's configuration.
struct Source {
  ChatTemplate parsed;
  OrderedJson tokens = OrderedJson::object();
};

// Names that a tokenizer's configuration gives to a template: bos_token and its like. A request may set them,
// too, as it comes from the template's own user here; elsewhere what it holds is data.
bool IsTokenName(std::string_view name) { return name.ends_with("_token"); }

// The template of a tokenizer_config.json: a string, or a list of named ones, of which `default` is for
// chats.
absl::StatusOr<std::string> TemplateOf(const nlohmann::json& config, const std::string& path) {
  const nlohmann::json* value = json_reader::Member(config, "chat_template");
  if (value == nullptr) return absl::NotFoundError(absl::StrCat(path, ": chat_template is missing"));
  if (value->is_string()) return value->get<std::string>();
  if (value->is_array()) {
    for (const auto& entry : *value) {
      const auto name = json_reader::GetString(entry, "name", path + ": chat_template[]", "");
      if (name.ok() && *name == "default") {
        return json_reader::GetString(entry, "template", path + ": chat_template[]");
      }
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat(path, ": chat_template must be a string, or a list with one that is named 'default'"));
}

absl::StatusOr<Source> LoadSource(const std::string& path) {
  constexpr size_t kBytesMax = size_t{16} << 20;
  std::error_code error;
  const bool directory = fs::is_directory(path, error);
  const std::string config_path = directory ? path + "/tokenizer_config.json" : path;
  OrderedJson tokens = OrderedJson::object();
  std::string source, from = path;
  if (directory || path.ends_with(".json")) {
    TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(config_path, kBytesMax));
    TP_ASSIGN_OR_RETURN(const nlohmann::json config, json_reader::Parse(text, config_path));
    TP_RETURN_IF_ERROR(json_reader::RequireObject(config, config_path));
    for (const auto& [name, value] : config.items()) {
      if (!IsTokenName(name)) continue;
      const nlohmann::json* content = value.is_object() ? json_reader::Member(value, "content") : &value;
      if (content != nullptr && content->is_string()) tokens[name] = content->get<std::string>();
    }
    from = path + "/chat_template.jinja";
    if (!directory || !fs::exists(from, error)) {
      from = config_path;
      TP_ASSIGN_OR_RETURN(source, TemplateOf(config, config_path));
    }
  }
  if (source.empty()) {
    TP_ASSIGN_OR_RETURN(source, ReadSmallFile(from, kBytesMax));
  }
  auto parsed = ChatTemplate::Parse(std::move(source));
  if (!parsed.ok()) return Annotate(parsed.status(), from);
  return Source{*std::move(parsed), std::move(tokens)};
}

absl::StatusOr<ChatTemplate::Limits> LimitsOf(const Options& options) {
  ChatTemplate::Limits limits;
  if (!absl::LoadTimeZone(options.timezone, &limits.zone)) {
    return absl::InvalidArgumentError(absl::StrCat("--timezone: '", options.timezone, "' is not known"));
  }
  if (options.now.empty()) return limits;
  absl::Time now;
  std::string error;
  if (!absl::ParseTime("%Y-%m-%dT%H:%M:%S", options.now, limits.zone, &now, &error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--now: '", options.now, "' is no time like 2025-07-10T12:00:00: ", error));
  }
  limits.now = now;
  return limits;
}

absl::StatusOr<MarkedText> Render(const Source& source, const OrderedJson& line,
                                  const ChatTemplate::Limits& limits) {
  OrderedJson request = OrderedJson::object(), trusted = source.tokens;
  for (const auto& [name, value] : line.items()) (IsTokenName(name) ? trusted : request)[name] = value;
  return source.parsed.Render(request, trusted, limits);
}

int Run(const Options& options) {
  const auto source = LoadSource(options.path);
  if (!source.ok()) return ReportError(source.status());
  const auto limits = LimitsOf(options);
  if (!limits.ok()) return ReportError(limits.status());
  if (!options.jsonl) {
    std::string text;
    char buffer[1 << 16];
    while (const size_t n = std::fread(buffer, 1, sizeof buffer, stdin)) text.append(buffer, n);
    const auto request = ParseJsonLine(text);
    if (!request.ok()) return ReportError(Annotate(request.status(), "stdin"));
    if (!request->is_object()) return ReportError(absl::InvalidArgumentError("stdin: must be a JSON object"));
    const auto rendered = Render(*source, *request, *limits);
    if (!rendered.ok()) {
      ReportError(rendered.status());
      return 1;
    }
    std::fwrite(rendered->text.data(), 1, rendered->text.size(), stdout);
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      ReportError(absl::UnavailableError(absl::StrCat("stdout: ", std::strerror(errno))));
      return 1;
    }
    return 0;
  }
  return RunJsonLines(STDIN_FILENO, stdout, "\"ok\":false,", [&](const OrderedJson& line, std::string& out) {
    const auto rendered = Render(*source, line, *limits);
    if (!rendered.ok()) {
      out.append("{\"ok\":false,\"error\":");
      AppendJsonString(std::string(rendered.status().message()), out);
    } else {
      out.append("{\"ok\":true,\"text\":");
      AppendJsonString(rendered->text, out);
      if (options.data) {
        out.append(",\"data\":[");
        for (const ByteRange& range : rendered->data)
          absl::StrAppend(&out, "[", range.begin, ",", range.end, "],");
        if (!rendered->data.empty()) out.pop_back();
        out.push_back(']');
      }
    }
    out.push_back('}');
    return absl::OkStatus();
  });
}

}  // namespace

void AddModelRenderCommand(CLI::App& model, Command& run) {
  CLI::App* command = model.add_subcommand(
      "render",
      "Render a chat template. One request, a JSON object with messages, tools, documents,\n"
      "add_generation_prompt and whatever else the template reads, from stdin to text on stdout; or with "
      "--jsonl\n"
      "one a line to lines {\"ok\": true, \"text\"} or {\"ok\": false, \"error\"}. A template that refuses a "
      "request\n"
      "has answered: exit code 1 is for lines that are no JSON objects.");
  const auto options = std::make_shared<Options>();
  command
      ->add_option(
          "TEMPLATE", options->path,
          "A .jinja file, a tokenizer_config.json, or a model's directory (bos_token and its like come "
          "from there; a request may set them)")
      ->required()
      ->type_name("");
  command->add_flag("--jsonl", options->jsonl, "One request a line");
  command->add_flag("--data", options->data,
                    "Add \"data\": the byte ranges of the text that stem from the request (--jsonl only)");
  command
      ->add_option("--now", options->now,
                   "What strftime_now shows, as 2025-07-10T12:00:00; default: the clock")
      ->type_name("");
  command->add_option("--timezone", options->timezone, "Of strftime_now and --now")
      ->capture_default_str()
      ->type_name("");
  command->callback([&run, options] { run = [options] { return Run(*options); }; });
}

}  // namespace tidepool
