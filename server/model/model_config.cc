#include "server/model/model_config.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "server/model/json_reader.h"

namespace tidepool {
namespace {

using nlohmann::json;

constexpr uint64_t kConfigBytesMax = 16ULL << 20;

absl::Status Unsupported(const JsonFields& fields, std::string_view field, const json& value,
                         std::string_view supported) {
  return absl::UnimplementedError(absl::StrCat(fields.where(), ": ", std::string(field), " is ",
                                               JsonForMessage(value),
                                               "; supported: ", std::string(supported)));
}

absl::StatusOr<const Architecture*> ReadArchitecture(const JsonFields& fields) {
  std::string supported;
  for (const Architecture& a : Architectures()) {
    absl::StrAppend(&supported, supported.empty() ? "" : ", ", std::string(a.name));
  }
  const json* v = fields.Find("architectures");
  if (v == nullptr || !v->is_array() || v->size() != 1 || !(*v)[0].is_string()) {
    return absl::InvalidArgumentError(absl::StrCat(fields.where(), ": architectures is ",
                                                   v == nullptr ? "missing" : JsonForMessage(*v),
                                                   "; it must be a list of one name, out of: ", supported));
  }
  const Architecture* a = FindArchitecture((*v)[0].get_ref<const std::string&>());
  if (a == nullptr) return Unsupported(fields, "architectures", *v, supported);
  return a;
}

absl::Status CheckRules(const JsonFields& fields, const Architecture& architecture) {
  for (const FieldRule& rule : architecture.rules) {
    const json* v = fields.Find(rule.field);
    if (v == nullptr) continue;
    const json allowed = json::parse(rule.allowed);
    bool ok = false;
    for (const json& a : allowed) ok |= a == *v;
    if (!ok) {
      return Unsupported(fields, rule.field, *v,
                         allowed.empty()
                             ? "null or no such field"
                             : absl::StrCat("one of ", std::string(rule.allowed), ", null or no such field"));
    }
  }
  return absl::OkStatus();
}

// RoPE in both spellings: `rope_theta` and `rope_scaling`, or (transformers 5) all in `rope_parameters`.
absl::Status ReadRope(const JsonFields& fields, const Architecture& architecture, ModelSpec& spec) {
  constexpr double kThetaMax = 1e12;
  TP_ASSIGN_OR_RETURN(spec.rope_theta,
                      fields.Number("rope_theta", 1.0, kThetaMax, architecture.rope_theta_default));
  for (const char* field : {"rope_scaling", "rope_parameters"}) {
    const json* v = fields.Find(field);
    if (v == nullptr) continue;
    if (!v->is_object()) {
      return absl::InvalidArgumentError(absl::StrCat(fields.where(), ": ", field, " is ", JsonForMessage(*v),
                                                     "; it must be an object or null"));
    }
    for (const char* type_field : {"rope_type", "type"}) {
      const auto type = v->find(type_field);
      if (type != v->end() && *type != "default") {
        return Unsupported(fields, absl::StrCat(field, ".", type_field), *type, "\"default\"");
      }
    }
    for (const auto& [key, value] : v->items()) {
      if (key == "rope_type" || key == "type" || (key == "partial_rotary_factor" && value == 1.0)) continue;
      if (key == "rope_theta") {
        TP_ASSIGN_OR_RETURN(
            spec.rope_theta,
            JsonFields(*v, absl::StrCat(fields.where(), ": ", field)).Number("rope_theta", 1.0, kThetaMax));
        continue;
      }
      return Unsupported(fields, absl::StrCat(field, ".", key), value, "unscaled rotary positions");
    }
  }
  return absl::OkStatus();
}

// An id, a list of ids, or nothing. Ids may lie outside the vocabulary of the embedding (unused ones);
// they are then never drawn.
absl::StatusOr<std::vector<int32_t>> ReadIds(const JsonFields& fields, std::string_view field) {
  std::vector<int32_t> out;
  const json* v = fields.Find(field);
  if (v == nullptr) return out;
  const json list = v->is_array() ? *v : json::array({*v});
  if (list.size() > 64) {
    return absl::InvalidArgumentError(absl::StrCat(fields.where(), ": ", std::string(field), " has ",
                                                   list.size(), " ids; at most 64 are read"));
  }
  for (const json& id : list) {
    const json wrapped = {{std::string(field), id}};
    TP_ASSIGN_OR_RETURN(int64_t i, JsonFields(wrapped, fields.where()).Int(field, 0, INT32_MAX));
    out.push_back(static_cast<int32_t>(i));
  }
  return out;
}

}  // namespace

absl::StatusOr<ModelSpec> ParseModelSpec(std::string_view config_json, std::string_view generation_json,
                                         std::string_view where) {
  const std::string file = absl::StrCat(std::string(where), "/config.json");
  TP_ASSIGN_OR_RETURN(const json root, ParseJson(config_json, file));
  if (!root.is_object()) return absl::InvalidArgumentError(absl::StrCat(file, ": not a JSON object"));
  const JsonFields fields(root, file);

  ModelSpec spec;
  TP_ASSIGN_OR_RETURN(spec.architecture, ReadArchitecture(fields));
  TP_RETURN_IF_ERROR(CheckRules(fields, *spec.architecture));

  auto read = [&](const char* field, int64_t hi, uint32_t& out,
                  std::optional<int64_t> fallback = std::nullopt) -> absl::Status {
    TP_ASSIGN_OR_RETURN(const int64_t v, fields.Int(field, 1, hi, fallback));
    out = static_cast<uint32_t>(v);
    return absl::OkStatus();
  };
  TP_RETURN_IF_ERROR(read("num_hidden_layers", 1024, spec.layers));
  TP_RETURN_IF_ERROR(read("hidden_size", 1 << 20, spec.hidden));
  TP_RETURN_IF_ERROR(read("num_attention_heads", 4096, spec.heads));
  TP_RETURN_IF_ERROR(read("num_key_value_heads", spec.heads, spec.kv_heads, spec.heads));
  TP_RETURN_IF_ERROR(read("intermediate_size", 1 << 22, spec.intermediate));
  TP_RETURN_IF_ERROR(read("vocab_size", 1 << 24, spec.vocab));
  TP_RETURN_IF_ERROR(read("max_position_embeddings", 1 << 24, spec.max_positions));
  if (spec.heads % spec.kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: num_key_value_heads is %d; it must divide num_attention_heads (%d)", file,
                        spec.kv_heads, spec.heads));
  }
  if (fields.Find("head_dim") == nullptr && spec.hidden % spec.heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: without head_dim, num_attention_heads (%d) must divide hidden_size (%d)", file,
                        spec.heads, spec.hidden));
  }
  TP_ASSIGN_OR_RETURN(const int64_t head_dim, fields.Int("head_dim", 2, 1024, spec.hidden / spec.heads));
  spec.head_dim = static_cast<uint32_t>(head_dim);
  // The fallback was not range-checked, and rotation pairs the elements of a head.
  if (spec.head_dim < 2 || spec.head_dim > 1024 || spec.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: head_dim is %d; it must be even and in [2, 1024]", file, spec.head_dim));
  }

  TP_ASSIGN_OR_RETURN(spec.rms_eps,
                      fields.Number("rms_norm_eps", 1e-12, 0.1, spec.architecture->rms_eps_default));
  TP_ASSIGN_OR_RETURN(spec.tie_embeddings,
                      fields.Bool("tie_word_embeddings", spec.architecture->tie_embeddings_default));
  TP_RETURN_IF_ERROR(ReadRope(fields, *spec.architecture, spec));

  TP_ASSIGN_OR_RETURN(const std::vector<int32_t> bos, ReadIds(fields, "bos_token_id"));
  if (!bos.empty()) spec.bos_id = bos[0];
  TP_ASSIGN_OR_RETURN(spec.eos_ids, ReadIds(fields, "eos_token_id"));
  if (!generation_json.empty()) {
    const std::string generation_file = absl::StrCat(std::string(where), "/generation_config.json");
    TP_ASSIGN_OR_RETURN(const json generation, ParseJson(generation_json, generation_file));
    if (!generation.is_object()) {
      return absl::InvalidArgumentError(absl::StrCat(generation_file, ": not a JSON object"));
    }
    TP_ASSIGN_OR_RETURN(std::vector<int32_t> eos,
                        ReadIds(JsonFields(generation, generation_file), "eos_token_id"));
    if (!eos.empty()) spec.eos_ids = std::move(eos);
  }
  return spec;
}

absl::StatusOr<ModelSpec> LoadModelSpec(const std::string& dir) {
  TP_ASSIGN_OR_RETURN(const std::string config, ReadSmallFile(dir + "/config.json", kConfigBytesMax));
  auto generation = ReadSmallFile(dir + "/generation_config.json", kConfigBytesMax);
  if (absl::IsNotFound(generation.status())) generation = std::string();
  TP_RETURN_IF_ERROR(generation.status());
  return ParseModelSpec(config, *generation, dir);
}

BlockLayout LayoutFor(const ModelSpec& spec, uint32_t block_tokens, DType kv_dtype) {
  return BlockLayout{.layers = spec.layers,
                     .kv_heads = spec.kv_heads,
                     .head_dim = spec.head_dim,
                     .block_tokens = block_tokens,
                     .dtype = kv_dtype};
}

}  // namespace tidepool
