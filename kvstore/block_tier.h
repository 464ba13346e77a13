#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kvstore/types.h"

namespace tidepool {

// Whether a tier can be asked at all.
enum class TierState : uint8_t {
  kOpening,  // its index is being read: everything misses, writes are refused with Unavailable
  kOn,
  kOff,  // its backend failed or was never usable: every call answers Unavailable at once
};

std::string_view TierStateName(TierState state);  // "opening", "on", "off"

struct TierHealth {
  TierState state = TierState::kOn;
  std::string reason;  // of kOff: one line for operators, with the way out where there is one

  bool operator==(const TierHealth&) const = default;
};

// What a tier knows of one of its blocks without reading it.
struct TierEntry {
  BlockKey key;
  std::optional<BlockKey> parent;
  std::string tenant;
  uint64_t session = 0;
  uint32_t turn = 0;
  uint32_t position = 0;
  uint64_t bytes = 0;  // of the payload
};

// Speed of one direction, as exponentially weighted means over what was really done (a call that waited in
// the tier's queue is measured from its submission to the backend). Zeros until something was done.
struct TierSpeed {
  double latency_seconds = 0;   // of one operation of one block
  double bytes_per_second = 0;  // of the tier while it had such work, whatever the number of callers
};

struct TierStats {
  TierHealth health;
  uint64_t capacity_bytes = 0;
  uint64_t bytes = 0;   // occupied of the capacity: records with their headers and padding
  uint64_t blocks = 0;  // readable by key
  size_t reads_waiting = 0, writes_waiting = 0;
  TierSpeed read, write;
};

enum class TierRemoval : uint8_t {
  kEvicted,  // for room
  kErased,   // Erase, EraseIf
  kDamaged,  // a record that was not what the index said
  kLost,     // the tier lost its index or its files
};

// Told of what becomes readable and what no longer is, from when it was set. Called from threads of the tier
// and of callers that erase, one call at a time, in the order of events; must not block and must not call the
// tier. Blocks that a tier finds when it opens are not announced one by one: OnHealth(kOn), then List.
class TierObserver {
 public:
  virtual ~TierObserver() = default;
  virtual void OnStored(const BlockInfo& info) = 0;
  virtual void OnRemoved(const BlockKey& key, TierRemoval why) = 0;
  // While the tier is not kOn its blocks are not readable; they are again when it is back.
  virtual void OnHealth(const TierHealth& health) = 0;
};

// BlockTier: one level of KV storage below the host tier (a disk, a remote store): whole blocks by key. It is
// a cache and may lose anything at any time; what it must never do is return wrong bytes. The host tier is
// not one: its blocks are leased in place (BlockPool), these are copied.
//
// Thread-safe. No call waits for the backend: each answers through `done`, exactly once, on a thread of the
// tier's own or before the call returns; `done` must not block. Buffers are borrowed until `done`, other
// spans for the call; once `done` was called nothing touches the buffer, also where the backend itself hangs.
// Destroying the tier first answers what was accepted.
class BlockTier {
 public:
  using Done = std::function<void(absl::Status)>;

  struct Record {
    BlockInfo info;
    size_t bytes = 0;  // of the payload, at the front of dst
  };
  using ReadDone = std::function<void(absl::StatusOr<Record>)>;
  using ReadId = uint64_t;

  using CountDone = std::function<void(absl::StatusOr<uint64_t>)>;

  // What a block takes of the tier's capacity, before and after; the same where it stayed as it was.
  struct Compressed {
    uint64_t before = 0, after = 0;
  };
  using CompressDone = std::function<void(absl::StatusOr<Compressed>)>;
  using Predicate = std::function<bool(const TierEntry&)>;

  // What policy may know of a backend; it never asks which backend it is.
  struct Caps {
    std::string name;             // the `tier` label of metrics, from a small closed set
    size_t block_bytes = 0;       // largest payload
    uint64_t capacity_bytes = 0;  // beyond it the tier evicts by itself
    size_t max_reads = 0;         // accepted and unanswered; beyond it ResourceExhausted
    size_t max_writes = 0;
    bool survives_restart = false;
  };

  struct Page {
    std::vector<TierEntry> entries;
    std::optional<uint64_t> next;  // the cursor to go on with; none: that was all
  };

  virtual ~BlockTier() = default;
  virtual Caps caps() const = 0;

  // Fills the front of dst with the payload stored under `key`. `tokens` are the token ids that the caller
  // stands for (empty: it knows none): a record of other tokens is a miss, counted as a mismatch. Only OK
  // means that dst is readable; otherwise its contents are undefined. NotFound: a miss (never written,
  // evicted since, erased, other tokens). DataLoss: the stored record is damaged, and dropped. Unavailable:
  // the backend failed, others may not. ResourceExhausted: max_reads. DeadlineExceeded: not there after
  // `timeout` (the tier may have a shorter limit of its own). Cancelled. InvalidArgument: dst is smaller
  // than the payload.
  virtual ReadId Read(const BlockKey& key, std::span<const int32_t> tokens, std::span<std::byte> dst,
                      absl::Duration timeout, ReadDone done) = 0;

  // Answers a read that is not wanted any more with Cancelled before it returns true. False: its answer was
  // given or is being given now.
  virtual bool CancelRead(ReadId id) = 0;

  // Stores a block under info.key; a key that is there already is left as it is (equal contents by
  // construction of the key). OK: readable from now on, not yet durable. Stores give way to loads:
  // ResourceExhausted says that this one was dropped (queue, rate, or endurance budget; no room and nothing
  // to evict), and then the key is absent. InvalidArgument: a payload of 0 or more than caps().block_bytes,
  // or an info that no record can hold. Cancelled: EraseIf or Erase met it on its way. Unavailable.
  virtual void Write(const BlockInfo& info, std::span<const std::byte> payload, Done done) = 0;

  // OK also where there was nothing. A Read accepted after `done` misses, also after a restart.
  virtual void Erase(const BlockKey& key, Done done) = 0;
  // Erases what `matches`, writes that were accepted before included; answers how many were there.
  // `matches` runs here and on a thread of the tier, and must not call it.
  virtual void EraseIf(Predicate matches, CountDone done) = 0;

  // Stores a block that is there again, in fewer bytes and without loss: what Read gives is the same to the
  // bit, and the block is readable all the time. One that would hardly become shorter stays as it is. Gives
  // way to loads and shares the stores' budgets. NotFound: there is none (any more). ResourceExhausted: too
  // many are waiting, no time beside the loads, or no budget; ask again later. DataLoss: it was damaged, and
  // is dropped. FailedPrecondition: a tier that has no shorter form. Unavailable.
  virtual void Compress(const BlockKey& key, CompressDone done);

  // A hint for admission, from memory: what would have to go first for a block of so many bytes. nullopt:
  // nothing, or nobody knows.
  virtual std::optional<BlockKey> NextVictim(size_t payload_bytes) const;

  // A hint for planning, from memory: true may turn out a miss. False while the tier is not kOn.
  virtual bool Contains(const BlockKey& key) const = 0;
  // What is known of a block that Contains.
  virtual std::optional<TierEntry> Find(const BlockKey& key) const = 0;

  // At most `max` entries from `cursor` on (0: from the start), in no particular order. Entries that stay
  // during the whole walk come exactly once; of those that come and go meanwhile some may.
  virtual Page List(uint64_t cursor, size_t max) const = 0;

  virtual TierStats stats() const = 0;
  virtual TierHealth health() const = 0;

  // One observer; it outlives the tier, or is replaced by nullptr (after which it is not called any more).
  virtual void SetObserver(TierObserver* observer) = 0;
};

// Predicates of EraseIf.
BlockTier::Predicate EveryBlock();
BlockTier::Predicate BlocksOfTenant(std::string tenant);
BlockTier::Predicate BlocksOfSession(uint64_t session);

}  // namespace tidepool
