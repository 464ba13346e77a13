// `tidepool model inspect DIR`: what a checkpoint is, as the model room reads it.
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/output.h"
#include "server/model/model_config.h"

namespace tidepool {
namespace {

nlohmann::ordered_json Describe(const ModelSpec& spec, uint32_t block_tokens) {
  const auto block_bytes = [&](DType dtype) { return LayoutFor(spec, block_tokens, dtype).block_bytes(); };
  return {{"layers", spec.layers},
          {"hidden", spec.hidden},
          {"heads", spec.heads},
          {"kv_heads", spec.kv_heads},
          {"head_dim", spec.head_dim},
          {"intermediate", spec.intermediate},
          {"vocab", spec.vocab},
          {"max_positions", spec.max_positions},
          {"rope_theta", spec.rope_theta},
          {"tie_embeddings", spec.tie_embeddings},
          {"bos_id", spec.bos_id},
          {"eos_ids", spec.eos_ids},
          {"block_tokens", block_tokens},
          {"block_bytes_bfloat16", block_bytes(DType::kBF16)},
          {"block_bytes_float32", block_bytes(DType::kF32)}};
}

}  // namespace

void AddModelCommand(CLI::App& app, Command& run) {
  CLI::App* model = app.add_subcommand("model", "Look at model directories");
  model->require_subcommand(1);
  CLI::App* inspect = model->add_subcommand("inspect", "Shape of a model and what its KV blocks cost");
  struct Options {
    std::string dir;
    std::string output = "table";
    uint32_t block_tokens = KvConfig().block_tokens;
  };
  const auto options = std::make_shared<Options>();
  inspect->add_option("DIR", options->dir, "Directory in Hugging Face layout")->required()->type_name("");
  inspect->add_option("--block-tokens", options->block_tokens, "Tokens of one KV block")
      ->check(CLI::Range(1, 1024));
  inspect->add_option("-o,--output", options->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}));
  inspect->callback([&run, options] {
    run = [=]() -> int {
      const auto spec = LoadModelSpec(options->dir);
      if (!spec.ok()) return ReportError(spec.status());
      const auto described = Describe(*spec, options->block_tokens);
      if (options->output == "json") {
        PrintJson(described);
        return 0;
      }
      std::vector<std::vector<std::string>> rows;
      for (const auto& [key, value] : described.items()) rows.push_back({key, value.dump()});
      std::fputs(FormatTable({"field", "value"}, rows).c_str(), stdout);
      return 0;
    };
  });
}

}  // namespace tidepool
