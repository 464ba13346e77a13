// `tidepool model synthesize`: random checkpoints of a given shape, for benchmarks and tests.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/small_file.h"
#include "base/status.h"
#include "server/cli/config_flags.h"
#include "server/cli/model_commands.h"
#include "server/cli/output.h"
#include "server/model/model_config.h"
#include "server/model/synthesize.h"
#include "server/model/tensor_list.h"
#include "server/model/text/json_reader.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string like, config, size, dtype = "bf16", output = "table";
  double shard_gb = 5;
  ShapeChanges changes;
  SynthesisOptions synthesis;
};

std::atomic<bool> interrupted{false};

// "1B", "350M", "7.5e9": a number of parameters.
absl::StatusOr<uint64_t> ParseSize(const std::string& text) {
  char* end = nullptr;
  double number = std::strtod(text.c_str(), &end);
  const std::string unit = end;
  number *= unit == "B" || unit == "b" ? 1e9 : unit == "M" || unit == "m" ? 1e6 : unit.empty() ? 1 : NAN;
  if (end == text.c_str() || !(number >= 1 && number <= 1e13)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--size: '", text, "' is no number of parameters such as 350M or 1.5B, at most 10000B"));
  }
  return static_cast<uint64_t>(number);
}

absl::StatusOr<ordered_json> ReadConfig(const std::string& path) {
  TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, size_t{1} << 20));
  TP_RETURN_IF_ERROR(json_reader::Parse(text, path).status());  // names the place, and caps the depth
  return ordered_json::parse(text);
}

// One line on a terminal, moved on a few times a second.
class ProgressBar {
 public:
  ProgressBar() : show_(::isatty(STDERR_FILENO) == 1), begin_(Clock::now()) {}
  ~ProgressBar() {
    if (shown_) std::fputs("\r\x1b[K", stderr);
  }
  void Update(uint64_t done, uint64_t total) {
    const auto now = Clock::now();
    if (!show_ || now - last_ < std::chrono::milliseconds(200)) return;
    last_ = now;
    shown_ = true;
    const double seconds = std::chrono::duration<double>(now - begin_).count();
    const double part = total == 0 ? 1 : static_cast<double>(done) / static_cast<double>(total);
    const int filled = static_cast<int>(part * 30);
    std::fprintf(stderr, "\r\x1b[K[%.*s%.*s] %3.0f%%  %.1f of %.1f GB  %.2f GB/s", filled,
                 "##############################", 30 - filled, "..............................", part * 100,
                 static_cast<double>(done) / 1e9, static_cast<double>(total) / 1e9,
                 static_cast<double>(done) / 1e9 / std::max(seconds, 1e-3));
    std::fflush(stderr);
  }

 private:
  const bool show_;
  const Clock::time_point begin_;
  Clock::time_point last_;
  bool shown_ = false;
};

absl::StatusOr<ordered_json> ConfigOf(const Options& options) {
  ShapeChanges changes = options.changes;
  if (!options.size.empty()) {
    TP_ASSIGN_OR_RETURN(changes.parameters, ParseSize(options.size));
  }
  if (!options.like.empty()) return SynthesisConfig(options.like, changes);
  TP_ASSIGN_OR_RETURN(ordered_json config, ReadConfig(options.config));
  auto changed = ChangeShape(std::move(config), changes);
  if (!changed.ok()) return Annotate(changed.status(), options.config);
  return changed;
}

int Run(Options& options) {
  const auto config = ConfigOf(options);
  if (!config.ok()) return ReportError(config.status());
  SynthesisOptions& synthesis = options.synthesis;
  synthesis.dtype = options.dtype == "bf16"  ? DType::kBF16
                    : options.dtype == "f16" ? DType::kF16
                                             : DType::kF32;
  synthesis.shard_bytes_max = static_cast<uint64_t>(options.shard_gb * 1e9);
  synthesis.stop = [] { return interrupted.load(); };
  // What is half written is removed on the way out.
  std::signal(SIGINT, [](int) { interrupted = true; });
  std::signal(SIGTERM, [](int) { interrupted = true; });
  const auto begin = Clock::now();
  absl::StatusOr<SynthesisResult> result;
  {
    ProgressBar bar;
    synthesis.progress = [&](uint64_t done, uint64_t total) { bar.Update(done, total); };
    result = Synthesize(*config, synthesis);
  }
  if (!result.ok()) {
    const int code = ReportError(result.status());
    return absl::IsAlreadyExists(result.status()) ? 2 : code;
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  const ordered_json summary = {{"path", synthesis.out},
                                {"architecture", (*config)["architectures"][0]},
                                {"parameters", result->parameters},
                                {"dtype", DTypeName(synthesis.dtype)},
                                {"bytes", result->weight_bytes},
                                {"files", result->shards},
                                {"seed", synthesis.seed},
                                {"seconds", seconds},
                                {"bytes_per_second", static_cast<double>(result->weight_bytes) / seconds}};
  if (options.output == "json") {
    PrintJson(summary);
  } else {
    std::fputs(FormatTable(ordered_json::array({summary})).c_str(), stdout);
  }
  return 0;
}

// The shapes with their sizes, for --help.
std::string ShapeTable() {
  std::string out = "Shapes for --like (a family's name stands for its first):\n";
  for (const SynthesisShape& shape : SynthesisShapes()) {
    const auto spec = ParseModelSpec(shape.config, "", shape.name);
    if (!spec.ok()) continue;  // a test sees to it that there is none
    const ParameterCounts n = CountParameters(*spec);
    const std::string family(spec->architecture->family), name(shape.name);
    out += absl::StrFormat("  %-15s %-10s %7.3fB  %2d layers, hidden %d, %d heads, %d kv, vocab %d", name,
                           family, static_cast<double>(n.total) / 1e9, spec->layers, spec->hidden,
                           spec->heads, spec->kv_heads, spec->vocab);
    const LayerSpec& layer = spec->layer_specs.back();
    if (layer.experts > 0)
      out += absl::StrFormat(", %d experts (%d a token)", layer.experts, layer.experts_per_token);
    out += "\n";
  }
  return out;
}

}  // namespace

void AddModelSynthesizeCommand(CLI::App& model, Command& run) {
  CLI::App* command = model.add_subcommand(
      "synthesize", "Write a random checkpoint of a known shape: deterministic, servable, made in seconds");
  const auto options = std::make_shared<Options>();
  CLI::Option* like = command->add_option("--like", options->like, "A shape or a family of the list below");
  CLI::Option* config =
      command->add_option("--config", options->config, "A config.json that gives the shape");
  like->excludes(config)->type_name("FAMILY");
  config->type_name("FILE");
  command->add_option("--out", options->synthesis.out, "The directory to make; must be empty or not there")
      ->required()
      ->type_name("DIR");
  command->add_option("--size", options->size, "Parameters, as 350M or 1.5B: that many layers of the shape");
  const auto change = [&](const char* flag, std::optional<uint32_t>& value, const char* help) {
    command->add_option(flag, value, help)->check(CLI::Range(1u, 1u << 24));
  };
  ShapeChanges& changes = options->changes;
  change("--layers", changes.layers, "Decoder layers");
  change("--hidden", changes.hidden, "Hidden size; takes heads and feed-forward along in proportion");
  change("--heads", changes.heads, "Attention heads");
  change("--kv-heads", changes.kv_heads, "Key and value heads");
  change("--head-dim", changes.head_dim, "Size of a head");
  change("--intermediate", changes.intermediate, "Size of the feed-forward block, or of an expert's");
  change("--experts", changes.experts, "Experts of a sparse shape");
  change("--vocab", changes.vocab, "Vocabulary");
  change("--max-positions", changes.max_positions, "Context length");
  command
      ->add_option("--tokenizer", options->synthesis.tokenizer,
                   "Directory whose tokenizer is copied; default: a byte-level one with a chat template")
      ->type_name("DIR");
  command->add_option("--dtype", options->dtype, "bf16, f16 or f32")
      ->check(CLI::IsMember({"bf16", "f16", "f32"}))
      ->capture_default_str();
  command->add_option("--seed", options->synthesis.seed, "Equal seed and shape: equal bytes")
      ->capture_default_str();
  command->add_option("--shard-gb", options->shard_gb, "Largest file, GB")
      ->check(CLI::Range(1e-6, 1e6))
      ->capture_default_str();
  command->add_option("-o,--output", options->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}));
  command->footer([] { return ShapeTable(); });
  command->callback([&run, options, like, config] {
    if (like->count() + config->count() == 0) throw CLI::RequiredError("--like or --config");
    run = [options] { return Run(*options); };
  });
}

}  // namespace tidepool
