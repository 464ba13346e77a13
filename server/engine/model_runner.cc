#include "server/engine/model_runner.h"

#include <algorithm>

namespace tidepool {

CpuModelRunner::CpuModelRunner(std::shared_ptr<const Model> model, const EngineConfig& config,
                               uint32_t block_tokens)
    : model_(std::move(model)),
      layout_(model_->Layout(block_tokens)),
      mode_(config.batch_invariant ? NumericMode::kBatchInvariant : NumericMode::kFast),
      threads_(static_cast<int>(std::max(config.threads, 1u))),
      workspace_(model_->spec, config.max_step_tokens, config.max_batch) {}

absl::Status CpuModelRunner::Forward(const ForwardBatch& batch, float* logits) {
  return model_->transformer.Forward(batch, layout_, mode_, threads_, workspace_, logits);
}

}  // namespace tidepool
