#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/block_layout.h"
#include "config/config.h"
#include "server/model/model.h"
#include "server/model/transformer.h"

namespace tidepool {

// ModelRunner: what computes a step for the engine. One thread at a time. The CPU's is below; tests have
// doubles.
class ModelRunner {
 public:
  virtual ~ModelRunner() = default;
  virtual const BlockLayout& layout() const = 0;
  virtual uint32_t vocab() const = 0;
  virtual uint32_t hidden() const = 0;  // elements of a hidden state
  virtual uint32_t max_model_len() const = 0;
  // See Transformer::Forward. Batches stay within the limits that the runner was made for.
  virtual absl::Status Forward(const ForwardBatch& batch, float* logits) = 0;
};

// CpuModelRunner: a loaded model with its threads and workspace.
class CpuModelRunner final : public ModelRunner {
 public:
  // Steps of at most config.max_step_tokens tokens and config.max_batch sequences, on config.threads
  // threads (0 counts as 1: the caller knows how many workers share the machine).
  CpuModelRunner(std::shared_ptr<const Model> model, const EngineConfig& config, uint32_t block_tokens);

  const BlockLayout& layout() const override { return layout_; }
  uint32_t vocab() const override { return model_->spec.vocab; }
  uint32_t hidden() const override { return model_->spec.hidden; }
  uint32_t max_model_len() const override { return model_->max_model_len; }
  absl::Status Forward(const ForwardBatch& batch, float* logits) override;

 private:
  const std::shared_ptr<const Model> model_;
  const BlockLayout layout_;
  const NumericMode mode_;
  ThreadPool threads_;
  Workspace workspace_;
};

}  // namespace tidepool
