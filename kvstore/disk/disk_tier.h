#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/block_layout.h"
#include "base/probe.h"
#include "kvstore/block_tier.h"
#include "kvstore/disk/disk_io.h"

namespace tidepool {

// What a disk tier is made with. Defaults are for an NVMe disk and blocks of one or two MiB.
struct DiskTierOptions {
  std::string path;              // directory of this machine's tiers, absolute; made where it is missing
  std::string name;              // of this one below it: the worker's id, or its role; [A-Za-z0-9._-]+
  std::string fingerprint;       // of the model: records of another one are no hits
  BlockLayout layout;            // of the block's bytes
  std::string codec = "none";    // what the payloads are coded with
  size_t payload_bytes_max = 0;  // 0: the layout's block
  uint64_t bytes = 0;            // of the extent file; at least four records
  bool compress = false;         // blocks are stored in fewer bytes, without loss, where that is worth it
  uint64_t read_bytes_per_second = 0;   // 0: no limit
  uint64_t write_bytes_per_second = 0;  // 0: no limit
  uint64_t write_bytes_per_day = 0;     // by the wall clock's day, restarts included; 0: no limit
  absl::Duration slow_op = absl::Milliseconds(800);  // an operation of one record that takes longer: tier off
  absl::Duration read_timeout = absl::Seconds(2);    // of a read, where its caller would wait longer
  absl::Duration write_wait = absl::Seconds(2);      // of a store in the queue; then it is dropped
  size_t max_reads = 512;                            // waiting and under way
  size_t max_writes = 64;                            // waiting and under way
  size_t read_depth = 16;                            // under way at the disk
  size_t write_depth = 8;
  // While there are loads, stores may have this share of the loads' bytes.
  double write_share = 0.1;
  // A store uses an idle disk only after this long without a load: in the gaps of a request that loads block
  // by block it would delay the next one.
  absl::Duration read_quiet = absl::Milliseconds(10);
  absl::Duration probe_after = absl::Milliseconds(500);  // first look at a tier that is off; then doubled
  absl::Duration probe_after_max = absl::Seconds(15);
  absl::Duration close_wait = absl::Seconds(2);  // at the end: for operations that hang, then for the index
  absl::Duration lock_wait = absl::Seconds(1);   // for a process before us to be gone
  size_t max_tiers = 16;              // directories NAME, NAME-1, ... of workers with one name on one machine
  bool preallocate = true;            // false: the file grows as it is written, and a full disk shows later
  std::string eviction = "lru";       // one of PolicyNames()
  MetricRegistry* metrics = nullptr;  // required; outlives the tier
  // The disk under the extent file; the default is MakeDiskIo. Tests put faults here.
  std::function<absl::StatusOr<std::unique_ptr<DiskIo>>(size_t depth)> make_io;
  // Called on the index's thread before each change of the index; tests hang it.
  std::function<void()> before_index_change;
};

// DiskTier: blocks on a local disk. Driver with two threads: one moves bytes (direct I/O between extents of
// one preallocated file and buffers of its own, checksums, copies), the other owns the index (RocksDB: key to
// extent) and the directory; one to four more encode and decode payloads that lie encoded (plane_codec.h).
// Nothing of the disk is trusted: a block is returned only if the record read is
// whole and says that it is this key, of this model, layout and codec, at this place, of this write.
//
// An index that cannot be read is begun anew (the tier is a cache). What makes the tier unusable (a directory
// that cannot be written, in use by others, of another format, no room; I/O errors, slow operations) switches
// it off with a reason; it looks again by itself with growing pauses.
class DiskTier final : public BlockTier {
 public:
  // Returns at once; the directory is opened on the tier's thread (state kOpening). InvalidArgument: options
  // that no disk could serve.
  static absl::StatusOr<std::unique_ptr<DiskTier>> Create(DiskTierOptions options);
  // Waits for operations under way, as long as slow_op and close_wait allow; for the index as long as
  // close_wait. A disk or an index that hangs longer is left behind with its memory and its file, and its
  // thread ends when its call returns.
  ~DiskTier() override;

  Caps caps() const override;
  ReadId Read(const BlockKey& key, std::span<const int32_t> tokens, std::span<std::byte> dst,
              absl::Duration timeout, ReadDone done) override;
  bool CancelRead(ReadId id) override;
  void Write(const BlockInfo& info, std::span<const std::byte> payload, Done done) override;
  void Erase(const BlockKey& key, Done done) override;
  void EraseIf(Predicate matches, CountDone done) override;
  void Compress(const BlockKey& key, CompressDone done) override;
  std::optional<BlockKey> NextVictim(size_t payload_bytes) const override;
  bool Contains(const BlockKey& key) const override;
  std::optional<TierEntry> Find(const BlockKey& key) const override;
  Page List(uint64_t cursor, size_t max) const override;
  TierStats stats() const override;
  TierHealth health() const override;
  void SetObserver(TierObserver* observer) override;

  // The health once it is no longer kOpening, or after `timeout`.
  TierHealth WaitOpened(absl::Duration timeout) const;
  // Returns once no write and no change of the index is waiting (true), or after `timeout` (false).
  bool WaitIdle(absl::Duration timeout) const;
  // The directory in use; empty before one is.
  std::string directory() const;

 private:
  class Impl;
  explicit DiskTier(std::shared_ptr<Impl> impl);
  const std::shared_ptr<Impl> impl_;
};

// Tiers of this process whose thread had to be left behind in an index that hangs. A process where there are
// some has to end by _exit: RocksDB's own threads hang, too, and the end of its static objects waits for
// them.
int DiskTiersLeftBehind();

}  // namespace tidepool
