#include "server/worker/request_blocks.h"

#include <algorithm>
#include <iterator>
#include <span>

#include "absl/cleanup/cleanup.h"
#include "base/status.h"

namespace tidepool {

RequestBlocks::RequestBlocks(WorkerContext& context, BlockKey root, std::vector<int32_t> prompt,
                             BlockOwner owner, bool resumed)
    : context_(context),
      root_(root),
      prompt_(std::move(prompt)),
      keys_(BlockKeys(root_, prompt_, context.layout.block_tokens)),
      owner_(std::move(owner)),
      resumed_(resumed),
      counted_(resumed) {}

bool RequestBlocks::TryReserve(uint32_t total_tokens, bool reuse, bool batch_class) {
  const std::span<const BlockKey> reusable_keys(keys_.data(), reuse ? reusable() : 0);
  const UseOptions use{.tenant = owner_.tenant, .session = owner_.session};
  if (!counted_) {
    blocks_ = context_.pool->LeasePrefix(reusable_keys, use);
    counted_ = true;
  } else {
    // However often it has to try, a request is one use of its prefix, and one turn.
    const size_t match = context_.pool->MatchPrefix(reusable_keys);
    blocks_ = context_.pool->LeaseMany(reusable_keys.first(match), LeaseKind::kSequence);
    // Of what was evicted in between, also all that follows is of no use.
    const auto gap =
        std::find_if(blocks_.begin(), blocks_.end(), [](const BlockLease& b) { return b.empty(); });
    BlockLease::DropAll({std::make_move_iterator(gap), std::make_move_iterator(blocks_.end())});
    blocks_.erase(gap, blocks_.end());
  }
  published_ = static_cast<uint32_t>(blocks_.size());
  const size_t total = (total_tokens + block_tokens() - 1) / block_tokens();
  const size_t wanted = total - blocks_.size();
  const auto fits = [&] {
    if (!batch_class) return true;
    // One that needs more than three quarters runs once it is alone.
    const BlockPool::Stats now = context_.pool->stats();
    return size_t{now.free} + now.evictable >= wanted + now.slots / 4 || now.leased == blocks_.size();
  };
  absl::StatusOr<std::vector<BlockLease>> rest = absl::ResourceExhaustedError("kept for online requests");
  if (fits()) {
    rest = context_.pool->Reserve(total - blocks_.size(), use);
    // What waits to be stored holds slots, too, and can be done without.
    if (!rest.ok() && context_.store != nullptr) context_.store->DropQueued();
  }
  if (!rest.ok()) {
    const BlockPool::Stats now = context_.pool->stats();
    const size_t have = size_t{now.free} + now.evictable;
    const size_t want = wanted + (batch_class ? now.slots / 4 : 0);
    missing_ = want > have ? want - have : 1;
    Drop();
    published_ = 0;
    return false;
  }
  std::move(rest->begin(), rest->end(), std::back_inserter(blocks_));
  valid_.assign(keys_.size() + (has_tail() ? 1 : 0), false);
  std::fill_n(valid_.begin(), published_, true);
  if (context_.store != nullptr) {
    // What was not stored when it was sealed has its next chance.
    for (uint32_t i = 0; i < published_; ++i) context_.store->OfferAgain(keys_[i], blocks_[i]);
  }
  if (resumed_) return true;
  context_.probe->host_query_tokens.Add(prompt_.size());
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

BlockInfo RequestBlocks::InfoOf(uint32_t index) const {
  const auto tokens =
      std::span<const int32_t>(prompt_).subspan(size_t{index} * block_tokens(), block_tokens());
  return {.key = keys_[index],
          .parent = index == 0 ? root_ : keys_[index - 1],
          .tokens = {tokens.begin(), tokens.end()},
          .tenant = owner_.tenant,
          .session = owner_.session,
          .turn = owner_.turn,
          .position = index};
}

std::shared_ptr<BlockLoader> RequestBlocks::MakeLoader(
    const std::string& attempt_id, uint32_t attempt,
    const google::protobuf::RepeatedPtrField<v1::PrefixHolder>& holders) {
  if (published_ >= reusable() || context_.loads == nullptr) return nullptr;
  BlockLoader::Spec spec{.request_id = attempt_id, .attempt = attempt, .prompt_tokens = prompt_.size()};
  for (const v1::PrefixHolder& holder : holders) {
    if (holder.worker().worker_id() == context_.self.worker_id()) continue;
    spec.holders.push_back({.peer = ToPeerAddress(holder.worker()),
                            .begin = holder.begin(),
                            .end = holder.end(),
                            .tier = holder.tier() == v1::KV_TIER_DISK ? Tier::kDisk : Tier::kHost});
  }
  if (!spec.holders.empty())
    context_.probe->peer_query_tokens.Add((reusable() - published_) * block_tokens());
  if (context_.loads->disk != nullptr) {
    context_.probe->disk_query_tokens.Add((reusable() - published_) * block_tokens());
  } else if (spec.holders.empty()) {
    return nullptr;
  }
  for (uint32_t i = published_; i < reusable(); ++i) spec.blocks.push_back(InfoOf(i));
  const auto begin = blocks_.begin() + published_, end = blocks_.begin() + reusable();
  std::vector<BlockLease> slots(std::make_move_iterator(begin), std::make_move_iterator(end));
  std::shared_ptr<BlockLoader> loader = BlockLoader::Make(*context_.loads, std::move(spec), slots);
  if (!loader) std::move(slots.begin(), slots.end(), begin);
  return loader;
}

void RequestBlocks::EndLoad(BlockLoader::Result result) {
  std::move(result.leases.begin(), result.leases.end(), blocks_.begin() + published_);
  std::fill_n(valid_.begin() + published_, result.loaded, true);
  for (const LoadedFrom from : result.from) {
    ++loaded_[static_cast<size_t>(from)];
    context_.probe->loaded_hit_tokens[static_cast<size_t>(from)]->Add(block_tokens());
  }
  // A hit of the disk is a use of its block, as one of the host tier is.
  for (uint32_t i = 0; context_.store != nullptr && i < result.loaded; ++i) {
    if (result.from[i] == LoadedFrom::kDisk)
      context_.store->OfferAgain(keys_[published_ + i], blocks_[published_ + i]);
  }
  published_ += result.loaded;
  if (resumed_) LeaseFollowing();
  fetched_blocks_ += result.fetched;
  fetched_bytes_ += result.bytes;
  if (!result.transport.empty()) transport_ = result.transport;
}

void RequestBlocks::LeaseFollowing() {
  std::vector<BlockLease> there =
      context_.pool->LeaseMany(std::span(keys_).first(reusable()).subspan(published_), LeaseKind::kSequence);
  for (BlockLease& lease : there) {
    if (lease.empty()) break;
    valid_[published_] = true;
    std::swap(blocks_[published_++], lease);
  }
  BlockLease::DropAll(std::move(there));
}

PlannedFetch RequestBlocks::StartFetch(const std::string& attempt_id, uint32_t attempt,
                                       const PeerAddress& peer, uint32_t begin, uint32_t end, bool growing) {
  PlannedFetch fetch{.begin = begin, .peer = peer.worker_id, .growing = growing, .spec = {}};
  FetchSpec& spec = fetch.spec;
  spec.request_id = attempt_id;
  spec.attempt = attempt;
  spec.part = parts_++;
  spec.peer = peer;
  spec.deadline = context_.clock->Now() + context_.config.transport.fetch_timeout;
  // What is still being computed may take as long as the whole prefill.
  if (growing) spec.deadline += context_.config.worker.prefill_timeout;
  spec.keys.reserve(end - begin);
  spec.slots.reserve(end - begin);
  for (uint32_t i = begin; i < end; ++i) {
    spec.keys.push_back(i < keys_.size() ? keys_[i] : TailKey());
    spec.slots.push_back(std::move(blocks_[i]));
  }
  spec.in_place = true;
  if (end > keys_.size())
    spec.tail_tokens = static_cast<uint32_t>(prompt_.size() - keys_.size() * block_tokens());
  ++pending_;
  return fetch;
}

bool RequestBlocks::EndFetch(const PlannedFetch& fetch, FetchResult result) {
  const uint32_t begin = fetch.begin;
  TP_CHECK(pending_ > 0);
  --pending_;
  bool all = result.status.ok();
  // One by one only what is here: it may be thousands that are not.
  const auto in_place = static_cast<uint32_t>(result.in_place.size());
  for (size_t i = in_place; i < result.slots.size(); ++i) {
    blocks_[begin + i] = std::move(result.slots[i]);
    const bool filled = result.status.ok() && i < result.filled.size() && result.filled[i];
    valid_[begin + i] = filled;
    if (filled) ++fetched_blocks_;
    all = all && filled;
  }
  if (in_place > 0) {
    std::fill_n(valid_.begin() + begin, in_place, true);
    fetched_blocks_ += in_place;
    result.slots.resize(in_place);
    in_place_.push_back({{begin, std::move(result.in_place)}, std::move(result.slots)});
  }
  if (result.status.ok()) {
    fetched_bytes_ += result.bytes;
    if (fetched_blocks_ > 0) transport_ = result.transport;
    // One that waited for the computation says nothing of the link, nor do blocks that stay where they are.
    if (!fetch.growing && in_place == 0)
      context_.AddFetchSample({fetch.peer, Tier::kHost}, result.bytes, result.elapsed);
  }
  if (!all) context_.probe->fallback_fetch.Add();
  return all;
}

absl::Status RequestBlocks::TakeBlocks(SequenceSpec& spec) {
  std::sort(in_place_.begin(), in_place_.end(),
            [](const InPlace& a, const InPlace& b) { return a.blocks.begin < b.blocks.begin; });
  const uint32_t usable = spec.computed_tokens / block_tokens();
  std::vector<BlockLease> spare;
  std::vector<size_t> lost;  // quarantined
  size_t at = 0;
  const auto find_lost = [&](size_t end) {
    for (; at < end; ++at) {
      if (blocks_[at].empty()) lost.push_back(at);
    }
  };
  for (InPlace& there : in_place_) {
    const uint32_t begin = there.blocks.begin;
    const auto n = std::min(usable - std::min(usable, begin), static_cast<uint32_t>(there.own.size()));
    // What is computed here is written here: another process's block behind a gap is of no use.
    std::move(there.own.begin() + n, there.own.end(), blocks_.begin() + begin + n);
    there.own.resize(n);
    there.blocks.run.Shorten(n);
    find_lost(begin);
    at += n;
    if (n > 0) spec.in_place.push_back(std::move(there.blocks));
    if (spare.empty()) {
      spare = std::move(there.own);
    } else {
      std::move(there.own.begin(), there.own.end(), std::back_inserter(spare));
    }
  }
  in_place_.clear();
  find_lost(blocks_.size());
  for (const size_t i : lost) {
    // Another one that was set aside for this request: it asks for none, so that a full pool ends nobody
    // whose slot a peer has spoilt. What the answer gets later, the engine sees to.
    if (!spare.empty()) {
      blocks_[i] = std::move(spare.back());
      spare.pop_back();
    } else if (blocks_.size() > valid_.size()) {
      blocks_[i] = std::move(blocks_.back());
      blocks_.pop_back();
    } else {
      TP_ASSIGN_OR_RETURN(std::vector<BlockLease> fresh,
                          context_.pool->Reserve(1, {.tenant = owner_.tenant}));
      blocks_[i] = std::move(fresh[0]);
    }
  }
  spec.blocks = std::exchange(blocks_, {});
  BlockLease::DropAll(std::move(spare));
  return absl::OkStatus();
}

absl::Status RequestBlocks::Submit(const std::string& attempt_id, const v1::Sampling& sampling,
                                   SequenceGoal goal, std::shared_ptr<EngineSink> sink) {
  // Whatever becomes of it, nothing is held here any more.
  const absl::Cleanup drop = [this] { Drop(); };
  SequenceSpec spec;
  spec.computed_tokens = goal.first_token ? static_cast<uint32_t>(prompt_.size()) : ready_tokens();
  TP_RETURN_IF_ERROR(TakeBlocks(spec));
  FromProto(sampling, spec);
  spec.request_id = attempt_id;
  spec.tokens = prompt_;
  spec.published_blocks = published_;
  spec.first_token = std::move(goal.first_token);
  spec.root = root_;
  spec.tenant = owner_.tenant;
  spec.session = owner_.session;
  spec.turn = owner_.turn;
  spec.max_tokens = goal.max_tokens;
  spec.emitted_tokens = goal.emitted_tokens;
  spec.prefill_only = goal.prefill_only;
  spec.stream_layers = goal.stream_layers;
  spec.prompt_logprobs = goal.prompt_logprobs;
  spec.pooling = goal.pooling;
  spec.normalize = goal.normalize;
  spec.constraint = std::move(goal.constraint);
  spec.batch_class = goal.batch_class;
  spec.priority = goal.priority;
  spec.preemptible = goal.preemptible;
  spec.sink = std::move(sink);
  return context_.engine->Submit(std::move(spec));
}

absl::Status RequestBlocks::Resume(std::unique_ptr<PreemptedSequence>& sequence,
                                   uint32_t keep_until_outputs) {
  const absl::Cleanup drop = [this] { Drop(); };
  SequenceSpec spec;
  spec.computed_tokens = ready_tokens();
  TP_RETURN_IF_ERROR(TakeBlocks(spec));
  const uint32_t sealed = sequence->computed() / block_tokens();
  if (sequence->has_tail() && spec.computed_tokens == sealed * block_tokens()) {
    sequence->RestoreTail(spec.blocks[sealed].data());
    // The last token gives the logits of the next: it is computed in any case.
    spec.computed_tokens = std::min(sequence->computed(), static_cast<uint32_t>(prompt_.size()) - 1);
  }
  Engine::ResumeWith with{.blocks = std::move(spec.blocks),
                          .published_blocks = published_,
                          .computed_tokens = spec.computed_tokens,
                          .keep_until_outputs = keep_until_outputs};
  return context_.engine->Resume(std::move(sequence), std::move(with));
}

}  // namespace tidepool
