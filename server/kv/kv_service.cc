#include "server/kv/kv_service.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status.h"
#include "server/kv/event_subscription.h"
#include "server/rpc/kv_convert.h"

namespace tidepool {
namespace {

constexpr double kPinSecondsMax = 86400;
// A quiet operation says so this often.
constexpr absl::Duration kProgressInterval = absl::Milliseconds(200);
constexpr absl::Duration kLook = absl::Milliseconds(20);
// A disk that has not erased by then is not well; the call does not wait for it.
constexpr absl::Duration kEraseTimeout = absl::Seconds(60);

v1::KvProgress ToProto(const MoveTally& tally, absl::Duration elapsed, bool finished) {
  v1::KvProgress out;
  out.set_total(tally.total);
  out.set_done(tally.done);
  out.set_skipped(tally.skipped);
  out.set_bytes(tally.bytes);
  out.set_seconds(absl::ToDoubleSeconds(elapsed));
  out.set_finished(finished);
  out.set_note(tally.note);
  return out;
}

v1::TierLoad HostLoad(const BlockPool::Stats& stats, uint64_t block_bytes) {
  v1::TierLoad out;
  out.set_tier(v1::KV_TIER_HOST);
  out.set_blocks(stats.published);
  out.set_bytes_used((stats.slots - stats.free) * block_bytes);
  out.set_bytes_total(stats.slots * block_bytes);
  out.set_healthy(true);
  return out;
}

v1::TierLoad DiskLoad(const TierStats& stats) {
  v1::TierLoad out;
  out.set_tier(v1::KV_TIER_DISK);
  out.set_blocks(stats.blocks);
  out.set_bytes_used(stats.bytes);
  out.set_bytes_total(stats.capacity_bytes);
  out.set_healthy(stats.health.state == TierState::kOn);
  return out;
}

absl::StatusOr<PinKind> ToPinKind(v1::KvPinKind kind) {
  switch (kind) {
    case v1::KV_PIN_KIND_UNSPECIFIED:
    case v1::KV_PIN_KIND_SOFT:
      return PinKind::kSoft;
    case v1::KV_PIN_KIND_HARD:
      return PinKind::kHard;
    default:
      return absl::InvalidArgumentError("kind: " + std::to_string(static_cast<int>(kind)) +
                                        " is no pin; soft (1) and hard (2) are");
  }
}

}  // namespace

KvService::KvService(const KvContext& context, MetricRegistry& metrics)
    : context_(context),
      mover_(context, metrics),
      calls_failed_(metrics.AddCounter("tidepool_kv_calls_failed_total",
                                       "Calls of the pool's control API that were refused or failed.")),
      subscribers_gauge_(metrics.AddGauge("tidepool_kv_event_subscribers", "Consumers of block events.")) {}

KvService::~KvService() { Stop(); }

void KvService::Stop() {
  std::set<std::shared_ptr<EventSubscription>> subscriptions;
  {
    std::lock_guard lock(mu_);
    stopping_ = true;
    subscriptions = subscriptions_;
  }
  for (const auto& subscription : subscriptions) subscription->Stop();
  mover_.Stop();
  peer_calls_.Stop();
  local_calls_.Stop();
  compress_calls_.Stop();
}

template <typename Body>
grpc::ServerUnaryReactor* KvService::Answer(grpc::CallbackServerContext* rpc, const Body& body) {
  auto* reactor = rpc->DefaultReactor();
  absl::Status status = CheckClusterToken(*rpc, context_.cluster_token);
  if (status.ok()) status = body();
  if (!status.ok()) calls_failed_.Add();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

KvService::Progress* KvService::Refuse(const absl::Status& why) {
  calls_failed_.Add();
  return local_calls_.Refuse<v1::KvProgress>(ToGrpc(why));
}

KvService::Progress* KvService::Run(LongCalls& calls, const char* name, uint64_t bytes_per_second,
                                    Work work) {
  return calls.Start<v1::KvProgress>([this, name, bytes_per_second, work = std::move(work)](
                                         const LongCalls::Handle<v1::KvProgress>& handle) {
    const absl::Time began = context_.clock->Now();
    absl::Time said = began;
    MoveTally tally;
    MoveControl control;
    control.cancelled = handle.cancelled;
    control.bytes_per_second = bytes_per_second;
    control.progress = [&](const MoveTally& now_at) {
      const absl::Time now = context_.clock->Now();
      if (now - said < kProgressInterval) return;
      said = now;
      handle.report(ToProto(now_at, now - began, false));
    };
    const absl::Status status = work(control, tally);
    handle.report(ToProto(tally, context_.clock->Now() - began, status.ok()));
    if (!status.ok()) calls_failed_.Add();
    spdlog::info("kv {}: {} of {} blocks, {} skipped{}{}", name, tally.done, tally.total, tally.skipped,
                 status.ok() ? "" : ": ", status.ok() ? "" : std::string(status.message()));
    return ToGrpc(status);
  });
}

grpc::ServerUnaryReactor* KvService::Lookup(grpc::CallbackServerContext* rpc,
                                            const v1::KvLookupRequest* request, v1::KvLookupReply* reply) {
  return Answer(rpc, [&]() -> absl::Status {
    TP_ASSIGN_OR_RETURN(const KvSelection selected,
                        ParseSelector(context_, request->blocks(), KvSelectorKinds::kChain));
    reply->set_block_tokens(context_.layout.block_tokens);
    if (!selected.keys) return absl::OkStatus();
    const auto& keys = *selected.keys;
    const auto host = static_cast<uint32_t>(context_.pool->MatchPrefix(keys));
    uint32_t blocks = host;
    const std::vector<bool> in_host = context_.pool->Contains(keys);
    while (blocks < keys.size() &&
           (in_host[blocks] || (context_.disk != nullptr && context_.disk->Contains(keys[blocks]))))
      ++blocks;
    reply->set_chain_blocks(static_cast<uint32_t>(keys.size()));
    reply->set_blocks(blocks);
    reply->set_host_blocks(host);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KvService::Where(grpc::CallbackServerContext* rpc,
                                           const v1::KvWhereRequest* request, v1::KvWhereReply* reply) {
  return Answer(rpc, [&]() -> absl::Status {
    TP_ASSIGN_OR_RETURN(const KvSelection selected,
                        ParseSelector(context_, request->blocks(), KvSelectorKinds::kAny));
    const KvListing listing = ListKeys(context_, selected, kKvWhereMax);
    reply->set_selected(listing.selected);
    for (const BlockKey& key : listing.keys) {
      v1::KvBlock* block = reply->add_blocks();
      block->set_key(std::string(KeyBytes(key)));
      auto info = context_.pool->Info(key);
      const auto entry = context_.disk == nullptr ? std::nullopt : context_.disk->Find(key);
      if (info) block->add_tiers(v1::KV_TIER_HOST);
      if (entry) block->add_tiers(v1::KV_TIER_DISK);
      if (!info && !entry) continue;
      if (!info) {
        info = BlockInfo{.key = key,
                         .parent = entry->parent,
                         .tenant = entry->tenant,
                         .session = entry->session,
                         .turn = entry->turn,
                         .position = entry->position};
      }
      if (info->parent) block->set_parent(std::string(KeyBytes(*info->parent)));
      block->set_position(info->position);
      block->set_tenant(info->tenant);
      block->set_session(info->session);
      block->set_turn(info->turn);
      block->set_compute_seconds(info->compute_seconds);
      if (request->with_tokens()) block->mutable_tokens()->Add(info->tokens.begin(), info->tokens.end());
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KvService::Pin(grpc::CallbackServerContext* rpc, const v1::KvPinRequest* request,
                                         v1::KvPinReply* reply) {
  return Answer(rpc, [&]() -> absl::Status {
    TP_ASSIGN_OR_RETURN(const KvSelection selected,
                        ParseSelector(context_, request->blocks(), KvSelectorKinds::kChainOrSession));
    TP_ASSIGN_OR_RETURN(const PinKind kind, ToPinKind(request->kind()));
    if (!(request->ttl_seconds() > 0) || request->ttl_seconds() > kPinSecondsMax) {
      return absl::InvalidArgumentError(absl::StrCat(
          "ttl_seconds: ", request->ttl_seconds(), " is not in (0, 86400]; pin again to hold on for longer"));
    }
    const absl::Duration ttl = absl::Seconds(request->ttl_seconds());
    if (selected.filter) {
      TP_ASSIGN_OR_RETURN(const auto pinned, context_.pool->PinSession(*selected.filter->session, kind, ttl));
      reply->set_pinned(static_cast<uint32_t>(pinned.blocks));
      return absl::OkStatus();
    }
    if (!selected.keys) return absl::OkStatus();
    // A pin holds what comes before its block, too: one on the last block of a run that is here is enough.
    const auto& keys = *selected.keys;
    const std::vector<bool> here = context_.pool->Contains(keys);
    for (size_t i = 0; i < keys.size(); ++i) {
      if (!here[i]) {
        reply->set_missing(reply->missing() + 1);
        continue;
      }
      reply->set_pinned(reply->pinned() + 1);
      if (i + 1 < keys.size() && here[i + 1]) {
        const auto next = context_.pool->Info(keys[i + 1]);
        if (next && next->parent == keys[i]) continue;
      }
      const absl::Status status = context_.pool->Pin(keys[i], kind, ttl).status();
      if (!status.ok() && !absl::IsNotFound(status)) return status;
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KvService::Unpin(grpc::CallbackServerContext* rpc,
                                           const v1::KvUnpinRequest* request, v1::KvUnpinReply* reply) {
  return Answer(rpc, [&]() -> absl::Status {
    TP_ASSIGN_OR_RETURN(const KvSelection selected,
                        ParseSelector(context_, request->blocks(), KvSelectorKinds::kChainOrSession));
    uint32_t ended = 0;
    if (selected.filter) ended += context_.pool->UnpinSession(*selected.filter->session) ? 1 : 0;
    if (selected.keys) {
      for (const BlockKey& key : *selected.keys) ended += context_.pool->Unpin(key) ? 1 : 0;
    }
    reply->set_unpinned(ended);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KvService::Stats(grpc::CallbackServerContext* rpc,
                                           const v1::KvStatsRequest* request, v1::KvStatsReply* reply) {
  return Answer(rpc, [&]() -> absl::Status {
    const BlockPool::Stats pool = context_.pool->stats();
    reply->set_worker_id(context_.self.worker_id());
    reply->set_boot_id(context_.self.boot_id());
    reply->set_fingerprint(context_.fingerprint);
    reply->set_block_tokens(context_.layout.block_tokens);
    reply->set_block_bytes(context_.layout.block_bytes());
    *reply->add_tiers() = HostLoad(pool, context_.layout.block_bytes());
    if (context_.disk != nullptr) *reply->add_tiers() = DiskLoad(context_.disk->stats());
    reply->set_slots_total(pool.slots);
    reply->set_slots_free(pool.free);
    reply->set_slots_evictable(pool.evictable);
    reply->set_slots_leased(pool.leased);
    reply->set_slots_quarantined(pool.quarantined);
    reply->set_soft_pinned(pool.soft_pinned);
    reply->set_hard_pinned(pool.hard_pinned);
    reply->set_policy(pool.policy);
    reply->set_event_seq(context_.pool->events().next() - 1);
    reply->set_offers(static_cast<uint32_t>(context_.fetch->offers()));
    reply->set_active_fetches(static_cast<uint32_t>(context_.fetch->active_fetches()));
    if (!request->with_tenants()) return absl::OkStatus();
    std::vector<BlockPool::TenantUsage> tenants = context_.pool->tenants();
    if (tenants.size() > kKvTenantsMax) tenants.resize(kKvTenantsMax);
    for (const BlockPool::TenantUsage& usage : tenants) {
      v1::KvTenantUsage* const tenant = reply->add_tenants();
      tenant->set_tenant(usage.tenant);
      tenant->set_host_bytes(usage.bytes);
      tenant->set_quota_bytes(usage.quota);
    }
    return absl::OkStatus();
  });
}

KvService::Progress* KvService::Copy(grpc::CallbackServerContext* rpc, const v1::KvCopyRequest* request) {
  if (const absl::Status s = CheckClusterToken(*rpc, context_.cluster_token); !s.ok()) return Refuse(s);
  // A scheduler's orders say which term it leads; others copy without one.
  if (const uint64_t term = SchedulerTermOf(*rpc);
      term != 0 && context_.scheduler != nullptr && !context_.scheduler->Obey(term)) {
    return Refuse(absl::FailedPreconditionError(absl::StrCat(
        "the scheduler of term ", term, " does not lead any more; another one gives orders now")));
  }
  auto keys = ParseKeys(request->keys(), "keys");
  if (!keys.ok()) return Refuse(keys.status());
  if (request->from().worker_id().empty() || request->from().grpc().empty())
    return Refuse(
        absl::InvalidArgumentError("from: worker_id or grpc is empty; name the worker to copy from"));
  if (request->from().worker_id() == context_.self.worker_id())
    return Refuse(
        absl::InvalidArgumentError("from: is this worker itself; `prefetch` brings blocks from its disk"));
  return Run(
      peer_calls_, "copy", request->bytes_per_second(),
      [this, keys = *std::move(keys), from = request->from()](const MoveControl& control, MoveTally& tally) {
        return mover_.Copy(keys, from, control, tally);
      });
}

KvService::Progress* KvService::Move(grpc::CallbackServerContext* rpc, const v1::KvMoveRequest* request) {
  if (const absl::Status s = CheckClusterToken(*rpc, context_.cluster_token); !s.ok()) return Refuse(s);
  auto selected = ParseSelector(context_, request->blocks(), KvSelectorKinds::kAny);
  if (!selected.ok()) return Refuse(selected.status());
  if (!request->has_from()) {
    return Run(local_calls_, "move", 0,
               [this, selected = *std::move(selected)](const MoveControl& control, MoveTally& tally) {
                 return mover_.Demote(HostKeys(context_, selected), control, tally);
               });
  }
  if (!selected->keys)
    return Refuse(absl::InvalidArgumentError("blocks: with `from`, give keys or tokens; `where` lists them"));
  if (request->from().worker_id() == context_.self.worker_id())
    return Refuse(
        absl::InvalidArgumentError("from: is this worker itself; leave it out to move to its disk"));
  return Run(peer_calls_, "move", 0,
             [this, keys = *std::move(selected->keys), from = request->from()](
                 const MoveControl& control, MoveTally& tally) -> absl::Status {
               TP_RETURN_IF_ERROR(mover_.Copy(keys, from, control, tally));
               return mover_.EvictAt(keys, from, tally);
             });
}

KvService::Progress* KvService::Prefetch(grpc::CallbackServerContext* rpc,
                                         const v1::KvPrefetchRequest* request) {
  if (const absl::Status s = CheckClusterToken(*rpc, context_.cluster_token); !s.ok()) return Refuse(s);
  auto selected = ParseSelector(context_, request->blocks(), KvSelectorKinds::kAny);
  if (!selected.ok()) return Refuse(selected.status());
  return Run(local_calls_, "prefetch", 0,
             [this, selected = *std::move(selected)](const MoveControl& control, MoveTally& tally) {
               return mover_.Prefetch(selected.keys ? *selected.keys : DiskKeys(context_, selected), control,
                                      tally);
             });
}

absl::Status KvService::Remove(const KvSelection& selection, bool host, bool disk, bool pinned,
                               const MoveControl& control, MoveTally& tally) {
  if (selection.nothing()) return absl::OkStatus();
  const auto remove_host = [&] {
    return selection.keys ? context_.pool->Erase(*selection.keys, pinned)
                          : context_.pool->Clear(*selection.filter, pinned);
  };
  if (host) {
    const BlockPool::Removed removed = remove_host();
    tally.total += static_cast<uint32_t>(removed.blocks + removed.pinned);
    tally.done += static_cast<uint32_t>(removed.blocks);
    tally.skipped += static_cast<uint32_t>(removed.pinned);
    tally.bytes += removed.bytes;
    if (removed.pinned > 0) tally.note = "pinned; unpin them first, or clear";
    control.progress(tally);
  }
  if (!disk || context_.disk == nullptr) return absl::OkStatus();
  BlockTier::Predicate matches;
  if (selection.keys) {
    matches = [keys = absl::flat_hash_set<BlockKey>(selection.keys->begin(), selection.keys->end())](
                  const TierEntry& e) { return keys.contains(e.key); };
  } else {
    matches = [filter = *selection.filter](const TierEntry& e) {
      return (!filter.tenant || *filter.tenant == e.tenant) &&
             (!filter.session || *filter.session == e.session);
    };
  }
  struct Answer {
    std::mutex mu;
    std::condition_variable in;
    std::optional<absl::StatusOr<uint64_t>> erased;
  };
  const auto answer = std::make_shared<Answer>();
  context_.disk->EraseIf(std::move(matches), [answer](absl::StatusOr<uint64_t> erased) {
    std::lock_guard lock(answer->mu);
    answer->erased = std::move(erased);
    answer->in.notify_all();
  });
  // What was read from the disk into the host tier before it was erased there.
  const auto remove_read = [&] {
    if (!host) return;
    const BlockPool::Removed again = remove_host();
    tally.total += static_cast<uint32_t>(again.blocks);
    tally.done += static_cast<uint32_t>(again.blocks);
    tally.bytes += again.bytes;
  };
  const absl::Time began = context_.clock->Now();
  std::unique_lock lock(answer->mu);
  while (!answer->in.wait_for(lock, absl::ToChronoNanoseconds(kLook),
                              [&] { return answer->erased.has_value(); })) {
    // What was accepted is carried out all the same.
    const bool cancelled = control.cancelled();
    if (cancelled || context_.clock->Now() - began > kEraseTimeout) {
      lock.unlock();
      remove_read();
      if (cancelled) return absl::CancelledError("cancelled; the disk tier goes on erasing");
      return absl::DeadlineExceededError(absl::StrCat("disk tier: it has not erased within ",
                                                      absl::FormatDuration(kEraseTimeout),
                                                      " and goes on; look at its health, and ask again"));
    }
    control.progress(tally);
  }
  lock.unlock();  // nobody writes to it any more
  remove_read();
  TP_RETURN_IF_ERROR(Annotate(answer->erased->status(), "disk tier"));
  tally.total += static_cast<uint32_t>(**answer->erased);
  tally.done += static_cast<uint32_t>(**answer->erased);
  return absl::OkStatus();
}

KvService::Progress* KvService::Evict(grpc::CallbackServerContext* rpc, const v1::KvEvictRequest* request) {
  if (const absl::Status s = CheckClusterToken(*rpc, context_.cluster_token); !s.ok()) return Refuse(s);
  auto selected = ParseSelector(context_, request->blocks(), KvSelectorKinds::kAny);
  if (!selected.ok()) return Refuse(selected.status());
  bool host = request->tiers().empty(), disk = false;
  for (const int t : request->tiers()) {
    const auto tier = FromProto(static_cast<v1::KvTier>(t), "tiers");
    if (!tier.ok()) return Refuse(tier.status());
    if (*tier == Tier::kDevice)
      return Refuse(absl::InvalidArgumentError(
          "tiers: device pages follow their sequences; host and disk can be evicted"));
    (*tier == Tier::kDisk ? disk : host) = true;
  }
  return Run(local_calls_, "evict", 0,
             [=, this, selected = *std::move(selected)](const MoveControl& control, MoveTally& tally) {
               return Remove(selected, host, disk, /*pinned=*/false, control, tally);
             });
}

KvService::Progress* KvService::Clear(grpc::CallbackServerContext* rpc, const v1::KvClearRequest* request) {
  if (const absl::Status s = CheckClusterToken(*rpc, context_.cluster_token); !s.ok()) return Refuse(s);
  auto selected = ParseSelector(context_, request->blocks(), KvSelectorKinds::kAny);
  if (!selected.ok()) return Refuse(selected.status());
  return Run(local_calls_, "clear", 0,
             [this, selected = *std::move(selected)](const MoveControl& control, MoveTally& tally) {
               return Remove(selected, /*host=*/true, /*disk=*/true, /*pinned=*/true, control, tally);
             });
}

KvService::Progress* KvService::Compress(grpc::CallbackServerContext* rpc,
                                         const v1::KvCompressRequest* request) {
  if (const absl::Status s = CheckClusterToken(*rpc, context_.cluster_token); !s.ok()) return Refuse(s);
  auto selected = ParseSelector(context_, request->blocks(), KvSelectorKinds::kAny);
  if (!selected.ok()) return Refuse(selected.status());
  return Run(compress_calls_, "compress", request->bytes_per_second(),
             [this, selected = *std::move(selected)](const MoveControl& control, MoveTally& tally) {
               return mover_.Compress(selected.keys ? *selected.keys : DiskKeys(context_, selected), control,
                                      tally);
             });
}

grpc::ServerWriteReactor<v1::KvEventBatch>* KvService::Subscribe(grpc::CallbackServerContext* rpc,
                                                                 const v1::KvSubscribeRequest* request) {
  absl::Status refused = CheckClusterToken(*rpc, context_.cluster_token);
  auto subscription = std::make_shared<EventSubscription>(context_, *request);
  if (refused.ok()) {
    std::lock_guard lock(mu_);
    if (stopping_) {
      refused = absl::UnavailableError("shutting down");
    } else if (subscriptions_.size() >= kSubscribersMax) {
      refused = absl::ResourceExhaustedError(absl::StrCat(
          subscriptions_.size(), " consumers follow block events already, the most there may be"));
    } else {
      subscriptions_.insert(subscription);
      subscribers_gauge_.Set(static_cast<double>(subscriptions_.size()));
    }
  }
  if (!refused.ok()) {
    calls_failed_.Add();
    return local_calls_.Refuse<v1::KvEventBatch>(ToGrpc(refused));
  }
  return subscription->Start([this, weak = std::weak_ptr(subscription)] {
    std::lock_guard lock(mu_);
    if (const auto gone = weak.lock()) subscriptions_.erase(gone);
    subscribers_gauge_.Set(static_cast<double>(subscriptions_.size()));
  });
}

}  // namespace tidepool
