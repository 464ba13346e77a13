// `tidepool model tokenize DIR`: text to token ids and back, one text or a stream of JSON lines.
#include <unistd.h>

#include <charconv>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status.h"
#include "server/cli/config_flags.h"
#include "server/cli/jsonl.h"
#include "server/cli/model_commands.h"
#include "server/cli/output.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {
namespace {

struct Options {
  std::string dir;
  std::string text;
  bool jsonl = false, decode = false, no_special = false;
  std::string output = "table";
};

absl::StatusOr<bool> Flag(const OrderedJson& line, const char* field, bool fallback) {
  const auto it = line.find(field);
  if (it == line.end() || it->is_null()) return fallback;
  if (!it->is_boolean()) return absl::InvalidArgumentError(absl::StrCat(field, ": must be true or false"));
  return it->get<bool>();
}

void AppendIds(const std::vector<int32_t>& ids, std::string& out) {
  out.push_back('[');
  char digits[16];
  for (const int32_t id : ids) {
    const auto end = std::to_chars(digits, digits + sizeof digits, id).ptr;
    out.append(digits, end);
    out.push_back(',');
  }
  if (!ids.empty()) out.pop_back();
  out.push_back(']');
}

absl::Status EncodeLine(const Tokenizer& tokenizer, const OrderedJson& line, std::string& out) {
  const auto text = line.find("text");
  if (text == line.end() || !text->is_string()) return absl::InvalidArgumentError("text: must be a string");
  Tokenizer::EncodeOptions options;
  TP_ASSIGN_OR_RETURN(options.add_special_tokens, Flag(line, "add_special_tokens", true));
  TP_ASSIGN_OR_RETURN(options.parse_special, Flag(line, "parse_special", true));
  TP_ASSIGN_OR_RETURN(const auto ids, tokenizer.Encode(text->get_ref<const std::string&>(), options));
  out.append("{\"ids\":");
  AppendIds(ids, out);
  out.push_back('}');
  return absl::OkStatus();
}

absl::Status DecodeLine(const Tokenizer& tokenizer, const OrderedJson& line, std::string& out) {
  const auto list = line.find("ids");
  if (list == line.end() || !list->is_array())
    return absl::InvalidArgumentError("ids: must be a list of ids");
  std::vector<int32_t> ids;
  ids.reserve(list->size());
  for (const OrderedJson& id : *list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
      return absl::InvalidArgumentError(absl::StrCat("ids: ", id.dump(), " is no token id"));
    }
    ids.push_back(id.get<int32_t>());
  }
  TP_ASSIGN_OR_RETURN(const bool skip, Flag(line, "skip_special_tokens", true));
  out.append("{\"text\":");
  AppendJsonString(tokenizer.Decode(ids, skip), out);
  out.push_back('}');
  return absl::OkStatus();
}

int EncodeOne(const Tokenizer& tokenizer, const Options& options) {
  const auto ids = tokenizer.Encode(options.text, {.add_special_tokens = !options.no_special});
  if (!ids.ok()) return ReportError(ids.status());
  if (options.output == "json") {
    OrderedJson tokens = OrderedJson::array();
    for (int32_t id : *ids) tokens.push_back(std::string(tokenizer.TokenPiece(id).value_or("")));
    PrintJson({{"ids", *ids}, {"tokens", tokens}});
    return 0;
  }
  std::vector<std::vector<std::string>> rows;
  for (int32_t id : *ids) {
    rows.push_back({std::to_string(id), Printable(tokenizer.TokenPiece(id).value_or("")),
                    tokenizer.is_special(id) ? "special" : ""});
  }
  std::fputs(FormatTable({"id", "token", ""}, rows).c_str(), stdout);
  return 0;
}

int Run(const Options& options) {
  const auto tokenizer = Tokenizer::Load(options.dir);
  if (!tokenizer.ok()) return ReportError(tokenizer.status());
  if (!options.jsonl && !options.decode) return EncodeOne(**tokenizer, options);
  return RunJsonLines(STDIN_FILENO, stdout, "", [&](const OrderedJson& line, std::string& out) {
    return options.decode ? DecodeLine(**tokenizer, line, out) : EncodeLine(**tokenizer, line, out);
  });
}

}  // namespace

void AddModelTokenizeCommand(CLI::App& model, Command& run) {
  CLI::App* command = model.add_subcommand(
      "tokenize",
      "Text to token ids. With --jsonl: lines {\"text\", \"add_special_tokens\": true, \"parse_special\": "
      "true}\n"
      "from stdin to lines {\"ids\"}; with --decode: {\"ids\", \"skip_special_tokens\": true} to "
      "{\"text\"}.\n"
      "Broken UTF-8 and lone surrogate escapes read as U+FFFD. A line that cannot be read gives {\"error\"} "
      "in\n"
      "its place and exit code 1 at the end; blank lines are skipped, unknown fields ignored.");
  const auto options = std::make_shared<Options>();
  command->add_option("DIR", options->dir, "Directory with tokenizer.json")->required()->type_name("");
  CLI::Option* text =
      command->add_option("TEXT", options->text, "The text, where neither --jsonl nor --decode")
          ->type_name("");
  CLI::Option* jsonl = command->add_flag("--jsonl", options->jsonl, "Encode lines of stdin");
  CLI::Option* decode = command->add_flag("--decode", options->decode, "Decode lines of stdin");
  jsonl->excludes(text);
  decode->excludes(text);
  command->add_flag("--no-special-tokens", options->no_special,
                    "Do not add what the post-processor adds (TEXT only)");
  command->add_option("-o,--output", options->output, "table or json (TEXT only)")
      ->check(CLI::IsMember({"table", "json"}));
  command->callback([&run, options, text, jsonl, decode] {
    if (text->count() + jsonl->count() + decode->count() == 0) {
      throw CLI::RequiredError("TEXT, --jsonl or --decode");
    }
    run = [options] { return Run(*options); };
  });
}

}  // namespace tidepool
