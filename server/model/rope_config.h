#pragma once

#include <nlohmann/json.hpp>

#include "server/model/config_reader.h"
#include "server/model/model_config.h"

namespace tidepool {

// Reads RoPE in all its spellings into spec.ropes and spec.max_positions_scaled: `rope_theta` with
// `rope_scaling`, or (transformers 5) all in `rope_parameters`; a family with a rotation of its own for
// window layers has ropes[1] for them. Needs spec.{architecture,head_dim,max_positions}. Problems go to the
// reader; spec.ropes then holds what could be read.
void ReadRopes(ConfigReader& config, ModelSpec& spec);

}  // namespace tidepool
