#include "server/worker/calibrate.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "base/status.h"

namespace tidepool {
namespace {

constexpr uint32_t kFirstTokens = 16;
constexpr size_t kBlockAlign = 64;

}  // namespace

absl::StatusOr<std::vector<PrefillObservation>> MeasurePrefills(ModelRunner& runner, uint32_t max_tokens,
                                                                absl::Duration budget, const Clock& clock) {
  std::vector<PrefillObservation> out;
  max_tokens = std::min(max_tokens, runner.max_model_len());
  const absl::Time until = clock.Now() + budget;
  const BlockLayout& layout = runner.layout();
  std::vector<float> logits(runner.vocab());
  double last = 0;
  for (uint32_t tokens = std::min(kFirstTokens, max_tokens); tokens > 0 && tokens <= max_tokens;
       tokens *= 2) {
    // What is known of the last length says whether two more steps fit.
    if (clock.Now() + absl::Seconds(4 * last) > until) break;
    const size_t blocks = (tokens + layout.block_tokens - 1) / layout.block_tokens;
    const size_t bytes = (layout.block_bytes() + kBlockAlign - 1) / kBlockAlign * kBlockAlign;
    const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(kBlockAlign, bytes * blocks),
                                                             &std::free);
    if (!memory) return absl::ResourceExhaustedError("no memory for the KV of a first prefill");
    std::vector<std::byte*> bases;
    for (size_t i = 0; i < blocks; ++i) bases.push_back(static_cast<std::byte*>(memory.get()) + i * bytes);
    std::vector<int32_t> ids(tokens), positions(tokens);
    for (uint32_t i = 0; i < tokens; ++i) {
      ids[i] = static_cast<int32_t>(i * 7919 % runner.vocab());
      positions[i] = static_cast<int32_t>(i);
    }
    const ForwardSequence sequence{.blocks = bases.data(),
                                   .context = static_cast<int32_t>(tokens),
                                   .first_row = 0,
                                   .q_len = static_cast<int32_t>(tokens)};
    const int32_t row = static_cast<int32_t>(tokens) - 1;
    double best = 0;
    for (int i = 0; i < 2; ++i) {
      const absl::Time begin = clock.Now();
      TP_RETURN_IF_ERROR(runner.Forward({.tokens = ids,
                                         .positions = positions,
                                         .sequences = std::span(&sequence, 1),
                                         .logit_rows = std::span(&row, 1)},
                                        logits.data()));
      const double took = absl::ToDoubleSeconds(clock.Now() - begin);
      best = i == 0 ? took : std::min(best, took);
    }
    last = best;
    out.push_back({.new_tokens = tokens, .cached_tokens = 0, .seconds = best});
  }
  return out;
}

}  // namespace tidepool
