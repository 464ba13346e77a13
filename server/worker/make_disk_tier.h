#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/block_layout.h"
#include "base/probe.h"
#include "config/config.h"
#include "kvstore/block_pool.h"
#include "kvstore/block_tier.h"
#include "server/worker/write_behind.h"

namespace tidepool {

// The disk tier that the configuration's section kv.disk asks for, of whole blocks of `layout` (encoded below
// where kv.codec says so); null where it asks for none. `name`: of its directory below kv.disk.path; it has
// to be the same after a restart for the blocks to be found again. Returns at once: the tier opens by itself.
// `metrics` outlives it. InvalidArgument: options that no disk could serve.
absl::StatusOr<std::unique_ptr<BlockTier>> MakeDiskTier(const KvConfig& config, const std::string& name,
                                                        const std::string& fingerprint,
                                                        const BlockLayout& layout, MetricRegistry& metrics);

// What stores blocks of `pool` in that tier, as far as kv.disk.admission says that they are worth it. All are
// borrowed. InvalidArgument: no such admission filter.
absl::StatusOr<std::unique_ptr<WriteBehind>> MakeWriteBehind(const KvConfig& config, BlockPool& pool,
                                                             BlockTier& disk, MetricRegistry& metrics);

}  // namespace tidepool
