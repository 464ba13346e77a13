#pragma once

// The inside of DiskTier; for its own files only.

#include <sys/mman.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "kvstore/disk/coder_pool.h"
#include "kvstore/disk/disk_directory.h"
#include "kvstore/disk/disk_probe.h"
#include "kvstore/disk/disk_tier.h"
#include "kvstore/disk/extent_table.h"
#include "kvstore/disk/record.h"
#include "kvstore/disk/rocks_index.h"
#include "kvstore/disk/speed_meter.h"
#include "kvstore/disk/tier_breaker.h"
#include "kvstore/disk/token_bucket.h"
#include "kvstore/disk/write_gate.h"

namespace tidepool {

// Changes of the index in one batch, and beyond which no further stores start until they are written.
inline constexpr size_t kChangesPerBatch = 4096, kChangesMax = 16384;
// EraseIf calls waiting.
inline constexpr size_t kEraseTasksMax = 64;
// A batch of the index (a sync, a compaction that must come first) may take this many times slow_op.
inline constexpr int kSlowIndexOps = 10;
// Extents that List looks at in one go.
inline constexpr uint64_t kListStep = 1 << 16;
// Blocks to be compressed that may wait, and those that are being worked on.
inline constexpr size_t kRecodesMax = 64, kRecodeDepth = 2;
// How many times as long as a store a block waits to be compressed: nobody needs it soon.
inline constexpr int kRecodeWaits = 5;
// A store's weight in what is remembered of how far encoding shortens blocks.
inline constexpr double kCodedShareWeight = 0.1;
// A block whose encoding is longer than this share of it stays as it is.
inline constexpr double kWorthEncoding = 0.9;
// Extents that EraseIf looks at in one go, so that reads are not held up.
inline constexpr ExtentTable::Id kEraseStep = 4096;

inline uint64_t RandomNumber() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

inline uint32_t WallSeconds() { return static_cast<uint32_t>(absl::ToUnixSeconds(absl::Now())); }
inline uint32_t WallDay() { return WallSeconds() / 86400; }

inline uint64_t FirstEight(const Sha256Digest& digest) {
  uint64_t v;
  std::memcpy(&v, digest.data(), sizeof v);
  return v;
}

// AlignedMemory: pages for direct I/O, committed as they are touched. Handle.
class AlignedMemory {
 public:
  static absl::StatusOr<AlignedMemory> Make(size_t bytes) {
    void* p =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
      return absl::ResourceExhaustedError(
          absl::StrCat("disk tier: no memory for buffers of ", bytes, " bytes"));
    AlignedMemory out;
    out.memory_ = {static_cast<std::byte*>(p), bytes};
    return out;
  }
  AlignedMemory() = default;
  AlignedMemory(AlignedMemory&& other) noexcept : memory_(std::exchange(other.memory_, {})) {}
  AlignedMemory& operator=(AlignedMemory&& other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~AlignedMemory() {
    if (!memory_.empty()) munmap(memory_.data(), memory_.size());
  }
  std::span<std::byte> span() const { return memory_; }
  // The memory stays mapped for ever: somebody may still write to it.
  void Leak() { memory_ = {}; }

 private:
  std::span<std::byte> memory_;
};

class DiskTier::Impl : public std::enable_shared_from_this<DiskTier::Impl> {
 public:
  explicit Impl(DiskTierOptions options);
  ~Impl();
  absl::Status Start();
  // Ends both threads, or leaves the one behind that hangs in the index: it holds on to this object then.
  // Called once, last.
  void Close();

  Caps caps() const;
  ReadId Read(const BlockKey& key, std::span<const int32_t> tokens, std::span<std::byte> dst,
              absl::Duration timeout, ReadDone done);
  bool CancelRead(ReadId id);
  void Write(const BlockInfo& info, std::span<const std::byte> payload, Done done);
  void Erase(const BlockKey& key, Done done);
  void EraseIf(Predicate matches, CountDone done);
  void Compress(const BlockKey& key, CompressDone done);
  std::optional<BlockKey> NextVictim(size_t payload_bytes) const;
  bool Contains(const BlockKey& key) const;
  std::optional<TierEntry> Find(const BlockKey& key) const;
  Page List(uint64_t cursor, size_t max) const;
  TierStats stats() const;
  TierHealth health() const;
  void SetObserver(TierObserver* observer);
  TierHealth WaitOpened(absl::Duration timeout) const;
  bool WaitIdle(absl::Duration timeout) const;
  std::string directory() const;

 private:
  using Answer = std::function<void()>;
  using Id = ExtentTable::Id;
  static constexpr size_t kNoBuffer = ~size_t{0};

  static constexpr Id kNoExtent = ~Id{0};

  // What is to be written, and how.
  struct Stored {
    RecordEncoding encoding = RecordEncoding::kPlain;
    uint64_t bytes = 0;
    uint32_t crc = 0, payload_crc = 0;
  };
  struct Coding;

  // A read that was accepted and not answered; it leaves the table before it is answered.
  struct ReadCall {
    BlockKey key;
    std::vector<int32_t> tokens;
    std::span<std::byte> dst;
    absl::Time deadline;
    ReadDone done;
  };
  struct WriteCall {
    BlockInfo info;
    std::span<const std::byte> payload;
    std::vector<Done> dones;  // of everybody who asked for this key meanwhile
    absl::Time accepted;
    bool flying = false;
    bool erased = false;
    RecordStamp stamp;               // once it is flying
    std::shared_ptr<Coding> coding;  // where it is to be encoded
  };
  // A payload on its way into a buffer that is to be written, by a coder's thread. Guarded by mu_, but for
  // what the coder fills in while it is kRunning.
  struct Coding {
    enum class State : uint8_t { kWaiting, kRunning, kDone, kDropped } state = State::kWaiting;
    BlockKey key;
    std::span<const std::byte> payload;  // the caller's, until the state is kDone
    size_t buffer = kNoBuffer;
    std::vector<Answer> deferred;  // what was decided while it ran: the payload is in use until then
    Stored stored;
  };
  // A block that is to be encoded where it lies. The I/O thread's, but for `key`, `done` and `accepted`.
  struct Recode {
    enum class Stage : uint8_t { kQueued, kReading, kCoding, kCoded, kWriting } stage = Stage::kQueued;
    BlockKey key;
    CompressDone done;  // null once it was answered
    absl::Time accepted;
    Id extent = kNoExtent;  // pinned, from kReading on
    Id fresh = kNoExtent;   // in kWriting
    size_t from = kNoBuffer, to = kNoBuffer;
    uint64_t before = 0;  // bytes of the record
    RecordStamp stamp, fresh_stamp;
    absl::Status status;  // of coding
    RecordHeader header;
    Stored stored;
  };
  enum class FlightKind : uint8_t { kRead, kWrite, kProbeWrite, kProbeRead, kRecodeRead, kRecodeWrite };
  // An operation at the disk. It outlives the call that it is for: the call may be answered before it ends.
  struct Flight {
    FlightKind kind;
    Id extent = 0;
    uint64_t offset = 0;
    size_t buffer = kNoBuffer;
    size_t bytes = 0;
    uint64_t payload_bytes = 0;  // of a read
    RecordEncoding encoding = RecordEncoding::kPlain;
    uint32_t version = kRecordVersion;
    absl::Time started;
    ReadId read = 0;      // 0: nobody waits any more
    bool wanted = false;  // of a write: its call is still there
    BlockKey key;
    RecordStamp stamp;
    std::shared_ptr<Recode> recode;
  };
  // A read that the disk has done and nobody has looked at.
  struct Arrived {
    Flight flight;
    absl::Duration latency;
  };
  // What the index thread is to do.
  struct IndexChange {
    std::optional<RocksIndex::Change> change;
    Done done;  // of an erasure: once this and all before it are on the disk
  };
  struct EraseTask {
    Predicate matches;
    CountDone done;
  };
  struct Event {
    enum class Kind : uint8_t { kStored, kRemoved, kHealth } kind;
    BlockInfo info;  // of kRemoved: the key only
    TierRemoval why = TierRemoval::kEvicted;
    TierHealth health;
  };

  static uint64_t PageOffset(uint64_t page) { return kDiskPageBytes * (1 + page); }
  uint32_t record_pages() const { return static_cast<uint32_t>(record_bytes_ / kDiskPageBytes); }
  std::span<std::byte> Buffer(size_t i) const {
    return buffers_.span().subspan(i * record_bytes_, record_bytes_);
  }
  absl::Time Now() const { return Clock::Real().Now(); }

  // The thread that moves bytes.
  void RunIo();
  void Harvest(absl::Duration wait);
  void OnCompletion(uint64_t tag, int error);
  void OnReadDone(const Flight& flight, int error);
  void AnswerRead(const Arrived& arrived);
  void OnWriteDone(const Flight& flight, int error);
  void OnProbeDone(const Flight& flight, int error);
  void Expire(absl::Time now, std::vector<Answer>& answers);
  void CheckSlow(absl::Time now, std::vector<Answer>& answers);
  void StartReads(absl::Time now, std::vector<Answer>& answers);
  void StartWrites(absl::Time now, std::vector<Answer>& answers);
  void StartProbe(absl::Time now);
  absl::Duration NextWake(absl::Time now) const;
  void Launch(const Flight& flight, std::span<std::byte> memory);
  void SwitchOff(Counter& fault, std::string reason, std::vector<Answer>& answers);
  void SwitchOn();
  void AnswerAll(const absl::Status& status, std::vector<Answer>& answers);
  void Run(std::vector<Answer>& answers);
  absl::StatusOr<RecordHeader> TakeHeader(const Flight& flight) const;
  absl::Status CheckCall(const RecordHeader& header, const ReadCall& call) const;
  // Answers a read. On the I/O thread, or (`coder`) on a coder's.
  void FinishRead(const Flight& flight, ReadCall call, absl::StatusOr<Record> record, bool coder);

  // Encoding and decoding (disk_tier_coding.cc). On the I/O thread, but for Encode and what it hands to a
  // coder.
  void TakeBack();
  void StartCoding(std::vector<Answer>& answers);
  void StartRecodes(absl::Time now, std::vector<Answer>& answers);
  void StartRecodeReads(absl::Time now, std::vector<Answer>& answers);
  void StartRecodeWrite(absl::Time now, const std::shared_ptr<Recode>& recode, std::vector<Answer>& answers);
  void OnRecodeRead(const Flight& flight, int error);
  void OnRecodeWrite(const Flight& flight, int error);
  void EndRecode(const std::shared_ptr<Recode>& recode, absl::StatusOr<Compressed> answer,
                 std::vector<Answer>& answers);
  Stored Encode(PlaneCodec& codec, std::span<const std::byte> payload, std::span<std::byte> area) const;
  void RunRecode(PlaneCodec& codec, const Flight& flight) const;
  void RunCoding(PlaneCodec& codec, const std::shared_ptr<Coding>& coding);
  // Answers a store that leaves writes_, and gives its buffer back; holds mu_.
  void AnswerWrite(WriteCall call, std::function<absl::Status()> status, std::vector<Answer>& answers);
  void WriteFailed(Id extent, int error, std::vector<Answer>& answers);
  std::optional<Id> Allocate(uint64_t record_bytes);
  absl::Status SealRecord(const RecordHeader& header, std::span<std::byte> memory) const;
  void AnswerRecode(Recode& recode, absl::StatusOr<Compressed> answer, std::vector<Answer>& answers);
  RecordHeader HeaderOf(const BlockInfo& info, Id extent, uint64_t payload_bytes, const Stored& stored,
                        RecordStamp stamp) const;

  // The thread that owns the index.
  void RunIndex();
  absl::Status Open();
  void OpenFailed(std::unique_lock<std::mutex>& lock, const absl::Status& status);
  absl::StatusOr<std::unique_ptr<ExtentTable>> LoadIndex(WrittenToday& written);
  void ReopenIndex(std::unique_lock<std::mutex>& lock);
  void ApplyChanges(std::unique_lock<std::mutex>& lock);
  void RunErase(std::unique_lock<std::mutex>& lock, EraseTask task);
  void FailIndex(const absl::Status& status, std::vector<Answer>& answers);

  void RemoveBlock(Id id, TierRemoval why, Counter& counter);
  void Drop(WriteCall call, Counter& why, std::string_view text, std::vector<Answer>& answers);
  void DeliverEvents();
  void UpdateGauges();
  void WakeIo() {
    if (io_ != nullptr) io_->Wake();
  }

  const DiskTierOptions options_;
  const Sha256Digest space_;
  const std::string layout_;
  const size_t header_bytes_;
  const size_t payload_bytes_max_;
  const size_t record_bytes_;
  const Id extents_;
  const uint64_t run_;  // of this run's stamps
  DiskProbe probe_;
  AlignedMemory buffers_;
  std::unique_ptr<DiskIo> io_;  // the I/O thread's, but for Wake
  std::unique_ptr<CoderPool> coders_;

  mutable std::mutex mu_;  // guards everything below, down to the observer
  mutable std::condition_variable changed_;
  bool stop_ = false;
  bool stop_index_ = false;
  TierBreaker breaker_;
  std::unique_ptr<ExtentTable> table_;  // once opened
  std::optional<WriteGate> gate_;
  std::string directory_path_;
  int fd_ = -1;
  uint64_t next_serial_ = 0;
  ReadId next_read_ = 0;
  absl::flat_hash_map<ReadId, ReadCall> reads_;
  std::deque<ReadId> read_queue_;  // may name reads that are gone
  size_t reads_flying_ = 0;
  absl::flat_hash_map<BlockKey, WriteCall> writes_;
  std::deque<BlockKey> write_queue_;
  size_t writes_flying_ = 0;
  absl::Time write_at_ = absl::InfiniteFuture();  // when the gate is to be asked again
  std::optional<TokenBucket> read_bucket_;
  absl::Time read_at_ = absl::InfiniteFuture();  // when the bucket is to be asked again
  std::deque<BlockKey> code_queue_;              // stores to be encoded before they are in write_queue_
  size_t writes_coded_ = 0;               // being encoded, or encoded and not flying: each has a buffer
  size_t decoding_ = 0;                   // reads that left reads_ and are not answered
  std::vector<size_t> returned_buffers_;  // from coders, for the I/O thread
  std::deque<std::shared_ptr<Recode>> recode_queue_;
  std::vector<std::shared_ptr<Recode>> recodes_;  // being worked on
  double coded_share_ = 0;  // what encoding lately left of a store; 0: none was encoded yet
  SpeedMeter read_speed_, write_speed_;
  Id suspect_ = kNoExtent;  // where a write found no space: what a probe has to write to
  bool probing_ = false;
  std::deque<IndexChange> changes_;
  std::deque<EraseTask> erase_tasks_;
  std::vector<IndexChange> applying_;  // with the index now
  std::optional<EraseTask> erasing_;   // the same
  bool file_in_use_ = false;           // at the end: operations go on in it
  bool index_ended_ = false;
  bool abandoned_ = false;  // the tier is gone, the index's thread is not: it touches nothing but this object
  bool index_busy_ = false;
  absl::Time index_busy_since_;
  bool index_failed_ = false;
  bool reopen_index_ = false;
  std::string index_fault_;  // for the I/O thread to switch off with
  absl::Time open_at_ = absl::InfinitePast();

  mutable std::mutex observer_mu_;  // taken before mu_; held while the observer is called
  TierObserver* observer_ = nullptr;
  std::deque<Event> events_;  // guarded by mu_

  // The I/O thread's own.
  absl::flat_hash_map<uint64_t, Flight> flights_;
  uint64_t next_tag_ = 0;
  std::deque<Arrived> arrived_;
  std::vector<size_t> free_buffers_;
  AlignedMemory probe_page_;
  std::vector<std::byte> probe_bytes_;

  // The index thread's own.
  std::optional<DiskDirectory> directory_;
  std::unique_ptr<RocksIndex> index_;

  std::thread io_thread_, index_thread_;
};

}  // namespace tidepool
