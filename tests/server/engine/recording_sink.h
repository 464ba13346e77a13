#pragma once

#include <condition_variable>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "server/engine/preempted_sequence.h"
#include "server/engine/types.h"

namespace tidepool {

// Keeps all that a sequence's sink is told. The test's thread reads it after WaitFinished.
class RecordingSink final : public EngineSink {
 public:
  void OnBlockSealed(uint32_t index, const BlockKey& key, const BlockLease& lease) override {
    std::lock_guard lock(mu_);
    sealed.emplace_back(index, key);
    lease_bases.push_back(lease.data().data());
    order += 'b';
  }
  void OnLastChunk(uint32_t first, std::span<const BlockLease> blocks) override {
    std::lock_guard lock(mu_);
    last_chunk_first = first;
    for (const BlockLease& block : blocks) last_chunk.push_back(block.Clone());
    order += 'c';
  }
  void OnLayersComputed(uint32_t n) override {
    std::lock_guard lock(mu_);
    layers.push_back(n);
    order += 'l';
  }
  void OnPromptLogprobs(std::vector<PromptLogprob> scores) override {
    std::lock_guard lock(mu_);
    std::move(scores.begin(), scores.end(), std::back_inserter(prompt_scores));
    order += 'p';
  }
  void OnToken(OutputToken token) override {
    {
      std::lock_guard lock(mu_);
      tokens.push_back(std::move(token));
      order += 't';
    }
    changed_.notify_all();
  }
  void OnPreempted(std::unique_ptr<PreemptedSequence> sequence) override {
    {
      std::lock_guard lock(mu_);
      preempted = std::move(sequence);
      ++preemptions;
      order += 'v';
    }
    changed_.notify_all();
  }
  void OnFinished(SequenceResult r) override {
    {
      std::lock_guard lock(mu_);
      result = std::move(r);
      ++finished;
      order += 'f';
    }
    changed_.notify_all();
  }

  bool WaitFinished(absl::Duration timeout = absl::Seconds(60)) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [&] { return finished > 0; });
  }
  // Until it has ended, or waits to be resumed.
  bool WaitPaused(absl::Duration timeout = absl::Seconds(60)) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                             [&] { return preempted != nullptr || finished > 0; });
  }
  // Null: it is not waiting to be resumed.
  std::unique_ptr<PreemptedSequence> TakePreempted() {
    std::lock_guard lock(mu_);
    return std::exchange(preempted, nullptr);
  }
  bool WaitTokens(size_t n, absl::Duration timeout = absl::Seconds(60)) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [&] { return tokens.size() >= n; });
  }
  size_t token_count() {
    std::lock_guard lock(mu_);
    return tokens.size();
  }
  std::vector<int32_t> ids() {
    std::lock_guard lock(mu_);
    std::vector<int32_t> out;
    for (const OutputToken& t : tokens) out.push_back(t.id);
    return out;
  }

  std::vector<std::pair<uint32_t, BlockKey>> sealed;
  std::vector<const std::byte*> lease_bases;
  std::vector<OutputToken> tokens;
  std::vector<PromptLogprob> prompt_scores;
  uint32_t last_chunk_first = 0;
  std::vector<BlockLease> last_chunk;
  std::vector<uint32_t> layers;
  SequenceResult result;
  int finished = 0;
  std::unique_ptr<PreemptedSequence> preempted;
  int preemptions = 0;
  std::string order;  // b, c, l, p, t, v, f as they came

 private:
  std::mutex mu_;
  std::condition_variable changed_;
};

}  // namespace tidepool
