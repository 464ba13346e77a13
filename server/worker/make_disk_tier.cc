#include "server/worker/make_disk_tier.h"

#include <utility>

#include "base/status.h"
#include "kvstore/codec/block_codec.h"
#include "kvstore/codec/encoded_tier.h"
#include "kvstore/disk/disk_tier.h"

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

}  // namespace tidepool
