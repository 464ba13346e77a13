#include "kvstore/disk/admission_replay.h"

#include <cstring>
#include <optional>
#include <vector>

#include "base/rng.h"
#include "base/status.h"
#include "kvstore/disk/extent_table.h"
#include "kvstore/policy/admission.h"

namespace tidepool {
namespace {

// A key of which every byte looks like a digest's: filters hash a part of it only.
BlockKey KeyOf(uint32_t block) {
  BlockKey key;
  for (size_t i = 0; i < key.bytes.size(); i += sizeof(uint64_t)) {
    const uint64_t v = Mix64(uint64_t{block} * 4 + i / sizeof(uint64_t));
    std::memcpy(key.bytes.data() + i, &v, sizeof v);
  }
  return key;
}

}  // namespace

absl::StatusOr<AdmissionReplayResult> ReplayAdmission(const BlockTrace& trace,
                                                      const AdmissionReplayOptions& options) {
  if (options.blocks == 0) return absl::InvalidArgumentError("admission replay: a disk of no blocks");
  TP_ASSIGN_OR_RETURN(const auto filter, CreateAdmissionFilter(options.admission, options.blocks));
  TP_ASSIGN_OR_RETURN(auto policy, CreatePolicy({.name = options.eviction, .capacity = options.blocks}));
  ExtentTable table(options.blocks, /*record_pages=*/1, std::move(policy));
  AdmissionReplayResult out;
  uint64_t serial = 0;
  for (const TraceRequest& request : trace.requests) {
    std::optional<BlockKey> parent;
    bool found = true;
    uint32_t position = 0;
    for (const uint32_t block : request.blocks) {
      const BlockKey key = KeyOf(block);
      ++out.blocks;
      filter->OnUse(key);
      const auto extent = table.Find(key);
      found &= extent.has_value();
      out.hits += found;
      if (extent.has_value()) {
        if (found) table.Touch(*extent);
      } else if (const auto victim = table.NextVictim(1); filter->Admit(key, victim ? &*victim : nullptr)) {
        std::vector<ExtentTable::Removed> removed;
        if (const auto id = table.Allocate(1, removed)) {
          IndexEntry entry;
          entry.key = key;
          entry.place = table.page(*id);
          entry.stamp = {1, ++serial};
          entry.parent = parent;
          entry.position = position;
          entry.payload_bytes = entry.stored_bytes = 1;
          table.Commit(*id, entry);
          ++out.written;
        }
      }
      parent = key;
      ++position;
    }
  }
  return out;
}

}  // namespace tidepool
