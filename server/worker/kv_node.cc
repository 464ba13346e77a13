#include "server/worker/kv_node.h"

#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/status.h"
#include "kvstore/codec/block_codec.h"
#include "server/cluster/model_digest.h"
#include "server/worker/make_disk_tier.h"
#include "server/worker/transport_options.h"

namespace tidepool {
namespace {

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "localhost";
}

BlockLayout LayoutOf(const v1::ModelIdentity& model) {
  return {.layers = model.layers(),
          .kv_heads = model.kv_heads(),
          .head_dim = model.head_dim(),
          .block_tokens = model.block_tokens(),
          .dtype = static_cast<DType>(model.kv_dtype())};
}

// A quota is counted in blocks. Less than one is no error: whoever writes the cluster's document does not
// know every model's blocks, and a worker that refused it could not start again.
void WarnOfSmallQuota(const std::string& name, uint64_t quota, uint64_t block_bytes) {
  if (quota == 0 || quota >= block_bytes) return;
  spdlog::warn("{} is {} bytes, less than one block of {}: one block is counted; raise it, or 0 for no limit",
               name, quota, block_bytes);
}

void WarnOfSmallQuotas(const KvConfig& kv, const BlockLayout& layout) {
  WarnOfSmallQuota("kv.tenant_quota_bytes", kv.tenant_quota_bytes, layout.block_bytes());
  for (const auto& [tenant, quota] : kv.tenant_quotas) {
    WarnOfSmallQuota(absl::StrCat("kv.tenant_quotas of ", tenant), quota, layout.block_bytes());
  }
}

absl::StatusOr<std::unique_ptr<BlockPool>> MakePool(const KvConfig& kv, const BlockLayout& layout,
                                                    MetricRegistry& metrics) {
  const uint64_t slots = kv.host_bytes / std::max<uint64_t>(layout.block_bytes(), 1);
  if (slots == 0) {
    return absl::InvalidArgumentError("kv.host_bytes is less than one block of " +
                                      std::to_string(layout.block_bytes()) + " bytes; raise it");
  }
  WarnOfSmallQuotas(kv, layout);
  BlockPool::Options options;
  options.layout = layout;
  options.slots = static_cast<uint32_t>(std::min<uint64_t>(slots, UINT32_MAX));
  options.metrics = &metrics;
  options.memory = {.huge_pages = kv.huge_pages, .numa_node = kv.numa_node, .lock_memory = kv.lock_memory};
  options.policy = kv.policy;
  options.tenant_quota_bytes = kv.tenant_quota_bytes;
  options.tenant_quotas = kv.tenant_quotas;
  options.hard_pin_share = kv.hard_pin_percent / 100.0;
  return BlockPool::Create(options);
}

}  // namespace

KvNode::KvNode(const Config& c, ChannelCache& peers, MetricRegistry& m)
    : config(c), channels(peers), metrics(m) {}

void KvNode::SetName(const std::string& of_role, const std::string& configured_id) {
  role = of_role;
  context.cluster_token = config.cluster.token;
  context.channels = &channels;
  context.fetch_timeout = config.transport.fetch_timeout;
  const std::string host = HostName();
  disk_name = configured_id.empty() ? role : configured_id;
  context.self.set_worker_id(configured_id.empty() ? absl::StrCat(role, "-", host, "-", getpid())
                                                   : configured_id);
  context.self.set_boot_id(RandomHexId());
  context.self.set_pid(static_cast<uint32_t>(getpid()));
  context.self.set_host(host);
}

absl::Status KvNode::FindScheduler() {
  ClusterMember::Options options;
  options.config = config.cluster;
  options.boot_id = context.self.boot_id();
  options.metrics = &metrics;
  TP_ASSIGN_OR_RETURN(member, ClusterMember::StartIfConfigured(std::move(options)));
  scheduler = MakeLocator(config.cluster, member);
  context.scheduler = scheduler.get();
  return absl::OkStatus();
}

absl::Status KvNode::StartTiers(const v1::ModelIdentity& of) {
  model = of;
  layout = LayoutOf(model);
  KvConfig kv = config.kv;
  kv.codec = model.kv_codec().empty() ? "none" : model.kv_codec();
  context.layout = layout;
  context.fingerprint = model.fingerprint();
  context.codec = kv.codec;
  TP_ASSIGN_OR_RETURN(pool, MakePool(kv, layout, metrics));
  context.pool = pool.get();
  TP_ASSIGN_OR_RETURN(disk, MakeDiskTier(kv, disk_name, context.fingerprint, layout, metrics));
  if (!disk) return absl::OkStatus();
  context.disk = disk.get();
  disk_events = std::make_unique<TierEvents>(*disk, pool->events());
  TP_ASSIGN_OR_RETURN(store, MakeWriteBehind(kv, *pool, *disk, metrics));
  return absl::OkStatus();
}

absl::Status KvNode::StartFetch() {
  TP_ASSIGN_OR_RETURN(auto transport, CreateTransport(TransportOptionsOf(
                                          config.transport, context.self.worker_id(), &metrics)));
  FetchNode::Options options;
  options.worker_id = context.self.worker_id();
  options.boot_id = context.self.boot_id();
  options.fingerprint = context.fingerprint;
  options.pool = pool.get();
  options.transport = std::move(transport);
  options.metrics = &metrics;
  options.offer_lease = config.kv.offer_lease;
  options.share_arena = config.transport.share_arena;
  options.lanes = config.transport.lanes;
  options.flow.window_bytes = config.transport.window_bytes;
  options.disk = disk.get();
  TP_ASSIGN_OR_RETURN(options.codec, GetBlockCodec(context.codec));
  TP_ASSIGN_OR_RETURN(fetch, FetchNode::Start(std::move(options)));
  context.fetch = fetch.get();
  context.self.set_transport(fetch->address());
  context.self.set_arena(fetch->arena_address());
  return absl::OkStatus();
}

std::unique_ptr<Reporter> KvNode::MakeReporter(v1::Role v1_role,
                                               std::function<void(v1::WorkerReport&)> fill) {
  Reporter::Options options;
  options.scheduler = scheduler;
  options.cluster_token = config.cluster.token;
  options.interval = config.worker.report_interval;
  options.base.set_role(v1_role);
  *options.base.mutable_model() = model;
  options.base.set_protocol(kClusterProtocol);
  options.base.set_version(TIDEPOOL_VERSION);
  options.pool = pool.get();
  options.disk = disk.get();
  options.fill = std::move(fill);
  if (member) {
    // A scheduler that leads from now on holds others to the model of those that are known in etcd: who was
    // refused is not among them.
    options.on_status = [this](const absl::Status& status) {
      if (status.ok()) member->Join(Self());
      if (absl::IsFailedPrecondition(status)) member->Leave();
    };
  }
  return std::make_unique<Reporter>(std::move(options), channels, metrics);
}

void KvNode::Apply(const KvConfig& kv) {
  WarnOfSmallQuotas(kv, layout);
  pool->SetTenantQuotas(kv.tenant_quota_bytes, kv.tenant_quotas);
}

v1::Member KvNode::Self() const {
  v1::Member self;
  self.set_id(context.self.worker_id());
  self.set_role(role);
  self.set_address(context.self.grpc());
  self.set_version(TIDEPOOL_VERSION);
  self.set_fingerprint(context.fingerprint);
  self.set_identity(ModelIdentityDigest(model));
  self.set_pid(context.self.pid());
  self.set_host(context.self.host());
  return self;
}

void KvNode::SetRole(const std::string& now, bool accepted) {
  role = now;
  if (member && accepted) member->Join(Self());
}

v1::DescribeReply KvNode::Describe(v1::Role role) const {
  v1::DescribeReply out;
  out.set_role(role);
  out.set_version(TIDEPOOL_VERSION);
  *out.mutable_model() = model;
  return out;
}

void FillCounts(const BlockPool& pool, const FetchNode& fetch, v1::DescribeReply& reply) {
  const BlockPool::Stats stats = pool.stats();
  reply.set_slots_total(stats.slots);
  reply.set_slots_free(stats.free + stats.evictable);
  reply.set_slots_leased(stats.leased);
  reply.set_slots_quarantined(stats.quarantined);
  reply.set_published_blocks(stats.published);
  reply.set_offers(static_cast<uint32_t>(fetch.offers()));
}

void KvNode::SetListening(const std::string& listen, int port) {
  context.self.set_grpc(absl::StrCat(listen.substr(0, listen.rfind(':')), ":", port));
}

}  // namespace tidepool
