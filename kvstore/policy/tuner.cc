#include "kvstore/policy/tuner.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/rng.h"
#include "base/status.h"
#include "kvstore/policy/policy.h"
#include "kvstore/pool_core.h"

namespace tidepool {

PolicyTuner::PolicyTuner(const Options& options) : options_(options), policy_(options.policy) {
  TP_CHECK(options.slots > 0 && options.ghost_slots > 0 && options.window > 0);
  const uint32_t slots = std::min(options.slots, options.ghost_slots);
  const double share = static_cast<double>(slots) / options.slots;
  threshold_ =
      share >= 1 ? std::numeric_limits<uint64_t>::max() : static_cast<uint64_t>(std::ldexp(share, 64));
  for (const std::string_view name : PolicyNames()) {
    absl::StatusOr<std::unique_ptr<EvictionPolicy>> policy =
        CreatePolicy({.name = std::string(name), .capacity = slots});
    TP_CHECK(policy.ok());  // its own names
    ghosts_.push_back({std::string(name), std::make_unique<PoolCore>(PoolCore::Options{
                                              .slots = slots, .policy = std::move(*policy)})});
  }
}

PolicyTuner::~PolicyTuner() = default;

bool PolicyTuner::Sampled(const BlockKey& key) const {
  uint64_t v;
  std::memcpy(&v, key.bytes.data(), sizeof v);
  return Mix64(v) <= threshold_;
}

std::optional<std::string> PolicyTuner::OnRequest(std::span<const BlockKey> keys, uint64_t session) {
  sample_.clear();
  for (const BlockKey& key : keys) {
    if (Sampled(key)) sample_.push_back(key);
  }
  lookups_ += sample_.size();
  const UseOptions use{.session = session};
  for (Ghost& ghost : ghosts_) {
    // Also where nothing was sampled: requests are what the ghosts count time by.
    PoolCore& core = *ghost.core;
    refs_.clear();
    core.LeasePrefix(sample_, use, refs_);
    ghost.hits += refs_.size();
    std::vector<PoolCore::Taken> taken;
    const size_t room = core.slots() - refs_.size();
    if (!core.Reserve(std::min(sample_.size() - refs_.size(), room), use, absl::UnixEpoch(), taken)) continue;
    for (const PoolCore::Taken& t : taken) {
      const size_t i = refs_.size();
      BlockInfo info{.key = sample_[i], .position = static_cast<uint32_t>(i)};
      if (i > 0) info.parent = sample_[i - 1];
      // A block behind a gap may be there still: then its slot is given back, and the lease is on the old
      // one.
      const PoolCore::Published published = core.Publish(t.ref, LeaseKind::kSequence, std::move(info));
      if (published.duplicate) core.DropLeases(std::span(&t.ref, 1), LeaseKind::kSequence);
      refs_.push_back(published.ref);
    }
    core.DropLeases(refs_, LeaseKind::kSequence);
    core.events().clear();
  }
  if (lookups_ < options_.window) return std::nullopt;
  return Compare();
}

std::optional<std::string> PolicyTuner::Compare() {
  scores_.clear();
  double present = 0;
  for (Ghost& ghost : ghosts_) {
    scores_.push_back({ghost.policy, static_cast<double>(ghost.hits) / static_cast<double>(lookups_)});
    if (ghost.policy == policy_) present = scores_.back().hit_rate;
    ghost.hits = 0;
  }
  lookups_ = 0;
  const auto best = std::max_element(scores_.begin(), scores_.end(),
                                     [](const Score& a, const Score& b) { return a.hit_rate < b.hit_rate; });
  if (best->hit_rate < present + options_.margin) {
    ahead_.clear();
    return std::nullopt;
  }
  if (best->policy != ahead_) {
    ahead_ = best->policy;
    return std::nullopt;
  }
  ahead_.clear();
  policy_ = best->policy;
  return policy_;
}

}  // namespace tidepool
