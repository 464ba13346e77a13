#include "server/worker/make_disk_tier.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "base/status.h"
#include "kvstore/codec/block_codec.h"
#include "kvstore/codec/encoded_tier.h"
#include "kvstore/disk/disk_tier.h"
#include "kvstore/policy/admission.h"

namespace tidepool {

absl::StatusOr<std::unique_ptr<BlockTier>> MakeDiskTier(const KvConfig& config, const std::string& name,
                                                        const std::string& fingerprint,
                                                        const BlockLayout& layout, MetricRegistry& metrics) {
  if (config.disk.path.empty()) return nullptr;
  TP_ASSIGN_OR_RETURN(const BlockCodec* codec, GetBlockCodec(config.codec));
  const bool encoded = config.codec != "none";
  DiskTierOptions options;
  options.path = config.disk.path;
  options.name = name;
  options.fingerprint = fingerprint;
  options.layout = layout;
  options.codec = config.codec;
  if (encoded) options.payload_bytes_max = codec->MaxEncodedBytes(layout);
  options.bytes = config.disk.bytes;
  options.compress = config.disk.compress == "lossless";
  options.read_bytes_per_second = config.disk.read_bytes_per_second;
  options.write_bytes_per_second = config.disk.write_bytes_per_second;
  options.write_bytes_per_day = config.disk.write_bytes_per_day;
  options.slow_op = config.disk.slow_op;
  options.eviction = config.disk.eviction;
  options.metrics = &metrics;
  TP_ASSIGN_OR_RETURN(std::unique_ptr<BlockTier> disk, DiskTier::Create(std::move(options)));
  if (!encoded) return disk;
  EncodedTier::Options outer;
  outer.codec = codec;
  outer.layout = layout;
  outer.inner = std::move(disk);
  outer.metrics = &metrics;
  return EncodedTier::Create(std::move(outer));
}

absl::StatusOr<std::unique_ptr<WriteBehind>> MakeWriteBehind(const KvConfig& config, BlockPool& pool,
                                                             BlockTier& disk, MetricRegistry& metrics) {
  const uint64_t blocks = std::max<uint64_t>(1, config.disk.bytes / pool.layout().block_bytes());
  // The thread that stores asks it; the engine's tells it of uses.
  struct Shared {
    std::mutex mu;
    std::unique_ptr<AdmissionFilter> filter;
  };
  const auto shared = std::make_shared<Shared>();
  TP_ASSIGN_OR_RETURN(shared->filter, CreateAdmissionFilter(config.disk.admission, blocks));
  WriteBehind::Options options;
  options.pool = &pool;
  options.tier = &disk;
  options.metrics = &metrics;
  // Of a small pool, no more than an eighth may wait for the disk.
  options.max_queued = std::clamp<size_t>(pool.stats().slots / 8, 1, options.max_queued);
  options.admit = [shared, &disk, block_bytes = pool.layout().block_bytes()](const BlockInfo& info) {
    const std::optional<BlockKey> victim = disk.NextVictim(block_bytes);
    std::lock_guard lock(shared->mu);
    shared->filter->OnUse(info.key);
    return shared->filter->Admit(info.key, victim ? &*victim : nullptr);
  };
  options.used = [shared](const BlockKey& key) {
    std::lock_guard lock(shared->mu);
    shared->filter->OnUse(key);
  };
  return std::make_unique<WriteBehind>(std::move(options));
}

}  // namespace tidepool
