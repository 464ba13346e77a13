// config.json, 0x1E, generation_config.json: what ParseModelSpec accepts lies in the ranges that ModelSpec's
// header states, and its block layout can be computed.
#include <algorithm>
#include <cmath>

#include "server/model/model_config.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

bool OneLine(const absl::Status& status) {
  return !status.message().empty() && status.message().find('\n') == absl::string_view::npos;
}

void CheckLayer(const ModelSpec& spec, const LayerSpec& layer) {
  TP_CHECK(layer.rope < spec.ropes.size());
  TP_CHECK(layer.intermediate >= 1 && layer.intermediate <= 1u << 22);
  TP_CHECK(layer.experts <= 4096);
  if (layer.experts > 0) {
    TP_CHECK(layer.experts_per_token >= 1 && layer.experts_per_token <= std::min(layer.experts, 64u));
  }
}

void CheckRanges(const ModelSpec& spec) {
  TP_CHECK(spec.architecture != nullptr);
  TP_CHECK(spec.layers >= 1 && spec.layers <= 1024);
  TP_CHECK(spec.hidden >= 1 && spec.hidden <= 1u << 20);
  TP_CHECK(spec.heads >= 1 && spec.heads <= 4096);
  TP_CHECK(spec.kv_heads >= 1 && spec.kv_heads <= spec.heads && spec.heads % spec.kv_heads == 0);
  TP_CHECK(spec.head_dim >= 2 && spec.head_dim <= 1024 && spec.head_dim % 2 == 0);
  TP_CHECK(spec.intermediate >= 1 && spec.intermediate <= 1u << 22);
  TP_CHECK(spec.vocab >= 1 && spec.vocab <= 1u << 24);
  TP_CHECK(spec.max_positions >= 1 && spec.max_positions <= 1u << 24);
  TP_CHECK(spec.max_positions_scaled >= spec.max_positions && spec.max_positions_scaled <= 1u << 24);
  TP_CHECK(spec.rms_eps > 0 && spec.rms_eps < 1);
  TP_CHECK(std::isfinite(spec.attention_scale) && spec.attention_scale > 0);
  TP_CHECK(std::isfinite(spec.attention_softcap) && spec.attention_softcap >= 0);
  TP_CHECK(std::isfinite(spec.final_softcap) && spec.final_softcap >= 0);
  TP_CHECK(spec.ropes.size() == 1 || spec.ropes.size() == 2);
  for (const RopeSpec& rope : spec.ropes) {
    for (const uint32_t positions : {1u, spec.max_positions, spec.max_positions_scaled}) {
      const std::vector<float> frequencies = RopeFrequencies(rope, positions);
      TP_CHECK(frequencies.size() == rope.rotary_dim / 2);
      for (const float f : frequencies) TP_CHECK(std::isfinite(f));
    }
  }
  TP_CHECK(spec.layer_specs.size() == spec.layers);
  for (const LayerSpec& layer : spec.layer_specs) CheckLayer(spec, layer);
  TP_CHECK(spec.bos_id >= -1);
  for (const int32_t id : spec.eos_ids) TP_CHECK(id >= 0);
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(config_json) {
  const auto parts = fuzz::Split(input, 2);
  const auto spec = ParseModelSpec(parts[0], parts[1], "model");
  const auto problems = ModelSpecProblems(parts[0], parts[1], "model");
  TP_CHECK(problems.empty() == spec.ok());
  for (const absl::Status& problem : problems) TP_CHECK(OneLine(problem));
  if (!spec.ok()) {
    TP_CHECK(OneLine(spec.status()));
    return;
  }
  CheckRanges(*spec);
  for (const DType dtype : {DType::kBF16, DType::kF32})
    TP_CHECK(LayoutFor(*spec, 32, dtype).block_bytes() > 0);
}

}  // namespace tidepool
