#include "server/kv/block_mover.h"

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "base/log.h"
#include "base/status.h"
#include "kvstore/keys.h"
#include "server/rpc/kv_convert.h"

namespace tidepool {
namespace {

// One batch: few enough bytes that a cancel is soon obeyed and slots are not held for long, many enough that
// the round trips do not show.
constexpr uint64_t kBatchBytes = 8 << 20;
constexpr size_t kBatchBlocksMax = 64;
constexpr absl::Duration kAskTimeout = absl::Seconds(5);
constexpr absl::Duration kReadTimeout = absl::Seconds(5);
// Writes that the disk tier has no place for are tried again this often: other stores fill its queue, too.
// And so are loads that are late where it is held to a rate.
constexpr int kRetries = 5;
constexpr absl::Duration kWriteRetryPause = absl::Milliseconds(20);
// Blocks that the disk tier is asked to compress at once: it works on two, and a cancel leaves it these.
constexpr size_t kCompressBatch = 8;
// How late a cancellation may be seen.
constexpr absl::Duration kLook = absl::Milliseconds(20);

Counter& Moved(MetricRegistry& m, const char* operation) {
  return m.AddCounter("tidepool_kv_moved_blocks_total", "Blocks moved on orders of the control API.",
                      {{"operation", operation}});
}

void Skip(MoveTally& tally, size_t blocks, std::string_view why) {
  tally.skipped += static_cast<uint32_t>(blocks);
  if (blocks > 0 && tally.note.empty()) tally.note = std::string(why);
}

// Answers of asynchronous calls, waited for by one thread.
class Latch {
 public:
  explicit Latch(size_t count) : left_(count) {}
  void Done() {
    std::lock_guard lock(mu_);
    if (--left_ == 0) all_.notify_all();
  }
  // Until all are in; calls `look` now and then.
  template <typename Look>
  void Wait(const Look& look) {
    std::unique_lock lock(mu_);
    while (!all_.wait_for(lock, absl::ToChronoNanoseconds(kLook), [&] { return left_ == 0; })) {
      lock.unlock();
      look();
      lock.lock();
    }
  }

 private:
  std::mutex mu_;
  std::condition_variable all_;
  size_t left_;
};

PeerAddress ToPeer(const v1::WorkerAddress& a) {
  return {.worker_id = a.worker_id(), .boot_id = a.boot_id(), .transport = a.transport(), .arena = a.arena()};
}

}  // namespace

class BlockMover::PeerCall {
 public:
  PeerCall(const BlockMover& mover, absl::Duration timeout) : mover_(mover) {
    SetTimeout(context_, timeout);
    AddClusterToken(context_, mover.context_.cluster_token);
    std::lock_guard lock(mover_.calls_mu_);
    mover_.calls_.insert(&context_);
    // Before it begins, a call is cancelled too.
    if (mover_.stopped_) context_.TryCancel();
  }
  ~PeerCall() {
    std::lock_guard lock(mover_.calls_mu_);
    mover_.calls_.erase(&context_);
  }
  grpc::ClientContext* context() { return &context_; }

 private:
  const BlockMover& mover_;
  grpc::ClientContext context_;
};

BlockMover::BlockMover(const KvContext& context, MetricRegistry& metrics)
    : context_(context),
      copied_blocks_(Moved(metrics, "copy")),
      copied_bytes_(metrics.AddCounter("tidepool_kv_copied_bytes_total",
                                       "Bytes of blocks copied from peers on orders of the control API.")),
      prefetched_blocks_(Moved(metrics, "prefetch")),
      demoted_blocks_(Moved(metrics, "demote")),
      compressed_blocks_(Moved(metrics, "compress")),
      skipped_blocks_(Moved(metrics, "skipped")) {}

void BlockMover::Stop() {
  stopped_ = true;
  std::lock_guard lock(calls_mu_);
  for (grpc::ClientContext* call : calls_) call->TryCancel();
}

size_t BlockMover::BatchBlocks() const {
  return std::clamp<size_t>(kBatchBytes / context_.layout.block_bytes(), 1, kBatchBlocksMax);
}

bool BlockMover::Pace(absl::Time began, const MoveControl& control, const MoveTally& tally) const {
  if (control.bytes_per_second == 0) return !Over(control);
  const absl::Time due =
      began + absl::Seconds(static_cast<double>(tally.bytes) / static_cast<double>(control.bytes_per_second));
  for (absl::Time now = context_.clock->Now(); now < due; now = context_.clock->Now()) {
    if (Over(control)) return false;
    std::this_thread::sleep_for(absl::ToChronoNanoseconds(std::min(due - now, kLook)));
  }
  return !Over(control);
}

absl::StatusOr<std::vector<BlockInfo>> BlockMover::Describe(std::span<const BlockKey> keys,
                                                            const v1::WorkerAddress& from,
                                                            std::vector<BlockKey>& on_disk) const {
  PeerCall call(*this, kAskTimeout);
  v1::KvWhereRequest request;
  request.set_with_tokens(true);
  request.mutable_blocks()->set_fingerprint(context_.fingerprint);
  for (const BlockKey& key : keys)
    request.mutable_blocks()->mutable_keys()->add_keys(std::string(KeyBytes(key)));
  v1::KvWhereReply reply;
  TP_RETURN_IF_ERROR(Annotate(
      FromGrpc(v1::Kv::NewStub(context_.channels->Get(from.grpc()))->Where(call.context(), request, &reply)),
      from.worker_id()));
  std::vector<BlockInfo> out;
  // The peer may say what it likes: only what was asked for counts, and each once.
  absl::flat_hash_set<BlockKey> asked(keys.begin(), keys.end());
  for (const v1::KvBlock& b : reply.blocks()) {
    if (b.tiers().empty()) continue;  // gone meanwhile
    TP_ASSIGN_OR_RETURN(const BlockKey key, ToBlockKey(b.key(), "key"));
    if (asked.erase(key) == 0) continue;
    if (b.tokens().empty() && b.tiers(0) == v1::KV_TIER_DISK) {
      on_disk.push_back(key);
      continue;
    }
    BlockInfo info{.key = key,
                   .tokens = {b.tokens().begin(), b.tokens().end()},
                   .tenant = b.tenant(),
                   .session = b.session(),
                   .turn = b.turn(),
                   .position = b.position(),
                   .compute_seconds = static_cast<float>(b.compute_seconds())};
    if (!b.parent().empty()) {
      TP_ASSIGN_OR_RETURN(info.parent, ToBlockKey(b.parent(), "parent"));
    }
    // The key is the proof: whoever says these tokens says which block it is.
    if (!info.parent || info.tokens.size() != context_.layout.block_tokens ||
        ChildKey(*info.parent, info.tokens) != key)
      continue;
    out.push_back(std::move(info));
  }
  return out;
}

absl::Status BlockMover::PrefetchAt(std::span<const BlockKey> keys, const v1::WorkerAddress& from) const {
  v1::KvPrefetchRequest request;
  for (const BlockKey& key : keys)
    request.mutable_blocks()->mutable_keys()->add_keys(std::string(KeyBytes(key)));
  PeerCall call(*this, context_.fetch_timeout);
  const auto stream = v1::Kv::NewStub(context_.channels->Get(from.grpc()))->Prefetch(call.context(), request);
  v1::KvProgress progress;
  while (stream->Read(&progress)) {
  }
  return Annotate(FromGrpc(stream->Finish()), from.worker_id());
}

absl::Status BlockMover::CopyBatch(std::span<const BlockInfo> blocks, const v1::WorkerAddress& from,
                                   const MoveControl& control, MoveTally& tally) {
  // Whose blocks they are decides whose quota pays: one reservation a tenant.
  std::vector<BlockLease> slots;
  std::vector<size_t> wanted;  // index into blocks
  for (size_t i = 0; i < blocks.size();) {
    size_t end = i + 1;
    while (end < blocks.size() && blocks[end].tenant == blocks[i].tenant) ++end;
    auto reserved = context_.pool->Reserve(
        end - i, {.kind = LeaseKind::kTransfer, .tenant = blocks[i].tenant, .session = blocks[i].session});
    if (reserved.ok()) {
      for (size_t k = 0; k < reserved->size(); ++k) {
        slots.push_back(std::move((*reserved)[k]));
        wanted.push_back(i + k);
      }
    } else {
      Skip(tally, end - i, "no room: " + std::string(reserved.status().message()));
    }
    i = end;
  }
  if (slots.empty()) return absl::OkStatus();

  FetchSpec spec;
  spec.request_id = "kv-copy-" + context_.self.boot_id().substr(0, 16);
  spec.attempt = next_fetch_++;
  spec.peer = ToPeer(from);
  for (const size_t i : wanted) spec.keys.push_back(blocks[i].key);
  spec.slots = std::move(slots);
  spec.deadline = context_.clock->Now() + context_.fetch_timeout;
  const std::string request_id = spec.request_id;
  const uint32_t attempt = spec.attempt;
  FetchResult result;
  Latch latch(1);
  context_.fetch->Fetch(std::move(spec), [&](FetchResult r) {
    result = std::move(r);
    latch.Done();
  });
  bool aborted = false;
  latch.Wait([&] {
    if (!aborted && Over(control)) {
      aborted = true;
      context_.fetch->Abort(request_id, attempt);
    }
  });
  if (aborted) return absl::CancelledError("cancelled");
  TP_RETURN_IF_ERROR(Annotate(result.status, from.worker_id()));
  for (size_t k = 0; k < wanted.size(); ++k) {
    if (!result.filled[k] || result.slots[k].empty()) {
      Skip(tally, 1, "gone from " + from.worker_id() + " meanwhile");
      continue;
    }
    if (!context_.pool->PublishLoaded(result.slots[k], blocks[wanted[k]])) {
      Skip(tally, 1, "cleared meanwhile");
      continue;
    }
    if (context_.on_copied) context_.on_copied(blocks[wanted[k]].key, result.slots[k]);
    ++tally.done;
    tally.bytes += context_.layout.block_bytes();
    copied_blocks_.Add();
    copied_bytes_.Add(context_.layout.block_bytes());
  }
  return absl::OkStatus();
}

absl::Status BlockMover::Copy(std::span<const BlockKey> keys, const v1::WorkerAddress& from,
                              const MoveControl& control, MoveTally& tally) {
  tally.total += static_cast<uint32_t>(keys.size());
  const absl::Time began = context_.clock->Now();
  for (size_t at = 0; at < keys.size(); at += BatchBlocks()) {
    if (Over(control)) return absl::CancelledError("cancelled");
    const auto batch = keys.subspan(at, std::min(BatchBlocks(), keys.size() - at));
    const std::vector<bool> here = context_.pool->Contains(batch);
    std::vector<BlockKey> missing;
    for (size_t i = 0; i < batch.size(); ++i) {
      if (!here[i]) missing.push_back(batch[i]);
    }
    tally.done += static_cast<uint32_t>(batch.size() - missing.size());
    if (!missing.empty()) {
      std::vector<BlockKey> on_disk;
      TP_ASSIGN_OR_RETURN(std::vector<BlockInfo> blocks, Describe(missing, from, on_disk));
      if (!on_disk.empty()) {
        // Into its host tier first, from where they would be sent anyhow: with them comes what they are.
        TP_RETURN_IF_ERROR(PrefetchAt(on_disk, from));
        std::vector<BlockKey> still;
        TP_ASSIGN_OR_RETURN(std::vector<BlockInfo> more, Describe(on_disk, from, still));
        blocks.insert(blocks.end(), more.begin(), more.end());
      }
      Skip(tally, missing.size() - blocks.size(),
           "not at " + from.worker_id() + ", or not known by its tokens");
      const uint32_t skipped = tally.skipped;
      TP_RETURN_IF_ERROR(CopyBatch(blocks, from, control, tally));
      skipped_blocks_.Add(tally.skipped - skipped + missing.size() - blocks.size());
    }
    control.progress(tally);
    if (!Pace(began, control, tally)) return absl::CancelledError("cancelled");
  }
  return absl::OkStatus();
}

absl::Status BlockMover::EvictAt(std::span<const BlockKey> keys, const v1::WorkerAddress& from,
                                 MoveTally& tally) {
  const std::vector<bool> here = context_.pool->Contains(keys);
  v1::KvEvictRequest request;
  request.add_tiers(v1::KV_TIER_HOST);
  request.add_tiers(v1::KV_TIER_DISK);
  for (size_t i = 0; i < keys.size(); ++i) {
    if (here[i]) request.mutable_blocks()->mutable_keys()->add_keys(std::string(KeyBytes(keys[i])));
  }
  if (request.blocks().keys().keys().empty()) return absl::OkStatus();
  PeerCall call(*this, context_.fetch_timeout);
  const auto stream = v1::Kv::NewStub(context_.channels->Get(from.grpc()))->Evict(call.context(), request);
  v1::KvProgress progress;
  while (stream->Read(&progress)) {
  }
  if (progress.skipped() > 0 && tally.note.empty())
    tally.note =
        absl::StrCat(progress.skipped(), " blocks stay at ", from.worker_id(), " too: ", progress.note());
  return Annotate(FromGrpc(stream->Finish()), from.worker_id());
}

absl::Status BlockMover::Prefetch(std::span<const BlockKey> keys, const MoveControl& control,
                                  MoveTally& tally) {
  if (context_.disk == nullptr)
    return absl::FailedPreconditionError(context_.self.worker_id() +
                                         " has no disk tier; see kv.disk in its config");
  tally.total += static_cast<uint32_t>(keys.size());
  const absl::Time began = context_.clock->Now();
  for (size_t at = 0; at < keys.size(); at += BatchBlocks()) {
    if (Over(control)) return absl::CancelledError("cancelled");
    const auto batch = keys.subspan(at, std::min(BatchBlocks(), keys.size() - at));
    const std::vector<bool> here = context_.pool->Contains(batch);
    struct Read {
      BlockKey key;
      BlockLease slot;
      absl::StatusOr<BlockTier::Record> record = absl::UnknownError("");
    };
    std::vector<Read> reads;
    for (size_t i = 0; i < batch.size(); ++i) {
      if (here[i]) {
        ++tally.done;
        continue;
      }
      const auto entry = context_.disk->Find(batch[i]);
      if (!entry) {
        Skip(tally, 1, "not on the disk");
        continue;
      }
      auto slot = context_.pool->Reserve(
          1, {.kind = LeaseKind::kTierIo, .tenant = entry->tenant, .session = entry->session});
      if (!slot.ok()) {
        Skip(tally, 1, "no room: " + std::string(slot.status().message()));
        continue;
      }
      reads.push_back({batch[i], std::move(slot->front())});
    }
    std::vector<Read*> todo;
    for (Read& read : reads) todo.push_back(&read);
    // A tier that is held to a rate answers in its time what fits into that; what came too late is asked for
    // again, as long as some come.
    for (int attempt = 0; !todo.empty();) {
      Latch latch(todo.size());
      std::vector<BlockTier::ReadId> ids;
      for (Read* const read : todo) {
        ids.push_back(
            context_.disk->Read(read->key, {}, read->slot.data(), kReadTimeout, [read, &latch](auto record) {
              read->record = std::move(record);
              latch.Done();
            }));
      }
      latch.Wait([&] {
        control.progress(tally);
        if (!Over(control)) return;
        for (const BlockTier::ReadId id : std::exchange(ids, {})) context_.disk->CancelRead(id);
      });
      const size_t answered =
          std::erase_if(todo, [](const Read* r) { return !absl::IsDeadlineExceeded(r->record.status()); });
      attempt = answered > 0 ? 0 : attempt + 1;
      if (attempt > kRetries || Over(control)) break;
    }
    for (Read& read : reads) {
      const bool whole = read.record.ok() && read.record->bytes == context_.layout.block_bytes() &&
                         read.record->info.parent &&
                         ChildKey(*read.record->info.parent, read.record->info.tokens) == read.key;
      if (!whole) {
        Skip(tally, 1,
             read.record.ok() ? "damaged on the disk" : std::string(read.record.status().message()));
        skipped_blocks_.Add();
        continue;
      }
      if (!context_.pool->PublishLoaded(read.slot, std::move(read.record->info))) {
        Skip(tally, 1, "cleared meanwhile");
        continue;
      }
      ++tally.done;
      tally.bytes += context_.layout.block_bytes();
      prefetched_blocks_.Add();
    }
    control.progress(tally);
    if (!Pace(began, control, tally)) return absl::CancelledError("cancelled");
  }
  return absl::OkStatus();
}

absl::Status BlockMover::Compress(std::span<const BlockKey> keys, const MoveControl& control,
                                  MoveTally& tally) {
  if (context_.disk == nullptr)
    return absl::FailedPreconditionError(context_.self.worker_id() +
                                         " has no disk tier; see kv.disk in its config");
  // Outlives this call where it is cancelled.
  struct Batch {
    std::mutex mu;
    std::condition_variable changed;
    size_t left = 0;
    std::vector<absl::StatusOr<BlockTier::Compressed>> results;
  };
  tally.total += static_cast<uint32_t>(keys.size());
  const absl::Time began = context_.clock->Now();
  MoveTally looked;  // what is paced: the bytes of blocks, not what is saved
  for (size_t at = 0; at < keys.size(); at += kCompressBatch) {
    const auto batch = keys.subspan(at, std::min(kCompressBatch, keys.size() - at));
    std::vector<BlockKey> todo(batch.begin(), batch.end());
    for (int attempt = 0; !todo.empty(); ++attempt) {
      if (Over(control)) return absl::CancelledError("cancelled");
      const auto shared = std::make_shared<Batch>();
      shared->left = todo.size();
      shared->results.resize(todo.size(), absl::UnknownError(""));
      for (size_t i = 0; i < todo.size(); ++i) {
        context_.disk->Compress(todo[i], [shared, i](absl::StatusOr<BlockTier::Compressed> result) {
          std::lock_guard lock(shared->mu);
          shared->results[i] = std::move(result);
          if (--shared->left == 0) shared->changed.notify_all();
        });
      }
      std::unique_lock lock(shared->mu);
      while (!shared->changed.wait_for(lock, absl::ToChronoNanoseconds(kLook),
                                       [&] { return shared->left == 0; })) {
        if (Over(control)) return absl::CancelledError("cancelled");
        control.progress(tally);
      }
      std::vector<BlockKey> again;
      for (size_t i = 0; i < todo.size(); ++i) {
        const auto& result = shared->results[i];
        if (result.ok()) {
          ++tally.done;
          tally.bytes += result->before - std::min(result->before, result->after);
          if (result->after < result->before) compressed_blocks_.Add();
        } else if (absl::IsFailedPrecondition(result.status())) {
          return result.status();
        } else if (absl::IsResourceExhausted(result.status()) && attempt < kRetries) {
          again.push_back(todo[i]);
        } else {
          Skip(
              tally, 1,
              absl::IsNotFound(result.status()) ? "not on the disk" : std::string(result.status().message()));
          skipped_blocks_.Add();
        }
      }
      todo = std::move(again);
      if (!todo.empty())
        std::this_thread::sleep_for(absl::ToChronoNanoseconds(kWriteRetryPause * (1 << attempt)));
    }
    looked.bytes += batch.size() * context_.layout.block_bytes();
    control.progress(tally);
    if (!Pace(began, control, looked)) return absl::CancelledError("cancelled");
  }
  return absl::OkStatus();
}

absl::Status BlockMover::Demote(std::span<const BlockKey> keys, const MoveControl& control,
                                MoveTally& tally) {
  if (context_.disk == nullptr)
    return absl::FailedPreconditionError(context_.self.worker_id() +
                                         " has no disk tier; see kv.disk in its config");
  tally.total += static_cast<uint32_t>(keys.size());
  const absl::Time began = context_.clock->Now();
  // Half of what the tier takes at once: the other half is for what is stored as it is computed.
  const size_t step = std::clamp<size_t>(context_.disk->caps().max_writes / 2, 1, BatchBlocks());
  bool retry = true;  // until a batch's retries were of no use
  for (size_t at = 0; at < keys.size(); at += step) {
    if (Over(control)) return absl::CancelledError("cancelled");
    const auto batch = keys.subspan(at, std::min(step, keys.size() - at));
    // One at a time: a block that is gone below was cleared, not moved by another call.
    std::unique_lock one(demote_mu_);
    std::vector<BlockLease> leases = context_.pool->LeaseMany(batch, LeaseKind::kTierIo);
    std::vector<absl::Status> written(batch.size(), absl::OkStatus());
    std::vector<size_t> todo;
    for (size_t i = 0; i < batch.size(); ++i) todo.push_back(i);
    for (int attempt = 0; !todo.empty(); ++attempt) {
      Latch latch(todo.size());
      for (const size_t i : todo) {
        const auto info = leases[i].empty() ? std::nullopt : context_.pool->Info(batch[i]);
        if (!info) {
          written[i] = absl::NotFoundError("not in the host tier");
          latch.Done();
          continue;
        }
        context_.disk->Write(*info, leases[i].data(), [&written, &latch, i](absl::Status status) {
          written[i] = std::move(status);
          latch.Done();
        });
      }
      latch.Wait([] {});
      std::erase_if(todo, [&](size_t i) { return !absl::IsResourceExhausted(written[i]); });
      if (todo.empty()) {
        retry = true;
      } else if (!retry || attempt == kRetries || Over(control)) {
        retry = false;
        break;
      } else {
        std::this_thread::sleep_for(absl::ToChronoNanoseconds(kWriteRetryPause * (1 << attempt)));
      }
    }
    // What is leased is not evicted: what is gone was cleared while it was being written.
    for (size_t i = 0; i < batch.size(); ++i) {
      if (!written[i].ok() || context_.pool->Info(batch[i])) continue;
      written[i] = absl::CancelledError("cleared meanwhile");
      context_.disk->Erase(batch[i], [](const absl::Status& erased) {
        if (!erased.ok()) spdlog::warn("a cleared block stays on the disk: {}", erased.ToString());
      });
    }
    BlockLease::DropAll(std::move(leases));
    std::vector<BlockKey> moved;
    for (size_t i = 0; i < batch.size(); ++i) {
      if (written[i].ok()) {
        moved.push_back(batch[i]);
      } else {
        Skip(tally, 1, std::string(written[i].message()));
        skipped_blocks_.Add();
      }
    }
    // Tails before heads: no reader finds a chain whose middle is gone.
    std::reverse(moved.begin(), moved.end());
    const BlockPool::Removed removed = context_.pool->Erase(moved, /*pinned=*/false, Tier::kDisk);
    one.unlock();
    Skip(tally, removed.pinned, "pinned in the host tier");
    const size_t gone = moved.size() - removed.pinned;
    tally.done += static_cast<uint32_t>(gone);
    tally.bytes += gone * context_.layout.block_bytes();
    demoted_blocks_.Add(gone);
    control.progress(tally);
    if (!Pace(began, control, tally)) return absl::CancelledError("cancelled");
  }
  return absl::OkStatus();
}

}  // namespace tidepool
