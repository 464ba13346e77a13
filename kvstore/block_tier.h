#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "kvstore/types.h"

namespace tidepool {

// BlockTier: one level of KV storage below the host tier (a disk, a remote store): whole blocks by key. It is
// a cache and may lose anything at any time; what it must never do is return wrong bytes. The host tier is
// not one: its blocks are leased in place (BlockPool), these are copied.
//
// Thread-safe. No call blocks: each answers through `done`, exactly once, on a thread of the tier's own or
// before the call returns; `done` must not block. Buffers are borrowed until `done`. Destroying the tier
// first completes what was accepted.
class BlockTier {
 public:
  using Done = std::function<void(absl::Status)>;

  // What policy may know of a backend; it never asks which backend it is.
  struct Caps {
    std::string name;             // the `tier` label of metrics, from a small closed set
    size_t block_bytes = 0;       // of every block
    uint64_t capacity_bytes = 0;  // beyond it the tier evicts by itself
    size_t max_inflight = 0;      // accepted and unanswered calls; beyond it ResourceExhausted
    bool survives_restart = false;
  };

  virtual ~BlockTier() = default;
  virtual Caps caps() const = 0;

  // Fills dst (caps().block_bytes) with the block. Only OK means that dst is readable; otherwise its
  // contents are undefined. NotFound: a miss (never written, evicted since, erased). DataLoss: the stored
  // checksum did not match, the record is dropped. Unavailable: the backend failed, others may not.
  // ResourceExhausted: max_inflight. InvalidArgument: dst has another size.
  virtual void Read(const BlockKey& key, std::span<std::byte> dst, Done done) = 0;

  // Stores a block; a key that is there already is left as it is (equal contents by construction of the key).
  // OK: readable from now on, not yet durable. Errors as for Read, and ResourceExhausted where the tier has
  // no room and nothing to evict; then the key is absent.
  virtual void Write(const BlockKey& key, std::span<const std::byte> block, Done done) = 0;

  // OK also where there was nothing. A Read accepted after `done` misses.
  virtual void Erase(const BlockKey& key, Done done) = 0;

  // A hint for planning, from memory: true may turn out a miss. Never blocks.
  virtual bool Contains(const BlockKey& key) const = 0;
};

}  // namespace tidepool
