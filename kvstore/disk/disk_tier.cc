#include "kvstore/disk/disk_tier.h"

#include <errno.h>
#include <sys/mman.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <optional>
#include <random>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/rng.h"
#include "base/status.h"
#include "kvstore/disk/crc32c.h"
#include "kvstore/disk/disk_directory.h"
#include "kvstore/disk/disk_probe.h"
#include "kvstore/disk/extent_table.h"
#include "kvstore/disk/record.h"
#include "kvstore/disk/rocks_index.h"
#include "kvstore/disk/speed_meter.h"
#include "kvstore/disk/tier_breaker.h"
#include "kvstore/disk/write_gate.h"
#include "kvstore/policy/policy.h"

namespace tidepool {
namespace {

// Changes of the index in one batch, and beyond which no further stores start until they are written.
constexpr size_t kChangesPerBatch = 4096, kChangesMax = 16384;
// EraseIf calls waiting.
constexpr size_t kEraseTasksMax = 64;
// A batch of the index (a sync, a compaction that must come first) may take this many times slow_op.
constexpr int kSlowIndexOps = 10;
// Extents that List looks at in one go.
constexpr uint64_t kListStep = 1 << 16;
// Extents that EraseIf looks at in one go, so that reads are not held up.
constexpr ExtentTable::Id kEraseStep = 4096;

uint64_t RandomNumber() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

uint32_t WallSeconds() { return static_cast<uint32_t>(absl::ToUnixSeconds(absl::Now())); }
uint32_t WallDay() { return WallSeconds() / 86400; }

uint64_t FirstEight(const Sha256Digest& digest) {
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

}  // namespace

class DiskTier::Impl {
 public:
  explicit Impl(DiskTierOptions options);
  ~Impl();
  absl::Status Start();

  Caps caps() const;
  ReadId Read(const BlockKey& key, std::span<const int32_t> tokens, std::span<std::byte> dst,
              absl::Duration timeout, ReadDone done);
  bool CancelRead(ReadId id);
  void Write(const BlockInfo& info, std::span<const std::byte> payload, Done done);
  void Erase(const BlockKey& key, Done done);
  void EraseIf(Predicate matches, CountDone done);
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
    RecordStamp stamp;  // once it is flying
  };
  enum class FlightKind : uint8_t { kRead, kWrite, kProbeWrite, kProbeRead };
  // An operation at the disk. It outlives the call that it is for: the call may be answered before it ends.
  struct Flight {
    FlightKind kind;
    Id extent = 0;
    size_t buffer = kNoBuffer;
    size_t bytes = 0;
    absl::Time started;
    ReadId read = 0;      // 0: nobody waits any more
    bool wanted = false;  // of a write: its call is still there
    BlockKey key;
    RecordStamp stamp;
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

  static constexpr Id kNoExtent = ~Id{0};

  uint64_t ExtentOffset(Id id) const { return kDiskPageBytes + uint64_t{id} * record_bytes_; }
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
  void Launch(const Flight& flight, std::span<std::byte> memory, uint64_t offset);
  void SwitchOff(Counter& fault, std::string reason, std::vector<Answer>& answers);
  void SwitchOn();
  void AnswerAll(const absl::Status& status, std::vector<Answer>& answers);
  void Run(std::vector<Answer>& answers);
  absl::StatusOr<Record> TakeRecord(const Flight& flight, const ReadCall& call) const;

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
  SpeedMeter read_speed_, write_speed_;
  Id suspect_ = kNoExtent;  // where a write found no space: what a probe has to write to
  bool probing_ = false;
  std::deque<IndexChange> changes_;
  std::deque<EraseTask> erase_tasks_;
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

DiskTier::Impl::Impl(DiskTierOptions options)
    : options_(std::move(options)),
      space_(RecordSpace(options_.fingerprint, options_.layout, options_.codec)),
      layout_(options_.layout.ToString()),
      header_bytes_(RecordHeaderBytes(options_.layout.block_tokens)),
      payload_bytes_max_(options_.payload_bytes_max != 0 ? options_.payload_bytes_max
                                                         : options_.layout.block_bytes()),
      record_bytes_(RecordBytes(header_bytes_, payload_bytes_max_)),
      extents_(static_cast<Id>(std::min<uint64_t>(
          (std::max<uint64_t>(options_.bytes, kDiskPageBytes) - kDiskPageBytes) / record_bytes_,
          std::numeric_limits<Id>::max() - 1))),
      run_(RandomNumber()),
      probe_(*options_.metrics),
      breaker_({.probe_after = options_.probe_after, .probe_after_max = options_.probe_after_max}) {}

absl::Status DiskTier::Impl::Start() {
  if (extents_ < 4)
    return absl::InvalidArgumentError(absl::StrCat("kv.disk.bytes: ", options_.bytes, " holds ", extents_,
                                                   " records of ", record_bytes_, " bytes; at least ",
                                                   4 * record_bytes_ + kDiskPageBytes, " are needed"));
  const size_t depth = options_.read_depth + options_.write_depth;
  // Half as many again for what has arrived and is not copied yet.
  const size_t buffers = depth + (options_.read_depth + 1) / 2;
  TP_ASSIGN_OR_RETURN(buffers_, AlignedMemory::Make(buffers * record_bytes_));
  TP_ASSIGN_OR_RETURN(probe_page_, AlignedMemory::Make(record_bytes_));
  for (size_t i = buffers; i > 0; --i) free_buffers_.push_back(i - 1);
  TP_ASSIGN_OR_RETURN(io_, options_.make_io ? options_.make_io(depth + 1) : MakeDiskIo(depth + 1));
  probe_.SetState(TierState::kOpening);
  probe_.capacity.Set(static_cast<double>(uint64_t{extents_} * record_bytes_));
  io_thread_ = std::thread([this] { RunIo(); });
  index_thread_ = std::thread([this] { RunIndex(); });
  return absl::OkStatus();
}

DiskTier::Impl::~Impl() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  WakeIo();
  if (io_thread_.joinable()) io_thread_.join();
  {
    std::lock_guard lock(mu_);
    stop_index_ = true;
  }
  changed_.notify_all();
  if (index_thread_.joinable()) index_thread_.join();
  if (!flights_.empty()) {
    spdlog::warn("disk tier: {} operations did not end; their buffers are left behind", flights_.size());
    buffers_.Leak();
    probe_page_.Leak();
  }
}

// ---------------------------------------------------------------------------------------------------------
// Calls.

BlockTier::Caps DiskTier::Impl::caps() const {
  return {.name = "disk",
          .block_bytes = payload_bytes_max_,
          .capacity_bytes = uint64_t{extents_} * record_bytes_,
          .max_reads = options_.max_reads,
          .max_writes = options_.max_writes,
          .survives_restart = true};
}

BlockTier::ReadId DiskTier::Impl::Read(const BlockKey& key, std::span<const int32_t> tokens,
                                       std::span<std::byte> dst, absl::Duration timeout, ReadDone done) {
  const absl::Time now = Now();
  absl::Status refused;
  ReadId id = 0;
  {
    std::lock_guard lock(mu_);
    const Id extent = table_ == nullptr ? kNoExtent : table_->Find(key).value_or(kNoExtent);
    if (timeout <= absl::ZeroDuration()) {
      probe_.read_timeout.Add();
      refused = absl::DeadlineExceededError("disk tier: no time left for a read");
    } else if (breaker_.health().state == TierState::kOff || stop_) {
      probe_.read_unavailable.Add();
      refused = absl::UnavailableError(absl::StrCat("disk tier is off: ", breaker_.health().reason));
    } else if (extent == kNoExtent) {
      probe_.read_miss.Add();
      refused = absl::NotFoundError("disk tier: no such block");
    } else if (dst.size() < table_->payload_bytes(extent)) {
      refused = absl::InvalidArgumentError(absl::StrCat(
          "disk tier: buffer of ", dst.size(), " bytes, the block has ", table_->payload_bytes(extent)));
    } else if (reads_.size() >= options_.max_reads) {
      probe_.read_full.Add();
      refused =
          absl::ResourceExhaustedError(absl::StrCat("disk tier: ", options_.max_reads, " reads are waiting"));
    } else {
      id = ++next_read_;
      reads_.emplace(id, ReadCall{key,
                                  {tokens.begin(), tokens.end()},
                                  dst,
                                  now + std::min(timeout, options_.read_timeout),
                                  std::move(done)});
      read_queue_.push_back(id);
    }
  }
  if (id == 0) {
    done(std::move(refused));
  } else {
    WakeIo();
  }
  return id;
}

bool DiskTier::Impl::CancelRead(ReadId id) {
  ReadDone done;
  {
    std::lock_guard lock(mu_);
    const auto it = reads_.find(id);
    if (it == reads_.end()) return false;
    done = std::move(it->second.done);
    reads_.erase(it);  // its flight, if any, finds nobody
    probe_.read_cancelled.Add();
  }
  done(absl::CancelledError("disk tier: the read is not wanted any more"));
  return true;
}

void DiskTier::Impl::Write(const BlockInfo& info, std::span<const std::byte> payload, Done done) {
  absl::Status answer;
  bool accepted = false;
  {
    std::lock_guard lock(mu_);
    const auto present = writes_.find(info.key);
    if (payload.empty() || payload.size() > payload_bytes_max_) {
      probe_.write_invalid.Add();
      answer = absl::InvalidArgumentError(absl::StrCat("disk tier: payload of ", payload.size(),
                                                       " bytes, a record holds 1 to ", payload_bytes_max_));
    } else if (info.tokens.size() > options_.layout.block_tokens ||
               info.tenant.size() > kRecordTenantBytesMax || !std::isfinite(info.compute_seconds)) {
      probe_.write_invalid.Add();
      answer = absl::InvalidArgumentError(
          absl::StrCat("disk tier: ", info.tokens.size(), " tokens and a tenant of ", info.tenant.size(),
                       " bytes; a record holds ", options_.layout.block_tokens, " and ",
                       kRecordTenantBytesMax, ", and its compute time is a number"));
    } else if (!breaker_.on() || stop_) {
      probe_.write_unavailable.Add();
      answer = absl::UnavailableError(absl::StrCat("disk tier is ",
                                                   std::string(TierStateName(breaker_.health().state)), ": ",
                                                   breaker_.health().reason));
    } else if (table_->Find(info.key).has_value()) {
      probe_.write_duplicate.Add();
    } else if (present != writes_.end() && !present->second.erased) {
      present->second.dones.push_back(std::move(done));
      accepted = true;
    } else if (present != writes_.end()) {
      // One that EraseIf met is on its way out; it does not carry another's bytes.
      probe_.write_dropped.Add();
      probe_.dropped_queue.Add();
      answer = absl::ResourceExhaustedError("disk tier: the block is being erased; store it again later");
    } else if (writes_.size() >= options_.max_writes) {
      probe_.write_dropped.Add();
      probe_.dropped_queue.Add();
      answer = absl::ResourceExhaustedError(
          absl::StrCat("disk tier: ", options_.max_writes, " stores are waiting"));
    } else {
      WriteCall call{info, payload, {}, Now()};
      call.dones.push_back(std::move(done));
      writes_.emplace(info.key, std::move(call));
      write_queue_.push_back(info.key);
      write_at_ = absl::InfinitePast();
      accepted = true;
    }
  }
  if (accepted) {
    WakeIo();
  } else {
    done(std::move(answer));
  }
}

void DiskTier::Impl::Erase(const BlockKey& key, Done done) {
  absl::Status refused;
  {
    std::lock_guard lock(mu_);
    if (!breaker_.on() || stop_) {
      refused = absl::UnavailableError("disk tier is off or opening: nothing can be erased");
    } else if (index_failed_) {
      refused = absl::UnavailableError("disk tier: its index has failed: nothing can be erased");
    } else if (changes_.size() >= 2 * kChangesMax) {
      refused = absl::ResourceExhaustedError("disk tier: too many changes of the index are waiting");
    } else {
      if (const auto extent = table_->Find(key)) {
        table_->Remove(*extent);
        probe_.evicted_erased.Add();
        events_.push_back({.kind = Event::Kind::kRemoved, .info = {.key = key}, .why = TierRemoval::kErased});
      }
      if (const auto write = writes_.find(key); write != writes_.end()) write->second.erased = true;
      // Also where memory knows nothing: the removal of a block that was evicted may not be written yet.
      changes_.push_back({RocksIndex::Change{key, std::nullopt}, std::move(done)});
      UpdateGauges();
    }
  }
  if (!refused.ok()) {
    done(std::move(refused));
    return;
  }
  DeliverEvents();
  changed_.notify_all();
}

void DiskTier::Impl::EraseIf(Predicate matches, CountDone done) {
  absl::Status refused;
  {
    std::lock_guard lock(mu_);
    if (!breaker_.on() || stop_) {
      refused = absl::UnavailableError("disk tier is off or opening: nothing can be erased");
    } else if (index_failed_) {
      refused = absl::UnavailableError("disk tier: its index has failed: nothing can be erased");
    } else if (erase_tasks_.size() >= kEraseTasksMax) {
      refused = absl::ResourceExhaustedError("disk tier: too many erasures are waiting");
    } else {
      for (auto& [key, call] : writes_) {
        const BlockInfo& i = call.info;
        if (matches({.key = key,
                     .parent = i.parent,
                     .tenant = i.tenant,
                     .session = i.session,
                     .turn = i.turn,
                     .position = i.position,
                     .bytes = call.payload.size()})) {
          call.erased = true;
        }
      }
      erase_tasks_.push_back({std::move(matches), std::move(done)});
    }
  }
  if (!refused.ok()) {
    done(std::move(refused));
    return;
  }
  WakeIo();
  changed_.notify_all();
}

bool DiskTier::Impl::Contains(const BlockKey& key) const {
  std::lock_guard lock(mu_);
  return breaker_.on() && table_->Find(key).has_value();
}

std::optional<TierEntry> DiskTier::Impl::Find(const BlockKey& key) const {
  std::lock_guard lock(mu_);
  if (!breaker_.on()) return std::nullopt;
  const auto extent = table_->Find(key);
  if (!extent.has_value()) return std::nullopt;
  return table_->Listed(*extent);
}

BlockTier::Page DiskTier::Impl::List(uint64_t cursor, size_t max) const {
  // Extents are the cursor: an entry that stays keeps its place.
  std::lock_guard lock(mu_);
  Page page;
  if (!breaker_.on()) return page;
  for (uint64_t id = cursor; id < table_->size(); ++id) {
    // Not even a nearly empty table is walked in one go: reads wait for the lock.
    const bool enough = page.entries.size() == max || id - cursor == kListStep;
    if (!enough && !table_->live(static_cast<Id>(id))) continue;
    if (enough) {
      page.next = id;
      break;
    }
    page.entries.push_back(table_->Listed(static_cast<Id>(id)));
  }
  return page;
}

TierStats DiskTier::Impl::stats() const {
  std::lock_guard lock(mu_);
  TierStats out;
  out.health = breaker_.health();
  out.capacity_bytes = uint64_t{extents_} * record_bytes_;
  if (table_ != nullptr) {
    out.bytes = table_->live_count() * record_bytes_;
    out.blocks = table_->live_count();
  }
  out.reads_waiting = reads_.size();
  out.writes_waiting = writes_.size();
  out.read = read_speed_.speed();
  out.write = write_speed_.speed();
  return out;
}

TierHealth DiskTier::Impl::health() const {
  std::lock_guard lock(mu_);
  return breaker_.health();
}

void DiskTier::Impl::SetObserver(TierObserver* observer) {
  std::lock_guard observer_lock(observer_mu_);
  std::lock_guard lock(mu_);
  observer_ = observer;
  events_.clear();  // what was before it is none of its business
}

TierHealth DiskTier::Impl::WaitOpened(absl::Duration timeout) const {
  std::unique_lock lock(mu_);
  changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                    [&] { return breaker_.health().state != TierState::kOpening; });
  return breaker_.health();
}

bool DiskTier::Impl::WaitIdle(absl::Duration timeout) const {
  std::unique_lock lock(mu_);
  return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [&] {
    return writes_.empty() && changes_.empty() && erase_tasks_.empty() && !index_busy_;
  });
}

std::string DiskTier::Impl::directory() const {
  std::lock_guard lock(mu_);
  return directory_path_;
}

// ---------------------------------------------------------------------------------------------------------
// What both threads do.

void DiskTier::Impl::DeliverEvents() {
  std::lock_guard observer_lock(observer_mu_);
  std::deque<Event> events;
  {
    std::lock_guard lock(mu_);
    events.swap(events_);
  }
  if (observer_ == nullptr) return;
  for (const Event& event : events) {
    switch (event.kind) {
      case Event::Kind::kStored:
        observer_->OnStored(event.info);
        break;
      case Event::Kind::kRemoved:
        observer_->OnRemoved(event.info.key, event.why);
        break;
      case Event::Kind::kHealth:
        observer_->OnHealth(event.health);
        break;
    }
  }
}

void DiskTier::Impl::UpdateGauges() {
  probe_.objects.Set(static_cast<double>(table_->live_count()));
  probe_.bytes.Set(static_cast<double>(table_->live_count() * record_bytes_));
  probe_.reads_waiting.Set(static_cast<double>(reads_.size()));
  probe_.writes_waiting.Set(static_cast<double>(writes_.size()));
}

void DiskTier::Impl::RemoveBlock(Id id, TierRemoval why, Counter& counter) {
  const BlockKey key = table_->Entry(id).key;
  table_->Remove(id);
  counter.Add();
  changes_.push_back({RocksIndex::Change{key, std::nullopt}, nullptr});
  events_.push_back({.kind = Event::Kind::kRemoved, .info = {.key = key}, .why = why});
}

// ---------------------------------------------------------------------------------------------------------
// The thread that moves bytes.

void DiskTier::Impl::Run(std::vector<Answer>& answers) {
  if (!answers.empty()) DeliverEvents();  // whoever is answered may rely on what the observer was told
  for (const Answer& answer : answers) answer();
  answers.clear();
}

void DiskTier::Impl::RunIo() {
  std::vector<Answer> answers;
  bool attached = false;
  absl::Duration wait = absl::ZeroDuration();
  absl::Time stop_by = absl::InfiniteFuture();
  while (true) {
    // Ages are judged by the time before completions were taken: after a pause of the whole process (a
    // debugger, a suspended machine) what has ended meanwhile is not late.
    const absl::Time before = Now();
    Harvest(wait);
    {
      std::unique_lock lock(mu_);
      if (fd_ >= 0 && !attached) {
        io_->Attach(fd_);
        attached = true;
        SwitchOn();
      }
      if (stop_ && stop_by == absl::InfiniteFuture()) {
        stop_by = before + options_.slow_op;
        AnswerAll(absl::UnavailableError("disk tier: it is being closed"), answers);
      }
      if (stop_ && (flights_.empty() || before >= stop_by)) {
        lock.unlock();
        Run(answers);
        return;
      }
      if (!index_fault_.empty()) {
        SwitchOff(probe_.fault_index, std::exchange(index_fault_, {}), answers);
      }
      CheckSlow(before, answers);
      Expire(Now(), answers);
    }
    Run(answers);
    if (attached) {
      const absl::Time now = Now();
      StartReads(now, answers);
      StartWrites(now, answers);
      StartProbe(now);
      Run(answers);
      // One at a time, and only now: the disk has its next work before anything is copied.
      if (!arrived_.empty()) {
        const Arrived arrived = arrived_.front();
        arrived_.pop_front();
        AnswerRead(arrived);
      }
    }
    DeliverEvents();
    std::lock_guard lock(mu_);
    if (table_ != nullptr) UpdateGauges();
    wait = NextWake(Now());
    if (writes_.empty()) changed_.notify_all();
  }
}

absl::Duration DiskTier::Impl::NextWake(absl::Time now) const {
  if (!arrived_.empty()) return absl::ZeroDuration();
  // Deadlines and slow operations are looked at this often, whatever else happens.
  absl::Duration wait = absl::Milliseconds(flights_.empty() && reads_.empty() && writes_.empty() ? 500 : 50);
  if (breaker_.health().state == TierState::kOff && table_ != nullptr && flights_.empty() && !reopen_index_ &&
      !index_busy_)
    wait = std::min(wait, breaker_.next_probe() - now);
  if (!writes_.empty()) wait = std::min(wait, write_at_ - now);
  return std::max(wait, absl::ZeroDuration());
}

void DiskTier::Impl::Harvest(absl::Duration wait) {
  std::vector<DiskIo::Completion> done;
  io_->Wait(wait, done);
  for (const DiskIo::Completion& c : done) OnCompletion(c.tag, c.error);
}

void DiskTier::Impl::Launch(const Flight& flight, std::span<std::byte> memory, uint64_t offset) {
  const uint64_t tag = ++next_tag_;
  flights_.emplace(tag, flight);
  const bool write = flight.kind == FlightKind::kWrite || flight.kind == FlightKind::kProbeWrite;
  io_->Submit({.write = write, .offset = offset, .buffer = memory, .tag = tag});
}

void DiskTier::Impl::OnCompletion(uint64_t tag, int error) {
  const auto node = flights_.extract(tag);
  if (node.empty()) return;
  const Flight& flight = node.mapped();
  switch (flight.kind) {
    case FlightKind::kRead:
      OnReadDone(flight, error);
      break;
    case FlightKind::kWrite:
      OnWriteDone(flight, error);
      break;
    case FlightKind::kProbeWrite:
    case FlightKind::kProbeRead:
      OnProbeDone(flight, error);
      break;
  }
}

void DiskTier::Impl::StartReads(absl::Time now, std::vector<Answer>& answers) {
  while (true) {
    Flight flight{.kind = FlightKind::kRead};
    {
      std::lock_guard lock(mu_);
      if (!read_queue_.empty() || reads_flying_ > 0) gate_->OnReadsActive(now);
      // Buffers of late operations may still be out.
      if (!breaker_.on() || reads_flying_ >= options_.read_depth || read_queue_.empty() ||
          free_buffers_.empty())
        return;
      const auto it = reads_.find(read_queue_.front());
      flight.read = read_queue_.front();
      read_queue_.pop_front();
      if (it == reads_.end()) continue;
      const auto extent = table_->Find(it->second.key);
      if (!extent.has_value()) {  // evicted or erased since the read was accepted
        probe_.read_miss.Add();
        answers.push_back(
            [done = std::move(it->second.done)] { done(absl::NotFoundError("disk tier: no such block")); });
        reads_.erase(it);
        continue;
      }
      flight.extent = *extent;
      flight.key = it->second.key;
      flight.stamp = table_->stamp(*extent);
      flight.bytes = RecordBytes(header_bytes_, table_->payload_bytes(*extent));
      flight.started = now;
      flight.buffer = free_buffers_.back();
      free_buffers_.pop_back();
      table_->Pin(*extent);
      ++reads_flying_;
      read_speed_.OnStart(now);
    }
    Launch(flight, Buffer(flight.buffer).first(flight.bytes), ExtentOffset(flight.extent));
  }
}

// What was read, if it is what the index said and the caller asked for. DataLoss: it is damaged. NotFound: it
// is whole, but another write's, model's, or of other tokens.
absl::StatusOr<BlockTier::Record> DiskTier::Impl::TakeRecord(const Flight& flight,
                                                             const ReadCall& call) const {
  const std::span<const std::byte> memory = Buffer(flight.buffer).first(flight.bytes);
  TP_ASSIGN_OR_RETURN(RecordHeader header, DecodeRecordHeader(memory.first(header_bytes_)));
  if (header.stamp != flight.stamp || header.extent != flight.extent || header.space != space_ ||
      header.info.key != call.key) {
    return absl::NotFoundError("the record is of another write");
  }
  if (header.payload_bytes == 0 || header.payload_bytes > memory.size() - header_bytes_)
    return absl::DataLossError("the payload's length is impossible");
  if (!call.tokens.empty() && header.info.tokens != call.tokens)
    return absl::NotFoundError("the record is of other tokens");
  if (header.payload_bytes > call.dst.size())
    return absl::InvalidArgumentError(absl::StrCat("disk tier: buffer of ", call.dst.size(),
                                                   " bytes, the block has ", header.payload_bytes));
  const auto payload = memory.subspan(header_bytes_, header.payload_bytes);
  if (Crc32cCopy(call.dst, payload) != header.payload_crc)
    return absl::DataLossError("the payload's checksum differs");
  return Record{std::move(header.info), payload.size()};
}

void DiskTier::Impl::OnReadDone(const Flight& flight, int error) {
  const absl::Time now = Now();
  const absl::Duration latency = now - flight.started;
  std::vector<Answer> answers;
  {
    std::lock_guard lock(mu_);
    --reads_flying_;
    read_speed_.OnEnd(error == 0 ? flight.bytes : 0, latency, now);
    gate_->OnReadDone(flight.bytes, now);
    write_at_ = absl::InfinitePast();
    table_->Unpin(flight.extent);
    if (error != 0) {
      if (table_->live(flight.extent) && table_->stamp(flight.extent) == flight.stamp)
        RemoveBlock(flight.extent, TierRemoval::kDamaged, probe_.evicted_damaged);
      SwitchOff(probe_.fault_io,
                absl::StrCat(directory_path_, ": reading failed: ", std::generic_category().message(error)),
                answers);
    }
  }
  if (error == 0) {
    arrived_.push_back({flight, latency});
  } else {
    free_buffers_.push_back(flight.buffer);
    Run(answers);
  }
}

// Checks and copies what the disk has brought, if somebody still wants it.
void DiskTier::Impl::AnswerRead(const Arrived& arrived) {
  const Flight& flight = arrived.flight;
  std::optional<ReadCall> call;
  {
    std::lock_guard lock(mu_);
    if (const auto it = reads_.find(flight.read); it != reads_.end()) {
      // From here on the read cannot be cancelled: the bytes are being copied.
      call = std::move(it->second);
      reads_.erase(it);
    }
  }
  if (!call.has_value()) {
    free_buffers_.push_back(flight.buffer);
    return;
  }
  probe_.read_seconds.Observe(absl::ToDoubleSeconds(arrived.latency));
  probe_.read_bytes.Add(flight.bytes);
  auto record = TakeRecord(flight, *call);
  free_buffers_.push_back(flight.buffer);
  {
    std::lock_guard lock(mu_);
    const bool same = table_->live(flight.extent) && table_->stamp(flight.extent) == flight.stamp;
    if (record.ok()) {
      probe_.read_hit.Add();
      if (same) table_->Touch(flight.extent);
    } else if (absl::IsDataLoss(record.status())) {
      probe_.read_damaged.Add();
      spdlog::warn("disk tier: {}: block {} at {}: {}", directory_path_, call->key.ToHex(),
                   ExtentOffset(flight.extent), std::string(record.status().message()));
      if (same) RemoveBlock(flight.extent, TierRemoval::kDamaged, probe_.evicted_damaged);
    } else if (absl::IsNotFound(record.status())) {
      probe_.read_mismatch.Add();
      if (same) RemoveBlock(flight.extent, TierRemoval::kDamaged, probe_.evicted_mismatch);
    }
  }
  DeliverEvents();  // whoever is answered may rely on what the observer was told
  call->done(std::move(record));
  changed_.notify_all();
}

void DiskTier::Impl::Drop(WriteCall call, Counter& why, std::string_view text, std::vector<Answer>& answers) {
  probe_.write_dropped.Add();
  why.Add();
  answers.push_back([dones = std::move(call.dones), text = std::string(text)] {
    for (const Done& done : dones) done(absl::ResourceExhaustedError("disk tier: " + text));
  });
}

void DiskTier::Impl::StartWrites(absl::Time now, std::vector<Answer>& answers) {
  while (true) {
    Flight flight{.kind = FlightKind::kWrite};
    RecordHeader header;
    std::span<const std::byte> payload;
    {
      std::lock_guard lock(mu_);
      write_at_ = absl::InfiniteFuture();
      if (!breaker_.on() || write_queue_.empty()) return;
      const auto it = writes_.find(write_queue_.front());
      if (it == writes_.end() || it->second.flying) {  // answered since
        write_queue_.pop_front();
        continue;
      }
      if (it->second.erased) {
        probe_.write_cancelled.Add();
        answers.push_back([dones = std::move(it->second.dones)] {
          for (const Done& done : dones) done(absl::CancelledError("disk tier: the block was erased"));
        });
        writes_.erase(it);
        write_queue_.pop_front();
        continue;
      }
      if (writes_flying_ >= options_.write_depth || free_buffers_.empty() || changes_.size() >= kChangesMax) {
        return;  // the next completion, or batch of the index, comes back here
      }
      const size_t record_bytes = RecordBytes(header_bytes_, it->second.payload.size());
      const WriteGate::Decision decision = gate_->Ask(now, WallDay(), record_bytes);
      if (decision.answer == WriteGate::Answer::kLater) {
        write_at_ = now + decision.wait;
        return;
      }
      if (decision.answer == WriteGate::Answer::kWornOut) {
        Drop(std::move(it->second), probe_.dropped_endurance, "the day's budget of writes is used up",
             answers);
        writes_.erase(it);
        write_queue_.pop_front();
        continue;
      }
      std::vector<ExtentTable::Removed> removed;
      const auto extent = table_->Allocate(removed);
      for (const ExtentTable::Removed& r : removed) {
        changes_.push_back({RocksIndex::Change{r.key, std::nullopt}, nullptr});
        if (r.foreign) continue;
        probe_.evicted_capacity.Add();
        events_.push_back(
            {.kind = Event::Kind::kRemoved, .info = {.key = r.key}, .why = TierRemoval::kEvicted});
      }
      if (!extent.has_value()) {
        Drop(std::move(it->second), probe_.dropped_no_room, "no room and nothing to evict", answers);
        writes_.erase(it);
        write_queue_.pop_front();
        continue;
      }
      gate_->Take(now, record_bytes);
      write_queue_.pop_front();
      it->second.flying = true;
      it->second.stamp = {run_, ++next_serial_};
      payload = it->second.payload;
      header.stamp = it->second.stamp;
      header.extent = *extent;
      header.space = space_;
      header.layout = layout_;
      header.info = it->second.info;
      header.payload_bytes = payload.size();
      flight.extent = *extent;
      flight.key = it->first;
      flight.stamp = header.stamp;
      flight.wanted = true;
      flight.bytes = record_bytes;
      flight.started = now;
      flight.buffer = free_buffers_.back();
      free_buffers_.pop_back();
      ++writes_flying_;
      write_speed_.OnStart(now);
    }
    // The caller's bytes stay until the write is answered, and only this thread answers it.
    const std::span<std::byte> memory = Buffer(flight.buffer).first(flight.bytes);
    header.payload_crc = Crc32cCopy(memory.subspan(header_bytes_), payload);
    const auto end = memory.subspan(header_bytes_ + payload.size());
    std::memset(end.data(), 0, end.size());  // what the buffer held before is not this tenant's
    const absl::Status encoded = EncodeRecordHeader(header, memory.first(header_bytes_));
    TP_CHECK(encoded.ok());  // Write has seen to it
    Launch(flight, memory, ExtentOffset(flight.extent));
    // Beside loads one at a time: copying takes a while, and what they need comes first.
    std::lock_guard lock(mu_);
    if (reads_.empty()) continue;
    write_at_ = absl::InfinitePast();
    return;
  }
}

void DiskTier::Impl::OnWriteDone(const Flight& flight, int error) {
  const absl::Time now = Now();
  const absl::Duration latency = now - flight.started;
  std::vector<Answer> answers;
  {
    std::lock_guard lock(mu_);
    --writes_flying_;
    write_speed_.OnEnd(error == 0 ? flight.bytes : 0, latency, now);
    // A call of the same key that came after this one was given up is another one.
    const auto it = flight.wanted ? writes_.find(flight.key) : writes_.end();
    const bool waited = it != writes_.end() && it->second.flying && it->second.stamp == flight.stamp;
    if (error != 0) {
      if (error == ENOSPC || error == EDQUOT) {
        // Kept until a probe could write to it: whether there is room again shows nowhere else.
        if (suspect_ != kNoExtent) table_->Abandon(suspect_);
        suspect_ = flight.extent;
        SwitchOff(probe_.fault_no_space,
                  absl::StrCat(directory_path_, ": no space is left on the device; make room"), answers);
      } else {
        table_->Retire(flight.extent);
        SwitchOff(probe_.fault_io,
                  absl::StrCat(directory_path_, ": writing failed: ", std::generic_category().message(error)),
                  answers);
      }
    } else if (!waited) {
      table_->Abandon(flight.extent);
    } else if (it->second.erased) {
      table_->Abandon(flight.extent);
      probe_.write_cancelled.Add();
      answers.push_back([dones = std::move(it->second.dones)] {
        for (const Done& done : dones) done(absl::CancelledError("disk tier: the block was erased"));
      });
      writes_.erase(it);
    } else {
      const BlockInfo& info = it->second.info;
      IndexEntry entry;
      entry.key = info.key;
      entry.extent = flight.extent;
      entry.stamp = flight.stamp;
      entry.space = FirstEight(space_);
      entry.parent = info.parent;
      entry.tenant = info.tenant;
      entry.session = info.session;
      entry.turn = info.turn;
      entry.position = info.position;
      entry.compute_seconds = info.compute_seconds;
      entry.payload_bytes = it->second.payload.size();
      entry.stored_at = WallSeconds();
      table_->Commit(flight.extent, entry);
      changes_.push_back({RocksIndex::Change{entry.key, entry}, nullptr});
      events_.push_back({.kind = Event::Kind::kStored, .info = std::move(it->second.info)});
      probe_.write_ok.Add();
      probe_.write_seconds.Observe(absl::ToDoubleSeconds(latency));
      answers.push_back([dones = std::move(it->second.dones)] {
        for (const Done& done : dones) done(absl::OkStatus());
      });
      writes_.erase(it);
    }
    probe_.written_bytes.Add(error == 0 ? flight.bytes : 0);
    UpdateGauges();
  }
  free_buffers_.push_back(flight.buffer);
  Run(answers);
  changed_.notify_all();
}

void DiskTier::Impl::Expire(absl::Time now, std::vector<Answer>& answers) {
  absl::erase_if(reads_, [&](auto& item) {
    ReadCall& call = item.second;
    if (now < call.deadline) return false;
    probe_.read_timeout.Add();
    answers.push_back([done = std::move(call.done)] {
      done(absl::DeadlineExceededError("disk tier: the read took longer than it may"));
    });
    return true;
  });
  // Stores are queued in the order of their coming.
  while (!write_queue_.empty()) {
    const auto it = writes_.find(write_queue_.front());
    if (it != writes_.end() && !it->second.flying) {
      if (now < it->second.accepted + options_.write_wait) break;
      Drop(std::move(it->second), probe_.dropped_wait, "the store waited too long", answers);
      writes_.erase(it);
    }
    write_queue_.pop_front();
  }
}

void DiskTier::Impl::CheckSlow(absl::Time now, std::vector<Answer>& answers) {
  if (breaker_.health().state == TierState::kOpening) return;
  for (const auto& [tag, flight] : flights_) {
    const absl::Duration age = now - flight.started;
    if (age <= options_.slow_op) continue;
    const bool probe = flight.kind == FlightKind::kProbeWrite || flight.kind == FlightKind::kProbeRead;
    // One look at a tier that is off fails once; the next is when the operation has ended.
    if (!breaker_.on() && !(probe && probing_)) continue;
    if (probe) probing_ = false;
    SwitchOff(probe_.fault_slow,
              absl::StrCat(directory_path_, ": an operation has taken ", absl::ToInt64Milliseconds(age),
                           " ms, more than kv.disk.slow_op"),
              answers);
    return;
  }
  if (breaker_.on() && index_busy_ && now - index_busy_since_ > kSlowIndexOps * options_.slow_op) {
    std::string why = absl::StrCat(directory_path_, ": a change of the index has taken ",
                                   absl::ToInt64Milliseconds(now - index_busy_since_), " ms, more than ",
                                   kSlowIndexOps, " times kv.disk.slow_op");
    FailIndex(absl::UnavailableError("disk tier: " + why), answers);
    SwitchOff(probe_.fault_index, std::move(why), answers);
  }
}

void DiskTier::Impl::SwitchOff(Counter& fault, std::string reason, std::vector<Answer>& answers) {
  const bool was_on = breaker_.on();
  breaker_.Fail(reason, Now());
  fault.Add();
  if (was_on) {
    spdlog::error("disk tier off: {}", reason);
    probe_.SetState(TierState::kOff);
    events_.push_back({.kind = Event::Kind::kHealth, .health = breaker_.health()});
  }
  AnswerAll(absl::UnavailableError("disk tier is off: " + reason), answers);
  changed_.notify_all();
}

void DiskTier::Impl::SwitchOn() {
  breaker_.Recover(Now());
  probe_.SetState(TierState::kOn);
  spdlog::info("disk tier on: {}, {} blocks, {}", directory_path_, table_->live_count(), io_->Describe());
  events_.push_back({.kind = Event::Kind::kHealth, .health = breaker_.health()});
  changed_.notify_all();
}

void DiskTier::Impl::AnswerAll(const absl::Status& status, std::vector<Answer>& answers) {
  for (auto& [id, call] : reads_) {
    probe_.read_unavailable.Add();
    answers.push_back([done = std::move(call.done), status] { done(status); });
  }
  reads_.clear();
  read_queue_.clear();
  for (auto& [key, call] : writes_) {
    probe_.write_unavailable.Add();
    answers.push_back([dones = std::move(call.dones), status] {
      for (const Done& done : dones) done(status);
    });
  }
  writes_.clear();
  write_queue_.clear();
}

// A look at a tier that is off: a page (or, after a full disk, the record that did not fit) is written and
// read back, and the index is opened again if that was what failed.
void DiskTier::Impl::StartProbe(absl::Time now) {
  Flight flight{.kind = FlightKind::kProbeWrite};
  uint64_t offset = 0;
  {
    std::lock_guard lock(mu_);
    if (breaker_.health().state != TierState::kOff || stop_ || probing_ || now < breaker_.next_probe())
      return;
    // What hung must have ended first: as long as it has not, the disk is not well.
    if (!flights_.empty() || reopen_index_ || index_busy_) return;
    if (index_failed_) {
      reopen_index_ = true;
      changed_.notify_all();
      return;
    }
    probing_ = true;
    flight.bytes = suspect_ == kNoExtent ? kDiskPageBytes : record_bytes_;
    offset = suspect_ == kNoExtent ? 0 : ExtentOffset(suspect_);
    flight.started = now;
    flight.extent = suspect_;
  }
  Rng rng(RandomNumber());
  probe_bytes_.resize(flight.bytes);
  for (size_t i = 0; i + 8 <= flight.bytes; i += 8) {
    const uint64_t v = rng.Next();
    std::memcpy(probe_bytes_.data() + i, &v, sizeof v);
  }
  const auto memory = probe_page_.span().first(flight.bytes);
  std::memcpy(memory.data(), probe_bytes_.data(), flight.bytes);
  Launch(flight, memory, offset);
}

void DiskTier::Impl::OnProbeDone(const Flight& flight, int error) {
  const absl::Time now = Now();
  const auto memory = probe_page_.span().first(flight.bytes);
  std::vector<Answer> answers;
  bool read_back = false;
  {
    std::lock_guard lock(mu_);
    if (!probing_) return;  // it came too late
    if (error == 0 && flight.kind == FlightKind::kProbeWrite) {
      read_back = true;
    } else {
      probing_ = false;
      if (error != 0) {
        SwitchOff(error == ENOSPC || error == EDQUOT ? probe_.fault_no_space : probe_.fault_io,
                  absl::StrCat(directory_path_, ": ", std::generic_category().message(error)), answers);
      } else if (!std::ranges::equal(memory, probe_bytes_)) {
        SwitchOff(probe_.fault_io,
                  absl::StrCat(directory_path_, ": what was written is not what is read back"), answers);
      } else {
        if (suspect_ != kNoExtent) table_->Abandon(std::exchange(suspect_, kNoExtent));
        SwitchOn();
      }
    }
  }
  if (read_back) {
    std::memset(memory.data(), 0, memory.size());
    Flight next = flight;
    next.kind = FlightKind::kProbeRead;
    next.started = now;
    Launch(next, memory, flight.extent == kNoExtent ? 0 : ExtentOffset(flight.extent));
  }
  Run(answers);
}

// ---------------------------------------------------------------------------------------------------------
// The thread that owns the index.

void DiskTier::Impl::RunIndex() {
  std::unique_lock lock(mu_);
  while (true) {
    const auto work = [&] {
      return stop_index_ || reopen_index_ ||
             (index_ != nullptr && !index_failed_ && (!changes_.empty() || !erase_tasks_.empty()));
    };
    if (table_ == nullptr) {
      const absl::Duration pause = std::clamp(open_at_ - Now(), absl::ZeroDuration(), absl::Hours(1));
      changed_.wait_for(lock, absl::ToChronoNanoseconds(pause), [&] { return stop_; });
      if (stop_) break;
      if (Now() < open_at_) continue;
      lock.unlock();
      const absl::Status status = Open();
      lock.lock();
      if (status.ok()) {
        WakeIo();  // it switches the tier on
      } else {
        OpenFailed(lock, status);
      }
      continue;
    }
    changed_.wait(lock, work);
    if (reopen_index_) {
      ReopenIndex(lock);
      continue;
    }
    if (index_ != nullptr && !index_failed_ && !erase_tasks_.empty()) {
      EraseTask task = std::move(erase_tasks_.front());
      erase_tasks_.pop_front();
      RunErase(lock, std::move(task));
      continue;
    }
    if (index_ != nullptr && !index_failed_ && !changes_.empty()) {
      ApplyChanges(lock);
      continue;
    }
    if (stop_index_) break;
  }
  std::vector<Answer> answers;
  FailIndex(absl::UnavailableError("disk tier: it is being closed"), answers);
  lock.unlock();
  for (const Answer& answer : answers) answer();
  index_.reset();
}

absl::Status DiskTier::Impl::Open() {
  auto directory = DiskDirectory::Open({.path = options_.path,
                                        .name = options_.name,
                                        .record_bytes = record_bytes_,
                                        .file_bytes = kDiskPageBytes + uint64_t{extents_} * record_bytes_,
                                        .preallocate = options_.preallocate,
                                        .lock_wait = options_.lock_wait,
                                        .max_tiers = options_.max_tiers});
  TP_RETURN_IF_ERROR(directory.status());
  directory_ = *std::move(directory);
  if (directory_->fresh()) TP_RETURN_IF_ERROR(RocksIndex::Destroy(directory_->index_path()));
  WrittenToday written;
  auto table = LoadIndex(written);
  if (absl::IsDataLoss(table.status())) {
    // A cache that lost its catalogue is an empty one: rebuilding it from the records would bring back blocks
    // that were erased.
    spdlog::warn("disk tier: {}: starting anew: {}", directory_->path(),
                 std::string(table.status().message()));
    probe_.index_resets.Add();
    index_.reset();
    TP_RETURN_IF_ERROR(RocksIndex::Destroy(directory_->index_path()));
    table = LoadIndex(written);
  }
  TP_RETURN_IF_ERROR(Annotate(table.status(), directory_->path()));
  std::lock_guard lock(mu_);
  table_ = *std::move(table);
  gate_.emplace(WriteGate::Options{.bytes_per_second = options_.write_bytes_per_second,
                                   .bytes_per_day = options_.write_bytes_per_day,
                                   .read_share = options_.write_share,
                                   .read_quiet = options_.read_quiet,
                                   .record_bytes = record_bytes_},
                written, Now());
  directory_path_ = directory_->path();
  fd_ = directory_->blocks_fd();
  return absl::OkStatus();
}

void DiskTier::Impl::OpenFailed(std::unique_lock<std::mutex>& lock, const absl::Status& status) {
  const TierHealth before = breaker_.health();
  breaker_.Fail(std::string(status.message()), Now());
  open_at_ = breaker_.next_probe();
  probe_.fault_open.Add();
  probe_.SetState(TierState::kOff);
  const bool news = breaker_.health() != before;
  if (news) events_.push_back({.kind = Event::Kind::kHealth, .health = breaker_.health()});
  changed_.notify_all();
  lock.unlock();
  if (news) spdlog::error("disk tier off: {}", std::string(status.message()));
  index_.reset();
  directory_.reset();
  DeliverEvents();
  lock.lock();
}

// Opens the index and reads it into memory.
absl::StatusOr<std::unique_ptr<ExtentTable>> DiskTier::Impl::LoadIndex(WrittenToday& written) {
  TP_ASSIGN_OR_RETURN(auto policy, CreatePolicy({.name = options_.eviction, .capacity = extents_}));
  auto table = std::make_unique<ExtentTable>(extents_, std::move(policy));
  TP_ASSIGN_OR_RETURN(index_, RocksIndex::Open(directory_->index_path()));
  TP_ASSIGN_OR_RETURN(written, index_->LoadWritten());
  const uint64_t space = FirstEight(space_);
  std::vector<RocksIndex::Change> drop;
  uint64_t damaged = 0;
  TP_RETURN_IF_ERROR(index_->Load(
      [&](const IndexEntry& entry) {
        const bool possible = entry.payload_bytes > 0 && entry.payload_bytes <= record_bytes_ - header_bytes_;
        if (!possible || !table->Restore(entry, entry.space != space))
          drop.push_back({entry.key, std::nullopt});
      },
      damaged));
  if (damaged + drop.size() > 0)
    spdlog::info("disk tier: {}: {} entries of the index dropped", directory_->path(), damaged + drop.size());
  for (std::span<const RocksIndex::Change> rest = drop; !rest.empty();) {
    const size_t n = std::min(rest.size(), kChangesPerBatch);
    TP_RETURN_IF_ERROR(index_->Apply(rest.first(n), written, /*sync=*/false));
    rest = rest.subspan(n);
  }
  table->FinishRestore();
  return table;
}

// Everybody who waits for the index is told that it failed.
void DiskTier::Impl::FailIndex(const absl::Status& status, std::vector<Answer>& answers) {
  for (IndexChange& change : changes_) {
    if (change.done == nullptr) continue;
    answers.push_back([done = std::move(change.done), status] { done(status); });
    change.done = nullptr;
  }
  for (EraseTask& task : erase_tasks_) {
    answers.push_back([done = std::move(task.done), status] { done(status); });
  }
  erase_tasks_.clear();
}

void DiskTier::Impl::ApplyChanges(std::unique_lock<std::mutex>& lock) {
  std::vector<IndexChange> batch;
  std::vector<RocksIndex::Change> changes;
  bool sync = false;
  while (!changes_.empty() && batch.size() < kChangesPerBatch) {
    batch.push_back(std::move(changes_.front()));
    changes_.pop_front();
    if (batch.back().change.has_value()) changes.push_back(*batch.back().change);
    sync |= batch.back().done != nullptr;
  }
  const WrittenToday written = gate_->written();
  index_busy_ = true;
  index_busy_since_ = Now();
  lock.unlock();
  const absl::Status status = index_->Apply(changes, written, sync);
  lock.lock();
  index_busy_ = false;
  std::vector<Answer> answers;
  if (!status.ok()) {
    changes_.insert(changes_.begin(), std::make_move_iterator(batch.begin()),
                    std::make_move_iterator(batch.end()));
    index_failed_ = true;
    index_fault_ = absl::StrCat(directory_path_, ": ", std::string(status.message()));
    FailIndex(absl::UnavailableError("disk tier: " + std::string(status.message())), answers);
  } else {
    for (IndexChange& change : batch) {
      if (change.done == nullptr) continue;
      answers.push_back([done = std::move(change.done)] { done(absl::OkStatus()); });
    }
  }
  changed_.notify_all();
  lock.unlock();
  WakeIo();
  Run(answers);
  lock.lock();
}

void DiskTier::Impl::RunErase(std::unique_lock<std::mutex>& lock, EraseTask task) {
  uint64_t erased = 0;
  const Id end = table_->size();  // blocks that come later were no part of what was there
  for (Id id = 0; id < end && !index_failed_;) {
    for (const Id step = std::min(end, id + kEraseStep); id < step; ++id) {
      const bool live = table_->live(id);
      if ((!live && !table_->foreign(id)) || !task.matches(table_->Listed(id))) continue;
      const BlockKey key = table_->Entry(id).key;
      if (live) {
        RemoveBlock(id, TierRemoval::kErased, probe_.evicted_erased);
        ++erased;
      } else {
        table_->RemoveForeign(id);
        changes_.push_back({RocksIndex::Change{key, std::nullopt}, nullptr});
      }
    }
    UpdateGauges();
    lock.unlock();
    DeliverEvents();
    lock.lock();
    while (changes_.size() > kChangesPerBatch && !index_failed_) ApplyChanges(lock);
  }
  Done done = [erased, done = std::move(task.done)](const absl::Status& status) {
    status.ok() ? done(erased) : done(status);
  };
  if (!index_failed_) {
    changes_.push_back({std::nullopt, std::move(done)});
    return;
  }
  lock.unlock();
  done(absl::UnavailableError("disk tier: the index failed during an erasure"));
  lock.lock();
}

void DiskTier::Impl::ReopenIndex(std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  index_.reset();
  bool anew = false;
  auto index = RocksIndex::Open(directory_->index_path());
  if (absl::IsDataLoss(index.status())) {
    anew = true;
    const absl::Status destroyed = RocksIndex::Destroy(directory_->index_path());
    index = destroyed.ok() ? RocksIndex::Open(directory_->index_path()) : destroyed;
  }
  lock.lock();
  reopen_index_ = false;
  if (index.ok()) {
    index_ = *std::move(index);
    index_failed_ = false;
    if (anew) {
      probe_.index_resets.Add();
      changes_.clear();  // memory is ahead of them; nobody waits for one (FailIndex)
      for (Id id = 0; id < table_->size(); ++id) {
        if (!table_->live(id)) continue;
        IndexEntry entry = table_->Entry(id);
        entry.space = FirstEight(space_);
        changes_.push_back({RocksIndex::Change{entry.key, std::move(entry)}, nullptr});
      }
    }
  } else {
    index_fault_ = absl::StrCat(directory_path_, ": ", std::string(index.status().message()));
  }
  WakeIo();
}

// ---------------------------------------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<DiskTier>> DiskTier::Create(DiskTierOptions options) {
  TP_CHECK(options.metrics != nullptr);
  if (!options.path.starts_with('/'))
    return absl::InvalidArgumentError(absl::StrCat("kv.disk.path: '", options.path, "' is no absolute path"));
  const auto plain = [](unsigned char c) { return std::isalnum(c) != 0 || c == '.' || c == '_' || c == '-'; };
  if (options.name.empty() || options.name.starts_with('.') || !std::ranges::all_of(options.name, plain))
    return absl::InvalidArgumentError(
        absl::StrCat("the disk tier's name '", options.name, "' may hold letters, digits, '.', '_' and '-'"));
  if (options.layout.block_bytes() == 0)
    return absl::InvalidArgumentError("the disk tier needs a block layout");
  if (options.read_depth == 0 || options.write_depth == 0 || options.max_reads == 0 ||
      options.max_writes == 0)
    return absl::InvalidArgumentError("the disk tier needs room for one read and one write at least");
  TP_RETURN_IF_ERROR(CreatePolicy({.name = options.eviction, .capacity = 4}).status());
  auto impl = std::make_unique<Impl>(std::move(options));
  TP_RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<DiskTier>(new DiskTier(std::move(impl)));
}

DiskTier::DiskTier(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DiskTier::~DiskTier() = default;

BlockTier::Caps DiskTier::caps() const { return impl_->caps(); }
BlockTier::ReadId DiskTier::Read(const BlockKey& key, std::span<const int32_t> tokens,
                                 std::span<std::byte> dst, absl::Duration timeout, ReadDone done) {
  return impl_->Read(key, tokens, dst, timeout, std::move(done));
}
bool DiskTier::CancelRead(ReadId id) { return impl_->CancelRead(id); }
void DiskTier::Write(const BlockInfo& info, std::span<const std::byte> payload, Done done) {
  impl_->Write(info, payload, std::move(done));
}
void DiskTier::Erase(const BlockKey& key, Done done) { impl_->Erase(key, std::move(done)); }
void DiskTier::EraseIf(Predicate matches, CountDone done) {
  impl_->EraseIf(std::move(matches), std::move(done));
}
bool DiskTier::Contains(const BlockKey& key) const { return impl_->Contains(key); }
std::optional<TierEntry> DiskTier::Find(const BlockKey& key) const { return impl_->Find(key); }
BlockTier::Page DiskTier::List(uint64_t cursor, size_t max) const { return impl_->List(cursor, max); }
TierStats DiskTier::stats() const { return impl_->stats(); }
TierHealth DiskTier::health() const { return impl_->health(); }
void DiskTier::SetObserver(TierObserver* observer) { impl_->SetObserver(observer); }
TierHealth DiskTier::WaitOpened(absl::Duration timeout) const { return impl_->WaitOpened(timeout); }
bool DiskTier::WaitIdle(absl::Duration timeout) const { return impl_->WaitIdle(timeout); }
std::string DiskTier::directory() const { return impl_->directory(); }

}  // namespace tidepool
