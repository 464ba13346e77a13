#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "base/block_layout.h"
#include "base/probe.h"
#include "config/config.h"
#include "kvstore/block_pool.h"
#include "kvstore/block_tier.h"
#include "kvstore/fetch_node.h"
#include "server/cluster/cluster_member.h"
#include "server/kv/kv_context.h"
#include "server/kv/tier_events.h"
#include "server/worker/reporter.h"
#include "server/worker/write_behind.h"

namespace tidepool {

// KvNode: what a process that holds KV blocks is made of, whether it computes (a worker) or not (a store):
// its name, its host tier, its disk tier with what is stored there, and its end of every transfer. Made in
// the order of the functions below, by one thread; the parts themselves are as thread-safe as they say.
//
// Uses of Config: kv.*, transport.*, worker.report_interval, cluster.*.
struct KvNode {
  // All are borrowed, and not looked at yet.
  KvNode(const Config& config, ChannelCache& channels, MetricRegistry& metrics);

  // `role`: prefill, decode, both or store. An id that is not configured is ROLE-HOST-PID; the disk tier's
  // directory is then named after the role alone: an id with a pid in it would not find its blocks again.
  void SetName(const std::string& role, const std::string& configured_id);
  // Looks for the scheduler where the configuration says: in etcd, or at a fixed address. Errors: those of
  // ClusterMember::Start.
  absl::Status FindScheduler();
  // Pool and disk tier (which opens by itself), for blocks of this model. InvalidArgument: not one block
  // fits, or options that no pool or disk could serve. ResourceExhausted: memory.
  absl::Status StartTiers(const v1::ModelIdentity& model);
  // Others can fetch from here. Errors: those of transports.
  absl::Status StartFetch();
  // What keeps the scheduler's view fresh, not started yet. `fill`: Reporter::Options. While a scheduler
  // accepts this process, it is known in etcd, too, where there is one.
  std::unique_ptr<Reporter> MakeReporter(v1::Role role, std::function<void(v1::WorkerReport&)> fill);
  v1::DescribeReply Describe(v1::Role role) const;
  // Tenants' quotas from now on (see BlockPool::SetTenantQuotas).
  void Apply(const KvConfig& kv);
  // As etcd knows it.
  v1::Member Self() const;
  // Known under this role from now on, in etcd, too, while a scheduler accepts this process. To be called on
  // the reporter's thread.
  void SetRole(const std::string& role, bool accepted);
  // The gRPC server listens, on this port of `listen`'s host.
  void SetListening(const std::string& listen, int port);

  const Config& config;
  ChannelCache& channels;
  MetricRegistry& metrics;
  std::string role, disk_name;
  std::shared_ptr<ClusterMember> member;  // null: no etcd
  std::shared_ptr<SchedulerLocator> scheduler;
  v1::ModelIdentity model;
  BlockLayout layout;
  // For the pool's control API; `self` is this process's own address.
  KvContext context;

  // Destroyed in reverse order.
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<BlockTier> disk;  // null: none
  std::unique_ptr<TierEvents> disk_events;
  std::unique_ptr<FetchNode> fetch;
  std::unique_ptr<WriteBehind> store;  // null: no disk
};

// What is here, as Worker.Describe says it.
void FillCounts(const BlockPool& pool, const FetchNode& fetch, v1::DescribeReply& reply);

// What the cluster has to agree on. `codec`: kv.codec.
template <typename Described>  // Model, ModelDescription
v1::ModelIdentity IdentityOf(const Described& model, uint32_t block_tokens, const std::string& codec) {
  const BlockLayout layout = model.Layout(block_tokens);
  v1::ModelIdentity out;
  out.set_name(model.name);
  out.set_fingerprint(model.fingerprint);
  out.set_layers(layout.layers);
  out.set_kv_heads(layout.kv_heads);
  out.set_head_dim(layout.head_dim);
  out.set_block_tokens(layout.block_tokens);
  out.set_kv_dtype(static_cast<uint32_t>(layout.dtype));
  out.set_max_model_len(model.max_model_len);
  out.set_vocab_size(model.spec.vocab);
  out.set_hidden_size(model.spec.hidden);
  if (codec != "none") out.set_kv_codec(codec);
  return out;
}

}  // namespace tidepool
