#include "server/worker/request_blocks.h"

#include <algorithm>

#include "base/status.h"

namespace tidepool {

RequestBlocks::RequestBlocks(WorkerContext& context, BlockKey root, std::vector<int32_t> prompt)
    : context_(context),
      root_(root),
      prompt_(std::move(prompt)),
      keys_(BlockKeys(root_, prompt_, context.layout.block_tokens)) {}

bool RequestBlocks::TryReserve(uint32_t total_tokens, bool reuse, bool batch_class) {
  const std::span<const BlockKey> reusable_keys(keys_.data(), reuse ? reusable() : 0);
  blocks_ = context_.pool->LeasePrefix(reusable_keys);
  published_ = static_cast<uint32_t>(blocks_.size());
  const size_t total = (total_tokens + block_tokens() - 1) / block_tokens();
  const auto fits = [&] {
    if (!batch_class) return true;
    // One that needs more than three quarters runs once it is alone.
    const BlockPool::Stats now = context_.pool->stats();
    return size_t{now.free} + now.evictable >= total - blocks_.size() + now.slots / 4 ||
           now.leased == blocks_.size();
  };
  absl::StatusOr<std::vector<BlockLease>> rest = absl::ResourceExhaustedError("kept for online requests");
  if (fits()) rest = context_.pool->Reserve(total - blocks_.size());
  if (!rest.ok()) {
    blocks_.clear();
    published_ = 0;
    return false;
  }
  std::move(rest->begin(), rest->end(), std::back_inserter(blocks_));
  valid_.assign(keys_.size() + (has_tail() ? 1 : 0), false);
  std::fill_n(valid_.begin(), published_, true);
  context_.probe->query_tokens.Add(prompt_.size());
  context_.probe->host_hit_tokens.Add(size_t{published_} * block_tokens());
  return true;
}

BlockKey RequestBlocks::TailKey() const {
  const size_t sealed = keys_.size() * block_tokens();
  return ChildKey(keys_.empty() ? root_ : keys_.back(), std::span(prompt_).subspan(sealed));
}

uint32_t RequestBlocks::ready() const {
  return static_cast<uint32_t>(std::find(valid_.begin(), valid_.end(), false) - valid_.begin());
}

bool RequestBlocks::complete() const { return ready() == valid_.size(); }

void RequestBlocks::ForEachHolderRange(
    const google::protobuf::RepeatedPtrField<v1::PrefixHolder>& holders,
    const std::function<void(const PeerAddress&, uint32_t begin, uint32_t end)>& f) const {
  uint32_t next = published_;
  for (const v1::PrefixHolder& holder : holders) {
    const uint32_t begin = std::max(holder.begin(), next);
    const uint32_t end = std::min(holder.end(), reusable());
    if (begin >= end || holder.worker().worker_id() == context_.self.worker_id()) continue;
    f(ToPeerAddress(holder.worker()), begin, end);
    next = end;
  }
}

FetchSpec RequestBlocks::StartFetch(const std::string& attempt_id, uint32_t attempt, const PeerAddress& peer,
                                    uint32_t begin, uint32_t end) {
  FetchSpec spec;
  spec.request_id = attempt_id;
  spec.attempt = attempt;
  spec.part = parts_++;
  spec.peer = peer;
  spec.deadline = context_.clock->Now() + context_.config.transport.fetch_timeout;
  for (uint32_t i = begin; i < end; ++i) {
    spec.keys.push_back(i < keys_.size() ? keys_[i] : TailKey());
    spec.slots.push_back(std::move(blocks_[i]));
  }
  ++pending_;
  return spec;
}

bool RequestBlocks::EndFetch(uint32_t begin, FetchResult result) {
  TP_CHECK(pending_ > 0);
  --pending_;
  bool all = result.status.ok();
  for (size_t i = 0; i < result.slots.size(); ++i) {
    blocks_[begin + i] = std::move(result.slots[i]);
    const bool filled = result.status.ok() && i < result.filled.size() && result.filled[i];
    valid_[begin + i] = filled;
    if (filled) ++fetched_blocks_;
    all = all && filled;
  }
  if (result.status.ok()) {
    fetched_bytes_ += result.bytes;
    context_.AddFetchSample(result.bytes, result.elapsed);
  }
  if (!all) context_.probe->fallback_fetch.Add();
  return all;
}

absl::Status RequestBlocks::Submit(const std::string& attempt_id, const v1::Sampling& sampling,
                                   SequenceGoal goal, std::shared_ptr<EngineSink> sink) {
  SequenceSpec spec;
  spec.blocks = std::move(blocks_);
  blocks_.clear();
  for (BlockLease& block : spec.blocks) {
    if (!block.empty()) continue;
    TP_ASSIGN_OR_RETURN(std::vector<BlockLease> fresh, context_.pool->Reserve(1));
    block = std::move(fresh[0]);
  }
  FromProto(sampling, spec);
  spec.request_id = attempt_id;
  spec.tokens = prompt_;
  spec.published_blocks = published_;
  spec.computed_tokens = goal.first_token ? static_cast<uint32_t>(prompt_.size()) : ready_tokens();
  spec.first_token = std::move(goal.first_token);
  spec.root = root_;
  spec.max_tokens = goal.max_tokens;
  spec.prefill_only = goal.prefill_only;
  spec.prompt_logprobs = goal.prompt_logprobs;
  spec.pooling = goal.pooling;
  spec.normalize = goal.normalize;
  spec.constraint = std::move(goal.constraint);
  spec.batch_class = goal.batch_class;
  spec.priority = goal.priority;
  spec.sink = std::move(sink);
  return context_.engine->Submit(std::move(spec));
}

}  // namespace tidepool
