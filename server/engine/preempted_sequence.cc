#include "server/engine/preempted_sequence.h"

#include <chrono>
#include <cstring>
#include <utility>

#include "base/status.h"
#include "server/engine/sequence.h"

namespace tidepool {
namespace {

// How fast the mean follows what is measured.
constexpr double kGain = 0.2;

}  // namespace

void CopySpeed::Observe(size_t bytes, double seconds) {
  if (seconds <= 0) return;
  const double before = bytes_per_second(), seen = static_cast<double>(bytes) / seconds;
  // Of two at once one may be lost, which does no harm.
  value_.store(before + kGain * (seen - before), std::memory_order_relaxed);
}

PreemptedSequence::PreemptedSequence(std::unique_ptr<Sequence> sequence, Kept kept,
                                     std::shared_ptr<CopySpeed> speed, Counter& copied_bytes)
    : sequence_(std::move(sequence)),
      kept_(std::move(kept)),
      speed_(std::move(speed)),
      copied_bytes_(copied_bytes) {}

PreemptedSequence::~PreemptedSequence() = default;

const std::vector<int32_t>& PreemptedSequence::tokens() const { return sequence_->tokens(); }
uint32_t PreemptedSequence::outputs() const { return sequence_->outputs(); }
uint32_t PreemptedSequence::computed() const { return sequence_->computed(); }

void PreemptedSequence::SaveTail() {
  if (kept_.tail.empty()) return;
  const std::span<const std::byte> block = kept_.tail.data();
  tail_.resize(block.size());  // its pages are there before the clock starts
  const auto begin = std::chrono::steady_clock::now();
  std::memcpy(tail_.data(), block.data(), block.size());
  speed_->Observe(block.size(),
                  std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  copied_bytes_.Add(block.size());
  kept_.tail = {};
}

void PreemptedSequence::RestoreTail(std::span<std::byte> block) const {
  TP_CHECK(has_tail() && block.size() == tail_.size());
  std::memcpy(block.data(), tail_.data(), tail_.size());
  copied_bytes_.Add(tail_.size());
}

}  // namespace tidepool
