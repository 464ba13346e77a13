#include "server/model/model.h"

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/fingerprint.h"
#include "server/model/safetensors.h"

namespace tidepool {

std::string ServedModelName(const ModelConfig& config) {
  if (!config.name.empty()) return config.name;
  // lexically_normal turns "a/b/" into "a/b/" with an empty last component.
  const std::filesystem::path path = std::filesystem::path(config.path).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

absl::StatusOr<uint32_t> EffectiveMaxModelLen(const ModelConfig& config, const ModelSpec& spec) {
  if (config.max_model_len == 0) return spec.max_positions;
  if (config.max_model_len > spec.max_positions_scaled) {
    const bool scaled = spec.max_positions_scaled > spec.max_positions;
    return absl::InvalidArgumentError(
        absl::StrCat("model.max_model_len is ", config.max_model_len, "; the model was made for at most ",
                     spec.max_positions_scaled,
                     scaled ? " (max_position_embeddings with the factor of its scaled RoPE)"
                            : " (max_position_embeddings)"));
  }
  return config.max_model_len;
}

absl::Status CheckModel(const ModelConfig& config) {
  auto check = [&]() -> absl::Status {
    TP_ASSIGN_OR_RETURN(const ModelSpec spec, LoadModelSpec(config.path));
    TP_RETURN_IF_ERROR(EffectiveMaxModelLen(config, spec).status());
    TP_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(config.path));
    return CheckTensors(checkpoint, spec);
  };
  return Annotate(check(), absl::StrCat("model ", config.path));
}

namespace {

struct OpenedModel {
  Checkpoint checkpoint;
  ModelDescription description;
};

absl::StatusOr<OpenedModel> OpenModel(const ModelConfig& config, std::string_view tokenizer_digest) {
  TP_ASSIGN_OR_RETURN(ModelSpec spec, LoadModelSpec(config.path));
  TP_ASSIGN_OR_RETURN(const uint32_t max_model_len, EffectiveMaxModelLen(config, spec));
  TP_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(config.path));
  TP_RETURN_IF_ERROR(CheckTensors(checkpoint, spec));
  TP_ASSIGN_OR_RETURN(const DType dtype, ComputeDType(config.dtype, spec, checkpoint));
  std::string fingerprint = ModelFingerprint(spec, tokenizer_digest, dtype, checkpoint, max_model_len);
  return OpenedModel{std::move(checkpoint),
                     {.name = ServedModelName(config),
                      .fingerprint = std::move(fingerprint),
                      .spec = std::move(spec),
                      .kv_dtype = dtype,
                      .max_model_len = max_model_len}};
}

}  // namespace

absl::StatusOr<ModelDescription> DescribeModel(const ModelConfig& config, std::string_view tokenizer_digest) {
  auto opened = OpenModel(config, tokenizer_digest);
  if (!opened.ok()) return Annotate(opened.status(), absl::StrCat("model ", config.path));
  return std::move(opened->description);
}

absl::StatusOr<std::shared_ptr<const Model>> LoadModel(const ModelConfig& config,
                                                       std::string_view tokenizer_digest,
                                                       const LoadProgress& progress) {
  auto load = [&]() -> absl::StatusOr<std::shared_ptr<const Model>> {
    TP_ASSIGN_OR_RETURN(OpenedModel opened, OpenModel(config, tokenizer_digest));
    ModelDescription& known = opened.description;
    TP_ASSIGN_OR_RETURN(Weights weights,
                        LoadWeights(opened.checkpoint, known.spec, known.kv_dtype, progress));
    TP_ASSIGN_OR_RETURN(Transformer transformer,
                        Transformer::Create(known.spec, std::move(weights), known.max_model_len));
    return std::make_shared<const Model>(Model{.name = std::move(known.name),
                                               .fingerprint = std::move(known.fingerprint),
                                               .spec = std::move(known.spec),
                                               .kv_dtype = known.kv_dtype,
                                               .max_model_len = known.max_model_len,
                                               .transformer = std::move(transformer)});
  };
  auto model = load();
  if (!model.ok()) return Annotate(model.status(), absl::StrCat("model ", config.path));
  return model;
}

}  // namespace tidepool
