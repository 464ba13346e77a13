#include "server/worker/block_loader.h"

#include <algorithm>

#include "base/log.h"
#include "base/status.h"

namespace tidepool {
namespace {

// One block a read; the depth keeps a drive busy, and what is given up is soon over.
constexpr uint32_t kDiskReads = 16;
constexpr uint32_t kPeerParts = 2;
constexpr uint32_t kPeerPartBlocks = 256;

Counter& Blocks(MetricRegistry& metrics, std::string_view from, const char* what) {
  return metrics.AddCounter("tidepool_worker_load_blocks_total",
                            "KV blocks that were to be loaded, and that were.",
                            {{"source", std::string(from)}, {"what", what}});
}

Counter& Stopped(MetricRegistry& metrics, const char* reason) {
  return metrics.AddCounter("tidepool_worker_loads_stopped_total",
                            "Loads of a prefix that were not begun or not waited for, and computed instead.",
                            {{"reason", reason}});
}

}  // namespace

LoaderProbe::LoaderProbe(MetricRegistry& metrics)
    : stopped_slow(Stopped(metrics, "slow")),
      stopped_missing(Stopped(metrics, "missing")),
      declined(Stopped(metrics, "declined")),
      late_blocks(metrics.AddCounter("tidepool_worker_load_late_blocks_total",
                                     "KV blocks that arrived after their load had been given up; kept.")),
      seconds(metrics.AddHistogram("tidepool_worker_load_seconds", "Time of loading a prefix.",
                                   LatencyBuckets())) {
  for (size_t i = 0; i < kLoadedFrom; ++i) {
    blocks[i] = &Blocks(metrics, kLoadedFromNames[i], "loaded");
    planned[i] = &Blocks(metrics, kLoadedFromNames[i], "planned");
  }
}

std::vector<LoadSource> BlockLoader::FindSources(const Environment& env, const Spec& spec,
                                                 std::vector<Source>& out) {
  const uint32_t begin = spec.blocks.front().position,
                 end = begin + static_cast<uint32_t>(spec.blocks.size());
  const absl::Time now = env.clock->Now();
  const auto block_bytes = static_cast<double>(env.pool->layout().block_bytes());
  std::vector<LoadSource> sources;
  const auto add = [&](Source source, std::vector<BlockRange> has, uint32_t part_blocks, uint32_t parts) {
    const SourceSpeeds::Speed speed = env.speeds->Of(source.id, now);
    sources.push_back({.latency_seconds = speed.latency_seconds,
                       .queued_seconds = speed.queued_seconds,
                       .seconds_per_block = speed.seconds_per_byte * block_bytes,
                       .has = std::move(has),
                       .max_part_blocks = part_blocks,
                       .max_parts = parts});
    out.push_back(std::move(source));
  };
  if (env.disk != nullptr) {
    std::vector<BlockRange> has;
    for (uint32_t i = begin; i < end; ++i) {
      if (!env.disk->Contains(spec.blocks[i - begin].key)) continue;
      if (has.empty() || has.back().end != i) has.push_back({i, i});
      ++has.back().end;
    }
    if (!has.empty()) {
      add({.id = {"", Tier::kDisk}, .peer = {}, .kind = LoadedFrom::kDisk}, std::move(has), 1, kDiskReads);
    }
  }
  for (const Holder& holder : spec.holders) {
    const BlockRange has{std::max(holder.begin, begin), std::min(holder.end, end)};
    if (has.begin >= has.end) continue;
    const bool disk = holder.tier == Tier::kDisk;
    add({.id = {holder.peer.worker_id, disk ? Tier::kDisk : Tier::kHost},
         .peer = holder.peer,
         .kind = disk ? LoadedFrom::kPeerDisk : LoadedFrom::kPeer},
        {has}, kPeerPartBlocks, kPeerParts);
  }
  return sources;
}

std::shared_ptr<BlockLoader> BlockLoader::Make(const Environment& env, Spec spec,
                                               std::vector<BlockLease>& slots) {
  TP_CHECK(slots.size() == spec.blocks.size());
  if (spec.blocks.empty()) return nullptr;
  std::vector<Source> found;
  std::vector<LoadSource> sources = FindSources(env, spec, found);
  if (sources.empty()) return nullptr;
  const LoadSpan span{.begin = spec.blocks.front().position,
                      .end = spec.blocks.front().position + static_cast<uint32_t>(spec.blocks.size()),
                      .block_tokens = env.pool->layout().block_tokens,
                      .prompt_tokens = spec.prompt_tokens};
  SpanLoad load(env.options, span, std::move(sources), env.prefill, env.clock->Now());
  if (load.plan().sources.empty()) {
    env.probe->declined.Add();
    return nullptr;
  }
  return std::shared_ptr<BlockLoader>(
      new BlockLoader(env, std::move(spec), std::move(found), std::move(load), std::move(slots)));
}

BlockLoader::BlockLoader(const Environment& env, Spec spec, std::vector<Source> sources, SpanLoad load,
                         std::vector<BlockLease> slots)
    : env_(env),
      spec_(std::move(spec)),
      sources_(std::move(sources)),
      load_(std::move(load)),
      slots_(std::move(slots)),
      begun_(env.clock->Now()) {
  for (const uint32_t s : load_.plan().sources)
    env_.probe->planned[static_cast<size_t>(sources_[s].kind)]->Add();
}

void BlockLoader::Start(std::function<void(Result)> done) {
  Actions actions;
  {
    std::lock_guard lock(mu_);
    if (over_) return;
    done_ = std::move(done);
    Step(actions);
  }
  Run(std::move(actions));
}

void BlockLoader::Run(Actions actions) {
  for (const auto& call : actions.calls) call();
  if (actions.result) actions.done(*std::move(actions.result));
}

void BlockLoader::Step(Actions& actions) {
  if (over_) return;
  const absl::Time now = env_.clock->Now();
  Abandon(load_.Check(now), actions);
  for (SpanLoad::Part& part : load_.Next(now)) Ask(std::move(part), actions);
  Finish(actions);
  if (!over_) ArmDeadline();
}

void BlockLoader::Ask(SpanLoad::Part what, Actions& actions) {
  Source& source = sources_[what.source];
  const absl::Time now = env_.clock->Now();
  source.first_asked = std::min(source.first_asked, now);
  const uint32_t id = what.id;
  std::vector<BlockLease> slots;
  for (const uint32_t block : what.blocks) slots.push_back(std::move(slots_[block - Begin()]));
  const uint64_t bytes = slots.size() * env_.pool->layout().block_bytes();
  Part& part = parts_[id];
  part.ticket = env_.speeds->Begin(source.id, bytes, now);
  part.what = std::move(what);

  if (source.peer) {
    auto spec = std::make_shared<FetchSpec>();
    spec->request_id = spec_.request_id;
    spec->attempt = spec_.attempt;
    spec->part = id;
    spec->peer = *source.peer;
    spec->deadline = now + env_.timeout;
    for (const uint32_t block : part.what.blocks) spec->keys.push_back(spec_.blocks[block - Begin()].key);
    spec->slots = std::move(slots);
    // Copied also from a process of this host: who computes on a prefix holds it from then on, and publishes
    // it.
    actions.calls.push_back([self = shared_from_this(), spec, id] {
      if (!self->Wanted(id)) {
        std::vector<bool> none(spec->slots.size(), false);
        return self->OnAnswer(id, std::move(spec->slots), std::move(none), 0);
      }
      self->env_.fetch(std::move(*spec), [self, id](FetchResult result) {
        if (!result.status.ok()) {
          spdlog::debug("{}: part {} of a load: {}", self->spec_.request_id, id, result.status.ToString());
          result.filled.assign(result.slots.size(), false);
        }
        if (result.bytes > 0) {
          std::lock_guard lock(self->mu_);
          self->transport_ = result.transport;
        }
        self->OnAnswer(id, std::move(result.slots), std::move(result.filled), result.bytes);
      });
      // Given up meanwhile: an abort that came before the fetch did not end it.
      bool abort = false;
      {
        std::lock_guard lock(self->mu_);
        const auto it = self->parts_.find(id);
        abort = it != self->parts_.end() && (self->over_ || (it->second.abandoned && !self->WantsPeers()));
      }
      if (abort) self->env_.abort(self->spec_.request_id, self->spec_.attempt);
    });
    return;
  }
  const BlockInfo* info = &spec_.blocks[part.what.blocks[0] - Begin()];
  auto slot = std::make_shared<BlockLease>(std::move(slots[0]));
  actions.calls.push_back([self = shared_from_this(), info, slot, id, bytes] {
    if (!self->Wanted(id)) {
      std::vector<BlockLease> back;
      back.push_back(std::move(*slot));
      return self->OnAnswer(id, std::move(back), {false}, 0);
    }
    const BlockTier::ReadId read =
        self->env_.disk->Read(info->key, info->tokens, slot->data(), self->env_.timeout,
                              [self, slot, id, bytes](absl::StatusOr<BlockTier::Record> record) {
                                // A record of another size is of another layout: a miss.
                                const bool filled = record.ok() && record->bytes == bytes;
                                std::vector<BlockLease> back;
                                back.push_back(std::move(*slot));
                                self->OnAnswer(id, std::move(back), {filled}, filled ? bytes : 0);
                              });
    bool cancel = false;
    {
      std::lock_guard lock(self->mu_);
      const auto it = self->parts_.find(id);
      if (it == self->parts_.end()) return;  // answered
      it->second.read = read;
      cancel = it->second.abandoned || self->over_;
    }
    if (cancel) self->env_.disk->CancelRead(read);
  });
}

bool BlockLoader::Wanted(uint32_t id) {
  std::lock_guard lock(mu_);
  return !over_ && !parts_.at(id).abandoned;
}

bool BlockLoader::WantsPeers() const {
  return std::any_of(parts_.begin(), parts_.end(), [&](const auto& p) {
    return !p.second.abandoned && sources_[p.second.what.source].peer.has_value();
  });
}

void BlockLoader::AbortUnwanted(Actions& actions) {
  if (WantsPeers()) return;
  bool peers = false;
  for (auto& [id, part] : parts_) {
    if (sources_[part.what.source].peer && !std::exchange(part.aborted, true)) peers = true;
  }
  if (!peers) return;
  actions.calls.push_back(
      [self = shared_from_this()] { self->env_.abort(self->spec_.request_id, self->spec_.attempt); });
}

void BlockLoader::Abandon(const SpanLoad::Abandoned& given_up, Actions& actions) {
  slow_ = slow_ || given_up.why == SpanLoad::Stop::kComputeIsFaster;
  for (const SpanLoad::Part& p : given_up.parts) {
    const auto it = parts_.find(p.id);
    if (it == parts_.end()) continue;
    Part& part = it->second;
    part.abandoned = true;
    if (part.read) {
      actions.calls.push_back(
          [self = shared_from_this(), read = *part.read] { self->env_.disk->CancelRead(read); });
    }
  }
  AbortUnwanted(actions);
  if (given_up.why == SpanLoad::Stop::kNot) return;
  // After the calls above, as most slots come back with them.
  actions.calls.push_back([self = shared_from_this()] {
    Actions more;
    {
      std::lock_guard lock(self->mu_);
      for (auto& [id, part] : self->parts_) {
        if (!part.abandoned || part.replaced || self->over_) continue;
        auto fresh =
            self->env_.pool->Reserve(part.what.blocks.size(), {.tenant = self->spec_.blocks[0].tenant});
        if (!fresh.ok()) continue;  // no room: its own slots are waited for
        for (size_t i = 0; i < part.what.blocks.size(); ++i) {
          self->slots_[part.what.blocks[i] - self->Begin()] = std::move((*fresh)[i]);
        }
        part.replaced = true;
      }
      self->Finish(more);
    }
    self->Run(std::move(more));
  });
}

void BlockLoader::OnAnswer(uint32_t id, std::vector<BlockLease> slots, std::vector<bool> filled,
                           uint64_t bytes) {
  const absl::Time now = env_.clock->Now();
  Actions actions;
  SpanLoad::Part late;
  {
    std::lock_guard lock(mu_);
    const auto it = parts_.find(id);
    if (it == parts_.end()) return;
    Part part = std::move(it->second);
    parts_.erase(it);
    const auto arrived = static_cast<uint64_t>(std::count(filled.begin(), filled.end(), true));
    if (arrived > 0) {
      env_.speeds->End(part.ticket, arrived * env_.pool->layout().block_bytes(), now);
    } else {
      env_.speeds->GiveUp(part.ticket, now);
    }
    if (over_ || part.replaced) {
      late = std::move(part.what);
    } else {
      Source& source = sources_[part.what.source];
      for (size_t i = 0; i < part.what.blocks.size() && i < slots.size(); ++i) {
        slots_[part.what.blocks[i] - Begin()] = std::move(slots[i]);
      }
      if (!part.abandoned) {
        source.bytes += bytes;
        source.last_arrived = now;
        load_.Arrived(id, filled, now);
      }
      Step(actions);
    }
  }
  if (!late.blocks.empty()) PublishLate(late, std::move(slots), filled);
  Run(std::move(actions));
}

void BlockLoader::PublishLate(const SpanLoad::Part& part, std::vector<BlockLease> slots,
                              const std::vector<bool>& filled) {
  for (size_t i = 0; i < part.blocks.size() && i < slots.size() && i < filled.size(); ++i) {
    if (!filled[i] || slots[i].empty()) continue;
    // The next request of this prefix finds it; dropping the lease leaves it to the eviction policy.
    if (env_.pool->PublishLoaded(slots[i], spec_.blocks[part.blocks[i] - Begin()]))
      env_.probe->late_blocks.Add();
  }
}

void BlockLoader::Finish(Actions& actions) {
  if (over_ || !done_ || !load_.done()) return;
  for (const auto& [id, part] : parts_) {
    if (!part.replaced) return;  // given up, and its slots are needed
  }
  over_ = true;
  Result result;
  result.leases = std::move(slots_);
  result.loaded = load_.arrived() - Begin();
  if (result.loaded < load_.plan().sources.size())
    (slow_ ? env_.probe->stopped_slow : env_.probe->stopped_missing).Add();
  for (uint32_t i = 0; i < result.loaded; ++i) {
    const Source& source = sources_[load_.plan().sources[i]];
    result.from.push_back(source.kind);
    env_.probe->blocks[static_cast<size_t>(source.kind)]->Add();
    if (source.peer) ++result.fetched;
    // One that was cleared meanwhile serves this request, and nobody else.
    env_.pool->PublishLoaded(result.leases[i], spec_.blocks[i]);
  }
  if (result.fetched > 0) result.transport = transport_;
  for (const Source& source : sources_) {
    result.bytes += source.peer ? source.bytes : 0;
    if (source.bytes > 0 && env_.sample)
      env_.sample(source.id, source.bytes, source.last_arrived - source.first_asked);
  }
  env_.probe->seconds.Observe(absl::ToDoubleSeconds(env_.clock->Now() - begun_));
  actions.result = std::move(result);
  actions.done = std::exchange(done_, nullptr);
}

void BlockLoader::ArmDeadline() {
  const absl::Time at = load_.deadline();
  // A call that comes early looks again.
  if (at == absl::InfiniteFuture() || (deadline_ && at >= deadline_at_)) return;
  if (deadline_ && !env_.deadlines->Cancel(*deadline_)) return;  // it is being called: it looks again now
  deadline_at_ = at;
  deadline_ = env_.deadlines->At(at, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->OnDeadline();
  });
}

void BlockLoader::OnDeadline() {
  Actions actions;
  {
    std::lock_guard lock(mu_);
    deadline_.reset();
    Step(actions);
  }
  Run(std::move(actions));
}

void BlockLoader::Cancel() {
  std::vector<BlockTier::ReadId> reads;
  bool peers = false;
  std::vector<BlockLease> slots;  // these, and who waits, go without the lock
  std::function<void(Result)> done;
  {
    std::lock_guard lock(mu_);
    if (over_) return;
    over_ = true;
    done.swap(done_);
    slots.swap(slots_);
    for (const auto& [id, part] : parts_) {
      if (sources_[part.what.source].peer) peers = true;
      if (part.read) reads.push_back(*part.read);
    }
  }
  for (const BlockTier::ReadId read : reads) env_.disk->CancelRead(read);
  if (peers) env_.abort(spec_.request_id, spec_.attempt);
}

}  // namespace tidepool
