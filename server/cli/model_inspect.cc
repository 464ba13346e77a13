// `tidepool model inspect DIR`: what a model directory holds, what it costs, and whether it can be served;
// from its small files and the weights' headers.
#include <algorithm>
#include <cstdio>
#include <map>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/small_file.h"
#include "base/status.h"
#include "server/cli/config_flags.h"
#include "server/cli/model_commands.h"
#include "server/cli/output.h"
#include "server/model/fingerprint.h"
#include "server/model/model.h"
#include "server/model/safetensors.h"
#include "server/model/template/chat_template.h"
#include "server/model/tensor_list.h"
#include "server/model/text/json_reader.h"
#include "server/model/text/tokenizer.h"
#include "server/model/weights.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

constexpr size_t kProblemsMax = 50;  // of one kind; then their number
constexpr size_t kSpecialTokensShown = 16;

// What is wrong with a directory: each problem once, in the order found.
class Problems {
 public:
  void Add(std::string text) {
    if (std::ranges::find(list_, text) == list_.end()) list_.push_back(std::move(text));
  }
  void Add(const absl::Status& status) {
    if (!status.ok()) Add(std::string(status.message()));
  }
  const std::vector<std::string>& list() const { return list_; }

 private:
  std::vector<std::string> list_;
};

void DescribeShape(const ModelSpec& spec, ordered_json& out) {
  const Architecture& a = *spec.architecture;
  const ParameterCounts parameters = CountParameters(spec);
  out["architecture"] = a.name;
  out["family"] = a.family;
  out["parameters"] = parameters.total;
  out["parameters_active"] = parameters.active;
  out["layers"] = spec.layers;
  out["hidden"] = spec.hidden;
  out["heads"] = spec.heads;
  out["kv_heads"] = spec.kv_heads;
  out["head_dim"] = spec.head_dim;
  out["intermediate"] = spec.intermediate;
  uint32_t experts = 0, chosen = 0;
  std::map<uint32_t, uint32_t> windows;
  for (const LayerSpec& layer : spec.layer_specs) {
    experts = std::max(experts, layer.experts);
    chosen = std::max(chosen, layer.experts_per_token);
    ++windows[layer.window];
  }
  out["experts"] = experts;
  out["experts_per_token"] = chosen;
  out["vocab"] = spec.vocab;
  out["tie_embeddings"] = spec.tie_embeddings;
  out["max_positions"] = spec.max_positions;
  out["max_positions_scaled"] = spec.max_positions_scaled;
  out["rope"] = ordered_json::array();
  for (const RopeSpec& rope : spec.ropes) {
    out["rope"].push_back(RopeSummary(rope));
  }
  out["windows"] = ordered_json::array();
  for (const auto& [window, layers] : windows) {
    out["windows"].push_back(
        {{"layers", layers}, {"window", window == 0 ? ordered_json() : ordered_json(window)}});
  }
  out["bos_id"] = spec.bos_id < 0 ? ordered_json() : ordered_json(spec.bos_id);
  out["eos_ids"] = spec.eos_ids;
}

// Every tensor that the shape asks for and the checkpoint does not have as it must be.
void CheckEveryTensor(const Checkpoint& checkpoint, const ModelSpec& spec, Problems& problems) {
  const Architecture& a = *spec.architecture;
  const TensorPrefix* prefix = &a.prefixes.front();
  for (const TensorPrefix& candidate : a.prefixes) {
    if (checkpoint.Find(TensorName(candidate, a.embedding)).ok()) prefix = &candidate;
  }
  size_t wrong = 0;
  for (const TensorSpec& tensor : ExpectedTensors(spec, *prefix)) {
    const auto found = checkpoint.Get(tensor.name, tensor.shape);
    const absl::Status status =
        found.ok() ? Annotate((*found)->dtype().status(), absl::StrCat("tensor \"", tensor.name, "\""))
                   : found.status();
    if (!status.ok() && ++wrong <= kProblemsMax) problems.Add(status);
  }
  if (wrong > kProblemsMax) problems.Add(absl::StrCat("... and ", wrong - kProblemsMax, " more tensors"));
  // What the list does not tell: tensors that the shape has no use for.
  if (wrong == 0) problems.Add(CheckTensors(checkpoint, spec));
}

ordered_json DescribeWeights(const Checkpoint& checkpoint) {
  std::map<std::string, uint64_t> dtypes;
  std::map<std::string_view, bool> files;
  uint64_t bytes = 0;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    dtypes[tensor.dtype_name] += tensor.data.size();
    files[tensor.file] = true;
    bytes += tensor.data.size();
  }
  ordered_json by_dtype = ordered_json::object();
  for (const auto& [name, size] : dtypes) by_dtype[name] = size;
  return {{"files", files.size()},
          {"tensors", checkpoint.tensors().size()},
          {"bytes", bytes},
          {"bytes_by_dtype", by_dtype}};
}

// What a template does with what it may be given, found out by rendering.
ordered_json Features(const ChatTemplate& parsed, const ordered_json& trusted) {
  static constexpr const char* kMark = "qzprobe";
  const auto message = [](const char* role, const char* content) {
    return ordered_json{{"role", role}, {"content", content}};
  };
  const auto list = [](std::vector<ordered_json> items) { return ordered_json(std::move(items)); };
  const auto with = [](const char* name, ordered_json value) {
    ordered_json object = ordered_json::object();
    object[name] = std::move(value);
    return object;
  };
  const auto render = [&](const ordered_json& messages, const ordered_json& more) {
    ordered_json request = more;
    request["messages"] = messages;
    auto text = parsed.Render(request, trusted);
    return text.ok() ? std::optional<std::string>(std::move(text->text)) : std::nullopt;
  };
  const ordered_json none = ordered_json::object();
  const auto shows = [&](const ordered_json& messages, const ordered_json& more) {
    const auto text = render(messages, more);
    return text && text->find(kMark) != std::string::npos;
  };

  const ordered_json user = message("user", "hello"), chat = list({user});
  const ordered_json parameters = {{"type", "object"}, {"properties", none}};
  const ordered_json tool =
      with("function", {{"name", kMark}, {"description", kMark}, {"parameters", parameters}});
  ordered_json function_tool = tool;
  function_tool["type"] = "function";
  ordered_json call = with("function", {{"name", kMark}, {"arguments", none}});
  call["id"] = "call00000";
  call["type"] = "function";
  ordered_json calling = message("assistant", ""), reasoning = message("assistant", "x");
  calling["tool_calls"] = list({call});
  reasoning["reasoning_content"] = kMark;
  const ordered_json document = {{"title", kMark}, {"text", kMark}};
  const auto generation = [&](bool on) { return render(chat, with("add_generation_prompt", on)); };
  const auto thinking = [&](bool on) {
    ordered_json more = with("enable_thinking", on);
    more["add_generation_prompt"] = true;
    return render(chat, more);
  };
  return {{"system", shows(list({message("system", kMark), user}), none)},
          {"multi_turn", render(list({user, message("assistant", "x"), user}), none).has_value()},
          {"tools", shows(chat, with("tools", list({function_tool})))},
          {"tool_calls", shows(list({user, calling}), none)},
          {"documents", shows(chat, with("documents", list({document})))},
          {"reasoning", shows(list({user, reasoning}), none)},
          {"thinking_switch", thinking(true) != thinking(false)},
          {"generation_prompt", generation(true) != generation(false)}};
}

ordered_json DescribeTemplate(const Tokenizer& tokenizer, const std::string& dir, Problems& problems) {
  const std::string& source = tokenizer.chat_template();
  if (source.empty()) return nullptr;
  ordered_json out = {{"bytes", source.size()}, {"sha256", HexEncode(Sha256().Update(source).Finish())}};
  const auto parsed = ChatTemplate::Parse(source);
  if (!parsed.ok()) {
    problems.Add(Annotate(parsed.status(), dir));
    return out;
  }
  out["features"] =
      Features(*parsed, {{"bos_token", tokenizer.bos_token()}, {"eos_token", tokenizer.eos_token()}});
  return out;
}

// tokenizer.json's model.type.
std::string TokenizerModel(const std::string& dir) {
  constexpr size_t kBytesMax = size_t{256} << 20;
  const auto text = ReadSmallFile(dir + "/tokenizer.json", kBytesMax);
  if (!text.ok()) return "";
  const auto json = json_reader::Parse(*text, "tokenizer.json");
  const nlohmann::json* model = json.ok() ? json_reader::Member(*json, "model") : nullptr;
  if (model == nullptr) return "";
  // Older files leave it out; BPE is what has merges.
  return json_reader::GetString(*model, "type", "model", model->contains("merges") ? "BPE" : "").value_or("");
}

ordered_json DescribeTokenizer(const Tokenizer& tokenizer, const std::string& dir) {
  ordered_json special = ordered_json::array();
  size_t count = 0;
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    if (!tokenizer.is_special(id) || ++count > kSpecialTokensShown) continue;
    special.push_back(std::string(tokenizer.TokenPiece(id).value_or("")));
  }
  return {{"model", TokenizerModel(dir)},
          {"vocab", tokenizer.vocab_size()},
          {"special_tokens", count},
          {"special_tokens_first", special},
          {"bos_token", tokenizer.bos_token()},
          {"eos_token", tokenizer.eos_token()},
          {"sha256", tokenizer.Digest()}};
}

// generation_config.json without what its writer notes about itself.
ordered_json DescribeGeneration(const std::string& dir, Problems& problems) {
  constexpr size_t kBytesMax = size_t{1} << 20;
  const std::string path = dir + "/generation_config.json";
  const auto text = ReadSmallFile(path, kBytesMax);
  if (absl::IsNotFound(text.status())) return ordered_json::object();
  const auto json = text.ok() ? json_reader::Parse(*text, path) : text.status();
  if (!json.ok()) {
    problems.Add(json.status());
    return ordered_json::object();
  }
  ordered_json out = ordered_json::object();
  for (const auto& [key, value] : json->items()) {
    if (!key.starts_with('_') && key != "transformers_version") out[key] = value;
  }
  return out;
}

struct Report {
  ordered_json json;
  std::vector<std::string> problems;
};

Report Inspect(const std::string& dir, uint32_t block_tokens) {
  Problems problems;
  ordered_json out = {{"path", dir}, {"servable", false}};
  const auto spec = LoadModelSpec(dir);
  if (!spec.ok()) {
    for (const absl::Status& problem : LoadModelSpecProblems(dir)) problems.Add(problem);
    problems.Add(spec.status());
  }
  const auto checkpoint = Checkpoint::Open(dir);
  problems.Add(checkpoint.status());
  const auto tokenizer = Tokenizer::Load(dir);
  problems.Add(tokenizer.status());

  absl::StatusOr<DType> dtype = absl::UnknownError("");
  if (spec.ok()) DescribeShape(*spec, out);
  if (checkpoint.ok()) out["weights"] = DescribeWeights(*checkpoint);
  if (spec.ok() && checkpoint.ok()) {
    CheckEveryTensor(*checkpoint, *spec, problems);
    dtype = ComputeDType("auto", *spec, *checkpoint);
    problems.Add(dtype.status());
  }
  if (spec.ok()) {
    const auto block = [&](DType t) { return LayoutFor(*spec, block_tokens, t).block_bytes(); };
    out["block_tokens"] = block_tokens;
    if (dtype.ok()) {
      out["kv_dtype"] = DTypeName(*dtype);
      out["kv_bytes_per_token"] = block(*dtype) / block_tokens;
      out["kv_bytes_per_block"] = block(*dtype);
    }
    out["block_bytes_bfloat16"] = block(DType::kBF16);
    out["block_bytes_float32"] = block(DType::kF32);
  }
  if (tokenizer.ok()) {
    out["tokenizer"] = DescribeTokenizer(**tokenizer, dir);
    out["chat_template"] = DescribeTemplate(**tokenizer, dir, problems);
  }
  out["generation"] = DescribeGeneration(dir, problems);
  if (spec.ok() && tokenizer.ok() && dtype.ok()) {
    out["fingerprint"] =
        ModelFingerprint(*spec, (*tokenizer)->Digest(), *dtype, *checkpoint, spec->max_positions);
  }
  out["problems"] = problems.list();
  out["servable"] = problems.list().empty();
  return {std::move(out), problems.list()};
}

// "1,234,567" as "1.23M".
std::string Short(uint64_t n) {
  const auto d = static_cast<double>(n);
  if (n >= 1'000'000'000) return absl::StrFormat("%.2fB", d / 1e9);
  if (n >= 1'000'000) return absl::StrFormat("%.2fM", d / 1e6);
  return std::to_string(n);
}

// A value for a table: objects and lists in one line, without quotes.
std::string Cell(const ordered_json& value) {
  if (value.is_string()) return Printable(value.get_ref<const std::string&>());
  if (value.is_null()) return "none";
  if (value.is_array()) {
    std::string out;
    for (const auto& item : value) absl::StrAppend(&out, out.empty() ? "" : ", ", Cell(item));
    return out.empty() ? "none" : out;
  }
  if (value.is_object()) {
    std::string out;
    for (const auto& [key, item] : value.items())
      absl::StrAppend(&out, out.empty() ? "" : ", ", Printable(key), " ", Cell(item));
    return out.empty() ? "none" : out;
  }
  return value.dump();
}

void PrintTable(const ordered_json& json) {
  std::vector<std::vector<std::string>> rows;
  for (const auto& [key, value] : json.items()) {
    if (key == "problems") continue;
    if (key.starts_with("parameters")) {
      rows.push_back({key, absl::StrCat(Cell(value), " (", Short(value.get<uint64_t>()), ")")});
    } else if (value.is_object() && (key == "tokenizer" || key == "chat_template" || key == "weights")) {
      for (const auto& [inner, item] : value.items())
        rows.push_back({absl::StrCat(key, ".", inner), Cell(item)});
    } else {
      rows.push_back({key, Cell(value)});
    }
  }
  std::fputs(FormatTable({"field", "value"}, rows).c_str(), stdout);
}

}  // namespace

void AddModelInspectCommand(CLI::App& model, Command& run) {
  CLI::App* inspect = model.add_subcommand("inspect",
                                           "What a model directory holds, what its KV costs, and everything "
                                           "that keeps it from being served (exit\n"
                                           "code 2). Reads the small files and the weights' headers.");
  struct Options {
    std::string dir;
    std::string output = "table";
    uint32_t block_tokens = KvConfig().block_tokens;
  };
  const auto options = std::make_shared<Options>();
  inspect->add_option("DIR", options->dir, "Directory in Hugging Face layout")->required()->type_name("");
  inspect->add_option("--block-tokens", options->block_tokens, "Tokens of one KV block")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  inspect->add_option("-o,--output", options->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}));
  inspect->callback([&run, options] {
    run = [options]() -> int {
      const Report report = Inspect(options->dir, options->block_tokens);
      if (options->output == "json") {
        PrintJson(report.json);
      } else {
        PrintTable(report.json);
      }
      for (const std::string& problem : report.problems)
        std::fprintf(stderr, "tidepool: %s\n", Printable(problem).c_str());
      return report.problems.empty() ? 0 : 2;
    };
  });
}

}  // namespace tidepool
