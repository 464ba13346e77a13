#include "server/scheduler/replicator.h"

#include <utility>

#include "base/log.h"
#include "server/rpc/kv_convert.h"
#include "server/scheduler/convert.h"
#include "tidepool/v1/kv.grpc.pb.h"

namespace tidepool {
namespace {

// Of an order, beside what its bytes take at the rate allowed: a peer that is gone costs this once.
constexpr absl::Duration kOrderTimeout = absl::Seconds(20);

}  // namespace

Replicator::Replicator(std::string cluster_token, uint64_t bytes_per_second, MetricRegistry& metrics)
    : token_(std::move(cluster_token)),
      bytes_per_second_(bytes_per_second),
      blocks_(metrics.AddCounter("tidepool_scheduler_replicated_blocks_total",
                                 "Blocks copied between workers on the scheduler's orders.")),
      bytes_(metrics.AddCounter("tidepool_scheduler_replicated_bytes_total", "Their bytes.")),
      skipped_(metrics.AddCounter("tidepool_scheduler_replication_skipped_blocks_total",
                                  "Blocks that could not be copied: gone, or no room.")),
      failures_(metrics.AddCounter("tidepool_scheduler_replication_failures_total",
                                   "Copy orders that ended with an error.")) {}

absl::Status Replicator::Execute(const CopyOrder& order, uint64_t block_bytes,
                                 const std::function<bool()>& cancelled,
                                 const std::function<void()>& progress, Tally& tally) {
  v1::KvCopyRequest request;
  for (const BlockKey& key : order.keys) request.add_keys(std::string(KeyBytes(key)));
  ToProto(order.from, request.mutable_from());
  const uint64_t rate = bytes_per_second_;
  request.set_bytes_per_second(rate);
  grpc::ClientContext call;
  AddClusterToken(call, token_);
  AddSchedulerTerm(call, term_);
  const double paced =
      rate == 0 ? 0 : static_cast<double>(order.keys.size() * block_bytes) / static_cast<double>(rate);
  SetTimeout(call, kOrderTimeout + absl::Seconds(paced));
  {
    std::lock_guard lock(mu_);
    if (stopped_ || cancelled()) return absl::CancelledError("cancelled");
    running_.insert(&call);
  }
  const Tally before = tally;
  const auto stub = v1::Kv::NewStub(channels_.Get(order.to.grpc));
  const auto stream = stub->Copy(&call, request);
  v1::KvProgress said;
  while (stream->Read(&said)) {
    tally.copied = before.copied + said.done();
    tally.skipped = before.skipped + said.skipped();
    tally.bytes = before.bytes + said.bytes();
    if (tally.note.empty()) tally.note = said.note();
    progress();
    if (cancelled()) call.TryCancel();
  }
  const absl::Status status = FromGrpc(stream->Finish());
  {
    std::lock_guard lock(mu_);
    running_.erase(&call);
    if (stopped_ || cancelled()) return absl::CancelledError("cancelled");
  }
  if (!status.ok()) {
    failures_.Add();
    tally.skipped =
        before.skipped + static_cast<uint32_t>(order.keys.size()) - (tally.copied - before.copied);
    if (tally.note.empty()) tally.note = order.to.worker_id + ": " + std::string(status.message());
    spdlog::warn("copy of {} blocks from {} to {}: {}", order.keys.size(), order.from.worker_id,
                 order.to.worker_id, std::string(status.message()));
  }
  blocks_.Add(tally.copied - before.copied);
  bytes_.Add(tally.bytes - before.bytes);
  skipped_.Add(tally.skipped - before.skipped);
  return absl::OkStatus();
}

void Replicator::Stop() {
  std::lock_guard lock(mu_);
  stopped_ = true;
  for (grpc::ClientContext* call : running_) call->TryCancel();
}

}  // namespace tidepool
