#include "server/model/model_config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "server/model/config_reader.h"
#include "server/model/json_reader.h"
#include "server/model/rope_config.h"

namespace tidepool {
namespace {

using nlohmann::json;

constexpr uint64_t kConfigBytesMax = 16ULL << 20;
constexpr uint32_t kExpertsMax = 4096;
// Tensors are listed one by one: a hostile config must not name billions.
constexpr uint64_t kLayerExpertsMax = 1 << 17;

const Architecture* ReadArchitecture(ConfigReader& root) {
  std::string supported;
  for (const Architecture& a : Architectures()) {
    absl::StrAppend(&supported, supported.empty() ? "" : ", ", std::string(a.name));
  }
  const json* v = root.Find("architectures");
  if (v == nullptr || !v->is_array() || v->size() != 1 || !(*v)[0].is_string()) {
    root.Invalid(absl::StrCat("architectures is ", v == nullptr ? "missing" : JsonForMessage(*v),
                              "; it must be a list of one name, out of: ", supported));
    return nullptr;
  }
  const Architecture* a = FindArchitecture((*v)[0].get_ref<const std::string&>());
  if (a == nullptr) root.Unsupported("architectures", *v, supported);
  return a;
}

void CheckRules(ConfigReader& config, std::span<const FieldRule> rules) {
  for (const FieldRule& rule : rules) {
    const json* v = config.Find(rule.field);
    if (v == nullptr) continue;
    const json allowed = json::parse(rule.allowed);
    if (std::ranges::find(allowed, *v) != allowed.end()) continue;
    config.Unsupported(rule.field, *v,
                       allowed.empty()
                           ? "null or no such field"
                           : absl::StrCat("one of ", std::string(rule.allowed), ", null or no such field"));
  }
}

void ReadSizes(ConfigReader& c, ModelSpec& spec) {
  spec.layers = c.Count("num_hidden_layers", 1, 1024);
  spec.hidden = c.Count("hidden_size", 1, 1 << 20);
  spec.heads = c.Count("num_attention_heads", 1, 4096);
  // Where heads could not be read, whatever number of kv heads is as good.
  const uint32_t heads = spec.heads > 0 ? spec.heads : 4096;
  spec.kv_heads = c.Count("num_key_value_heads", 1, heads, heads);
  spec.intermediate = c.Count("intermediate_size", 1, 1 << 22);
  spec.vocab = c.Count("vocab_size", 1, 1 << 24);
  spec.max_positions = c.Count("max_position_embeddings", 1, 1 << 24);
  if (spec.heads > 0 && spec.kv_heads > 0 && spec.heads % spec.kv_heads != 0) {
    c.Invalid(absl::StrFormat("num_key_value_heads is %d; it must divide num_attention_heads (%d)",
                              spec.kv_heads, spec.heads));
  }
  if (c.Find("head_dim") != nullptr) {
    spec.head_dim = c.Count("head_dim", 2, 1024);
  } else if (spec.heads > 0 && spec.hidden > 0) {
    if (spec.hidden % spec.heads != 0) {
      c.Invalid(absl::StrFormat("without head_dim, num_attention_heads (%d) must divide hidden_size (%d)",
                                spec.heads, spec.hidden));
      return;
    }
    spec.head_dim = spec.hidden / spec.heads;
  } else {
    return;
  }
  // Rotation pairs the elements of a head.
  if (spec.head_dim != 0 && (spec.head_dim < 2 || spec.head_dim > 1024 || spec.head_dim % 2 != 0)) {
    c.Invalid(absl::StrFormat("head_dim is %d; it must be even and in [2, 1024]", spec.head_dim));
  }
}

void ReadNumbers(ConfigReader& c, ModelSpec& spec) {
  const Architecture& a = *spec.architecture;
  spec.rms_eps = c.Number("rms_norm_eps", 1e-12, 0.1, 1e-6);
  spec.qkv_bias = a.attention_bias == AttentionBias::kQkv;
  if (a.attention_bias == AttentionBias::kConfigField) {
    spec.qkv_bias = spec.o_bias = c.Bool("attention_bias", false);
  }
  spec.mlp_bias = a.mlp_bias && c.Bool("mlp_bias", false);
  const double divisor = a.query_scalar ? c.Number("query_pre_attn_scalar", 1e-3, 1e6, 1) : spec.head_dim;
  spec.attention_scale = 1.0 / std::sqrt(std::max(divisor, 1e-3));
  // 0 is none here, and would divide by it there.
  if (a.attention_softcap && c.Find("attn_logit_softcapping") != nullptr) {
    spec.attention_softcap = c.RequiredNumber("attn_logit_softcapping", 1e-3, 1e6);
  }
  if (c.Find("final_logit_softcapping") != nullptr) {
    spec.final_softcap = c.RequiredNumber("final_logit_softcapping", 1e-3, 1e6);
  }
}

// Which layers have a window: by the list of the config, if it has one.
std::optional<std::vector<bool>> ReadLayerTypes(ConfigReader& c, uint32_t layers) {
  const json* v = c.Find("layer_types");
  if (v == nullptr) return std::nullopt;
  std::vector<bool> out(layers);
  if (!v->is_array() || v->size() != layers) {
    c.Invalid(absl::StrCat("layer_types is ", JsonForMessage(*v), "; it must be a list of ", layers,
                           " names (num_hidden_layers)"));
    return out;
  }
  for (uint32_t i = 0; i < layers; ++i) {
    out[i] = (*v)[i] == "sliding_attention";
    if (!out[i] && (*v)[i] != "full_attention") {
      c.Unsupported(absl::StrCat("layer_types[", i, "]"), (*v)[i], "full_attention, sliding_attention");
      return out;
    }
  }
  return out;
}

void ReadWindows(ConfigReader& c, ModelSpec& spec) {
  const WindowRule rule = spec.architecture->window;
  if (rule == WindowRule::kNone) return;
  const bool always = rule == WindowRule::kEveryLayer || rule == WindowRule::kPattern;
  const bool used = always || c.Bool("use_sliding_window", false);
  uint32_t window = 0;
  if (used && c.Find("sliding_window") != nullptr) window = c.Count("sliding_window", 1, INT32_MAX);

  std::vector<bool> slides(spec.layers, true);
  if (rule == WindowRule::kIfUsedBeyond || rule == WindowRule::kPattern) {
    if (auto listed = ReadLayerTypes(c, spec.layers)) {
      slides = *std::move(listed);
    } else if (rule == WindowRule::kPattern) {
      const uint32_t every = std::max(c.Count("sliding_window_pattern", 1, 1024), 1u);
      for (uint32_t i = 0; i < spec.layers; ++i) slides[i] = (i + 1) % every != 0;
    } else {
      const uint32_t first = c.Count("max_window_layers", 0, 1 << 20);
      for (uint32_t i = 0; i < spec.layers; ++i) slides[i] = window > 0 && i >= first;
    }
    if (window == 0 && std::ranges::find(slides, true) != slides.end()) {
      c.Invalid("sliding_window is null or unused, but layer_types has sliding_attention");
    }
  }
  for (uint32_t i = 0; i < spec.layers; ++i) {
    if (!slides[i]) continue;
    spec.layer_specs[i].window = window;
    if (spec.architecture->local_rope) spec.layer_specs[i].rope = 1;
  }
}

void ReadExperts(ConfigReader& c, ModelSpec& spec) {
  const Architecture& a = *spec.architecture;
  if (a.router.empty()) return;
  // Both spellings mean the same (transformers 5 writes the second).
  const char* field = c.Find("num_local_experts") == nullptr ? "num_experts" : "num_local_experts";
  const uint32_t experts = c.Count(field, 0, kExpertsMax);
  if (experts == 0) return;
  if (uint64_t{experts} * spec.layers > kLayerExpertsMax) {
    c.Invalid(absl::StrCat(field, " is ", experts, " in ", spec.layers, " layers; at most ", kLayerExpertsMax,
                           " experts in all are supported"));
    return;
  }
  const uint32_t chosen = c.Count("num_experts_per_tok", 1, std::min(experts, 64u));
  const bool has_own_size = c.Find("moe_intermediate_size") != nullptr;
  const uint32_t intermediate =
      has_own_size ? c.Count("moe_intermediate_size", 1, 1 << 22) : spec.intermediate;
  const bool renormalise = a.renormalise_experts || c.Bool("norm_topk_prob", false);
  const uint32_t step = std::max(c.Count("decoder_sparse_step", 1, 1024, 1), 1u);
  std::vector<bool> dense(spec.layers);
  if (const json* only = c.Find("mlp_only_layers")) {
    for (const json& l : only->is_array() ? *only : json::array({*only})) {
      if (l.is_number_unsigned() && l.get<uint64_t>() < spec.layers) {
        dense[l.get<uint64_t>()] = true;
      } else if (!l.is_number_unsigned()) {
        c.Invalid(absl::StrCat("mlp_only_layers is ", JsonForMessage(*only),
                               "; it must be a list of layer numbers"));
        break;
      }
    }
  }
  for (uint32_t i = 0; i < spec.layers; ++i) {
    if (dense[i] || (i + 1) % step != 0) continue;
    LayerSpec& l = spec.layer_specs[i];
    l.intermediate = intermediate;
    l.experts = experts;
    l.experts_per_token = chosen;
    l.renormalise_experts = renormalise;
  }
}

// An id, a list of ids, or nothing. Ids may lie outside the vocabulary of the embedding (unused ones);
// they are then never drawn.
std::vector<int32_t> ReadIds(ConfigReader& c, std::string_view field) {
  std::vector<int32_t> out;
  const json* v = c.Find(field);
  if (v == nullptr) return out;
  const json list = v->is_array() ? *v : json::array({*v});
  if (list.size() > 64) {
    c.Invalid(absl::StrCat(std::string(field), " has ", list.size(), " ids; at most 64 are read"));
    return out;
  }
  for (const json& id : list) {
    const json wrapped = {{std::string(field), id}};
    const auto i = JsonFields(wrapped, c.where()).Int(field, 0, INT32_MAX);
    if (!i.ok()) {
      c.Add(i.status());
      return {};
    }
    out.push_back(static_cast<int32_t>(*i));
  }
  return out;
}

void ReadStoredDType(ConfigReader& c, ModelSpec& spec) {
  for (const char* field : {"dtype", "torch_dtype"}) {
    const json* v = c.Find(field);
    if (v != nullptr && v->is_string() && spec.stored_dtype.empty())
      spec.stored_dtype = v->get<std::string>();
  }
}

ModelSpec ReadSpec(std::string_view config_json, std::string_view generation_json, std::string_view where,
                   std::vector<absl::Status>& problems) {
  ModelSpec spec;
  const std::string file = absl::StrCat(std::string(where), "/config.json");
  auto root_json = ParseJson(config_json, file);
  if (root_json.ok() && !root_json->is_object()) {
    root_json = absl::InvalidArgumentError(absl::StrCat(file, ": not a JSON object"));
  }
  if (!root_json.ok()) {
    problems.push_back(root_json.status());
    return spec;
  }
  ConfigReader root(*root_json, file, problems);
  spec.architecture = ReadArchitecture(root);
  if (spec.architecture == nullptr) return spec;
  const Architecture& a = *spec.architecture;

  // The decoder's fields: the defaults of its family, and the config's over them.
  json merged = json::parse(a.defaults);
  std::string merged_where = file;
  if (a.text_config.empty()) {
    merged.update(*root_json);
  } else {
    absl::StrAppend(&merged_where, ": ", std::string(a.text_config));
    const json* text = root.Find(a.text_config);
    if (text == nullptr || !text->is_object()) {
      root.Invalid(absl::StrCat(std::string(a.text_config), " is missing or not an object"));
      return spec;
    }
    merged.update(*text);
    // What the outer object says of the whole, it says of the decoder.
    for (const char* field : {"tie_word_embeddings", "quantization_config", "bos_token_id", "eos_token_id"}) {
      if (const json* v = root.Find(field)) merged[field] = *v;
    }
    ReadStoredDType(root, spec);
  }
  ConfigReader c(merged, merged_where, problems);
  CheckRules(c, CommonRules());
  CheckRules(c, a.rules);
  ReadSizes(c, spec);
  ReadNumbers(c, spec);
  spec.tie_embeddings = c.Bool("tie_word_embeddings", false);
  ReadRopes(c, spec);
  spec.layer_specs.assign(spec.layers, LayerSpec{.intermediate = spec.intermediate});
  ReadWindows(c, spec);
  ReadExperts(c, spec);
  ReadStoredDType(c, spec);

  const std::vector<int32_t> bos = ReadIds(c, "bos_token_id");
  if (!bos.empty()) spec.bos_id = bos[0];
  spec.eos_ids = ReadIds(c, "eos_token_id");
  if (generation_json.empty()) return spec;
  const std::string generation_file = absl::StrCat(std::string(where), "/generation_config.json");
  auto generation = ParseJson(generation_json, generation_file);
  if (generation.ok() && !generation->is_object()) {
    generation = absl::InvalidArgumentError(absl::StrCat(generation_file, ": not a JSON object"));
  }
  if (!generation.ok()) {
    problems.push_back(generation.status());
    return spec;
  }
  ConfigReader g(*generation, generation_file, problems);
  std::vector<int32_t> eos = ReadIds(g, "eos_token_id");
  if (!eos.empty()) spec.eos_ids = std::move(eos);
  return spec;
}

struct ConfigFiles {
  std::string config, generation;
};

absl::StatusOr<ConfigFiles> ReadConfigFiles(const std::string& dir) {
  ConfigFiles out;
  TP_ASSIGN_OR_RETURN(out.config, ReadSmallFile(dir + "/config.json", kConfigBytesMax));
  auto generation = ReadSmallFile(dir + "/generation_config.json", kConfigBytesMax);
  if (absl::IsNotFound(generation.status())) return out;
  TP_RETURN_IF_ERROR(generation.status());
  // Empty is no JSON; to ParseModelSpec it would be as if there were no such file.
  out.generation = generation->empty() ? " " : *std::move(generation);
  return out;
}

}  // namespace

absl::StatusOr<ModelSpec> ParseModelSpec(std::string_view config_json, std::string_view generation_json,
                                         std::string_view where) {
  std::vector<absl::Status> problems;
  ModelSpec spec = ReadSpec(config_json, generation_json, where, problems);
  if (!problems.empty()) return problems.front();
  return spec;
}

std::vector<absl::Status> ModelSpecProblems(std::string_view config_json, std::string_view generation_json,
                                            std::string_view where) {
  std::vector<absl::Status> problems;
  ReadSpec(config_json, generation_json, where, problems);
  return problems;
}

absl::StatusOr<ModelSpec> LoadModelSpec(const std::string& dir) {
  TP_ASSIGN_OR_RETURN(const ConfigFiles files, ReadConfigFiles(dir));
  return ParseModelSpec(files.config, files.generation, dir);
}

std::vector<absl::Status> LoadModelSpecProblems(const std::string& dir) {
  const auto files = ReadConfigFiles(dir);
  if (!files.ok()) return {files.status()};
  return ModelSpecProblems(files->config, files->generation, dir);
}

BlockLayout LayoutFor(const ModelSpec& spec, uint32_t block_tokens, DType kv_dtype) {
  return BlockLayout{.layers = spec.layers,
                     .kv_heads = spec.kv_heads,
                     .head_dim = spec.head_dim,
                     .block_tokens = block_tokens,
                     .dtype = kv_dtype};
}

}  // namespace tidepool
