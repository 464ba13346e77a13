#include "kvstore/disk/disk_tier.h"

#include <errno.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cmath>
#include <system_error>

#include "base/rng.h"
#include "kvstore/disk/crc32c.h"
#include "kvstore/disk/disk_tier_impl.h"
#include "kvstore/policy/policy.h"

namespace tidepool {
namespace {

std::atomic<int> left_behind{0};

// Bytes of a number in the payload.
size_t WidthOf(const DiskTierOptions& o) { return o.codec == "none" ? DTypeBytes(o.layout.dtype) : 1; }

}  // namespace

int DiskTiersLeftBehind() { return left_behind; }

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
  const size_t buffers = depth + (options_.read_depth + 1) / 2 + 2 * kRecodeDepth;
  TP_ASSIGN_OR_RETURN(buffers_, AlignedMemory::Make(buffers * record_bytes_));
  TP_ASSIGN_OR_RETURN(probe_page_, AlignedMemory::Make(record_bytes_));
  for (size_t i = buffers; i > 0; --i) free_buffers_.push_back(i - 1);
  TP_ASSIGN_OR_RETURN(io_, options_.make_io ? options_.make_io(depth + kRecodeDepth + 1)
                                            : MakeDiskIo(depth + kRecodeDepth + 1));
  // A quarter of the cores: the others compute.
  const size_t coders = std::clamp<size_t>(std::thread::hardware_concurrency() / 4, 1, 4);
  coders_ = std::make_unique<CoderPool>(coders, WidthOf(options_));
  probe_.SetState(TierState::kOpening);
  probe_.capacity.Set(static_cast<double>(uint64_t{extents_} * record_bytes_));
  io_thread_ = std::thread([this] { RunIo(); });
  index_thread_ = std::thread([self = shared_from_this()] { self->RunIndex(); });
  return absl::OkStatus();
}

DiskTier::Impl::~Impl() {
  if (!flights_.empty()) {
    spdlog::warn("disk tier: {} operations did not end; their buffers and their file are left behind",
                 flights_.size());
    buffers_.Leak();
    probe_page_.Leak();
  }
}

void DiskTier::Impl::Close() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  changed_.notify_all();
  WakeIo();
  if (io_thread_.joinable()) io_thread_.join();
  coders_.reset();  // answers the reads that it has
  std::vector<Answer> answers;
  {
    std::unique_lock lock(mu_);
    stop_index_ = true;
    file_in_use_ = !flights_.empty();
    changed_.notify_all();
    if (!index_thread_.joinable()) return;
    if (changed_.wait_for(lock, absl::ToChronoNanoseconds(options_.close_wait),
                          [&] { return index_ended_; })) {
      lock.unlock();
      index_thread_.join();
      return;
    }
    abandoned_ = true;
    FailIndex(absl::UnavailableError("disk tier: its index hangs, and it is being closed"), answers);
  }
  spdlog::error("disk tier: {}: the index has not answered for {}; its thread and its memory are left behind",
                directory_path_, absl::FormatDuration(options_.close_wait));
  SetObserver(nullptr);
  ++left_behind;
  index_thread_.detach();
  for (const Answer& answer : answers) answer();
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
    } else if (reads_.size() + decoding_ >= options_.max_reads) {
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
      (options_.compress ? code_queue_ : write_queue_).push_back(info.key);
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

std::optional<BlockKey> DiskTier::Impl::NextVictim(size_t payload_bytes) const {
  std::lock_guard lock(mu_);
  if (!breaker_.on()) return std::nullopt;
  // What is encoded is asked for as it came out lately.
  const double share = coded_share_ > 0 ? coded_share_ : 1;
  const auto bytes =
      static_cast<size_t>(share * static_cast<double>(std::min(payload_bytes, payload_bytes_max_)));
  return table_->NextVictim(RecordBytes(header_bytes_, bytes));
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
    out.bytes = table_->live_pages() * kDiskPageBytes;
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
    return writes_.empty() && recodes_.empty() && recode_queue_.empty() && changes_.empty() &&
           erase_tasks_.empty() && !erasing_.has_value() && !index_busy_;
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
  probe_.bytes.Set(static_cast<double>(table_->live_pages() * kDiskPageBytes));
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
    TakeBack();
    {
      std::unique_lock lock(mu_);
      if (fd_ >= 0 && !attached) {
        io_->Attach(fd_);
        attached = true;
        SwitchOn();
      }
      if (stop_ && stop_by == absl::InfiniteFuture()) {
        stop_by = before + std::min(options_.slow_op, options_.close_wait);
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
      StartCoding(answers);
      StartWrites(now, answers);
      StartRecodes(now, answers);
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
    if (writes_.empty() && recodes_.empty()) changed_.notify_all();
  }
}

absl::Duration DiskTier::Impl::NextWake(absl::Time now) const {
  if (!arrived_.empty()) return absl::ZeroDuration();
  // Deadlines and slow operations are looked at this often, whatever else happens.
  absl::Duration wait = absl::Milliseconds(flights_.empty() && reads_.empty() && writes_.empty() &&
                                                   recodes_.empty() && recode_queue_.empty()
                                               ? 500
                                               : 50);
  if (breaker_.health().state == TierState::kOff && table_ != nullptr && flights_.empty() && !reopen_index_ &&
      !index_busy_)
    wait = std::min(wait, breaker_.next_probe() - now);
  if (!writes_.empty() || !recodes_.empty()) wait = std::min(wait, write_at_ - now);
  if (!read_queue_.empty() || !recode_queue_.empty()) wait = std::min(wait, read_at_ - now);
  return std::max(wait, absl::ZeroDuration());
}

void DiskTier::Impl::Harvest(absl::Duration wait) {
  std::vector<DiskIo::Completion> done;
  io_->Wait(wait, done);
  for (const DiskIo::Completion& c : done) OnCompletion(c.tag, c.error);
}

void DiskTier::Impl::Launch(const Flight& flight, std::span<std::byte> memory) {
  const uint64_t tag = ++next_tag_;
  flights_.emplace(tag, flight);
  const bool write = flight.kind == FlightKind::kWrite || flight.kind == FlightKind::kProbeWrite ||
                     flight.kind == FlightKind::kRecodeWrite;
  io_->Submit({.write = write, .offset = flight.offset, .buffer = memory, .tag = tag});
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
    case FlightKind::kRecodeRead:
      OnRecodeRead(flight, error);
      break;
    case FlightKind::kRecodeWrite:
      OnRecodeWrite(flight, error);
      break;
  }
}

void DiskTier::Impl::StartReads(absl::Time now, std::vector<Answer>& answers) {
  while (true) {
    Flight flight{.kind = FlightKind::kRead};
    {
      std::lock_guard lock(mu_);
      read_at_ = absl::InfiniteFuture();
      if (reads_flying_ > 0) gate_->OnReadsActive(now);
      if (!breaker_.on() || reads_flying_ >= options_.read_depth || read_queue_.empty()) return;
      const auto it = reads_.find(read_queue_.front());
      flight.read = read_queue_.front();
      if (it == reads_.end()) {
        read_queue_.pop_front();
        continue;
      }
      const auto extent = table_->Find(it->second.key);
      if (!extent.has_value()) {  // evicted or erased since the read was accepted
        probe_.read_miss.Add();
        answers.push_back(
            [done = std::move(it->second.done)] { done(absl::NotFoundError("disk tier: no such block")); });
        reads_.erase(it);
        read_queue_.pop_front();
        continue;
      }
      flight.bytes = RecordBytes(header_bytes_, table_->stored_bytes(*extent));
      if (const absl::Duration pause = read_bucket_->Wait(flight.bytes, now); pause > absl::ZeroDuration()) {
        read_at_ = now + pause;  // the disk is the stores' meanwhile
        return;
      }
      gate_->OnReadsActive(now);
      if (free_buffers_.empty()) return;  // those of late operations may still be out
      read_bucket_->Take(flight.bytes);
      read_queue_.pop_front();
      flight.extent = *extent;
      flight.key = it->second.key;
      flight.stamp = table_->stamp(*extent);
      flight.offset = PageOffset(table_->page(*extent));
      flight.payload_bytes = table_->payload_bytes(*extent);
      flight.encoding = table_->encoding(*extent);
      flight.version = table_->version(*extent);
      flight.started = now;
      flight.buffer = free_buffers_.back();
      free_buffers_.pop_back();
      table_->Pin(*extent);
      ++reads_flying_;
      read_speed_.OnStart(now);
    }
    Launch(flight, Buffer(flight.buffer).first(flight.bytes));
  }
}

// The header of what was read, if it is what the index said. DataLoss: it is damaged. NotFound: it is whole,
// but another write's or model's.
absl::StatusOr<RecordHeader> DiskTier::Impl::TakeHeader(const Flight& flight) const {
  const std::span<const std::byte> memory = Buffer(flight.buffer).first(flight.bytes);
  TP_ASSIGN_OR_RETURN(RecordHeader header, DecodeRecordHeader(memory.first(header_bytes_)));
  const uint64_t place = header.place * (header.version == 1 ? record_bytes_ : kDiskPageBytes);
  if (header.version != flight.version || header.stamp != flight.stamp ||
      place + kDiskPageBytes != flight.offset || header.space != space_ || header.info.key != flight.key ||
      header.encoding != flight.encoding) {
    return absl::NotFoundError("the record is of another write");
  }
  if (header.payload_bytes != flight.payload_bytes || header.stored_bytes == 0 ||
      header.stored_bytes > memory.size() - header_bytes_) {
    return absl::DataLossError("the payload's length is impossible");
  }
  // A short tenant leaves room for more of them in the header's area.
  if (header.info.tokens.size() > options_.layout.block_tokens)
    return absl::DataLossError(absl::StrCat("the record has ", header.info.tokens.size(), " tokens, a block ",
                                            options_.layout.block_tokens));
  return header;
}

absl::Status DiskTier::Impl::CheckCall(const RecordHeader& header, const ReadCall& call) const {
  if (!call.tokens.empty() && header.info.tokens != call.tokens)
    return absl::NotFoundError("the record is of other tokens");
  if (header.payload_bytes > call.dst.size())
    return absl::InvalidArgumentError(absl::StrCat("disk tier: buffer of ", call.dst.size(),
                                                   " bytes, the block has ", header.payload_bytes));
  return absl::OkStatus();
}

void DiskTier::Impl::OnReadDone(const Flight& flight, int error) {
  const absl::Time now = Now();
  const absl::Duration latency = now - flight.started;
  std::vector<Answer> answers;
  {
    std::lock_guard lock(mu_);
    --reads_flying_;
    // What is encoded has not been loaded before it is decoded.
    if (error != 0 || flight.encoding == RecordEncoding::kPlain)
      read_speed_.OnEnd(error == 0 ? flight.payload_bytes : 0, latency, now);
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
      ++decoding_;
    }
  }
  const bool plain = flight.encoding == RecordEncoding::kPlain;
  if (!call.has_value()) {
    if (!plain) {
      std::lock_guard lock(mu_);
      read_speed_.OnEnd(flight.payload_bytes, arrived.latency, Now());
    }
    free_buffers_.push_back(flight.buffer);
    return;
  }
  probe_.read_seconds.Observe(absl::ToDoubleSeconds(arrived.latency));
  probe_.read_bytes.Add(flight.bytes);
  auto header = TakeHeader(flight);
  absl::Status status = header.status();
  if (status.ok()) status = CheckCall(*header, *call);
  const auto stored = status.ok() ? Buffer(flight.buffer).subspan(header_bytes_, header->stored_bytes)
                                  : std::span<std::byte>();
  if (status.ok() && !plain) {
    // std::function wants what can be copied.
    const auto waiting = std::make_shared<ReadCall>(*std::move(call));
    coders_->Decode([this, flight, waiting, stored, header = *std::move(header)](PlaneCodec& codec) {
      const std::span<std::byte> dst = waiting->dst.first(header.payload_bytes);
      absl::StatusOr<Record> record = absl::DataLossError("the stored bytes' checksum differs");
      if (Crc32c(stored) == header.stored_crc) {
        const absl::Status decoded = codec.Decode(stored, dst);
        if (!decoded.ok()) {
          record = decoded;
        } else if (Crc32c(dst) != header.payload_crc) {
          record = absl::DataLossError("the payload's checksum differs");
        } else {
          record = Record{header.info, dst.size()};
        }
      }
      FinishRead(flight, std::move(*waiting), std::move(record), /*coder=*/true);
    });
    return;
  }
  absl::StatusOr<Record> record = absl::DataLossError("the payload's checksum differs");
  if (!status.ok()) {
    record = status;
  } else if (Crc32cCopy(call->dst, stored) == header->payload_crc) {
    record = Record{std::move(header->info), stored.size()};
  }
  FinishRead(flight, *std::move(call), std::move(record), /*coder=*/false);
}

void DiskTier::Impl::FinishRead(const Flight& flight, ReadCall call, absl::StatusOr<Record> record,
                                bool coder) {
  if (!coder) free_buffers_.push_back(flight.buffer);
  {
    std::lock_guard lock(mu_);
    --decoding_;
    if (flight.encoding != RecordEncoding::kPlain) {
      const absl::Time now = Now();
      read_speed_.OnEnd(record.ok() ? flight.payload_bytes : 0, now - flight.started, now);
    }
    if (coder) returned_buffers_.push_back(flight.buffer);
    const bool same = table_->live(flight.extent) && table_->stamp(flight.extent) == flight.stamp;
    if (record.ok()) {
      probe_.read_hit.Add();
      if (same) table_->Touch(flight.extent);
    } else if (absl::IsDataLoss(record.status())) {
      probe_.read_damaged.Add();
      spdlog::warn("disk tier: {}: block {} at {}: {}", directory_path_, call.key.ToHex(), flight.offset,
                   std::string(record.status().message()));
      if (same) RemoveBlock(flight.extent, TierRemoval::kDamaged, probe_.evicted_damaged);
    } else if (absl::IsNotFound(record.status())) {
      probe_.read_mismatch.Add();
      if (same) RemoveBlock(flight.extent, TierRemoval::kDamaged, probe_.evicted_mismatch);
    }
  }
  if (coder) WakeIo();
  DeliverEvents();  // whoever is answered may rely on what the observer was told
  call.done(std::move(record));
  changed_.notify_all();
}

void DiskTier::Impl::AnswerWrite(WriteCall call, std::function<absl::Status()> status,
                                 std::vector<Answer>& answers) {
  Answer answer = [dones = std::move(call.dones), status = std::move(status)] {
    for (const Done& done : dones) done(status());
  };
  Coding* const coding = call.coding.get();
  if (coding == nullptr) {
    answers.push_back(std::move(answer));
    return;
  }
  switch (coding->state) {
    case Coding::State::kRunning:
      coding->deferred.push_back(std::move(answer));
      return;
    case Coding::State::kWaiting:
      coding->state = Coding::State::kDropped;  // the coder gives the buffer back when it comes to it
      break;
    case Coding::State::kDone:
      if (!call.flying) {
        returned_buffers_.push_back(coding->buffer);
        --writes_coded_;
      }
      break;
    case Coding::State::kDropped:
      break;
  }
  answers.push_back(std::move(answer));
}

void DiskTier::Impl::Drop(WriteCall call, Counter& why, std::string_view text, std::vector<Answer>& answers) {
  probe_.write_dropped.Add();
  why.Add();
  AnswerWrite(
      std::move(call),
      [text = std::string(text)] { return absl::ResourceExhaustedError("disk tier: " + text); }, answers);
}

RecordHeader DiskTier::Impl::HeaderOf(const BlockInfo& info, Id extent, uint64_t payload_bytes,
                                      const Stored& stored, RecordStamp stamp) const {
  RecordHeader header;
  header.stamp = stamp;
  header.place = table_->page(extent);
  header.space = space_;
  header.layout = layout_;
  header.info = info;
  header.payload_bytes = payload_bytes;
  header.payload_crc = stored.payload_crc;
  header.encoding = stored.encoding;
  header.stored_bytes = stored.bytes;
  header.stored_crc = stored.crc;
  return header;
}

void DiskTier::Impl::StartWrites(absl::Time now, std::vector<Answer>& answers) {
  while (true) {
    Flight flight{.kind = FlightKind::kWrite};
    RecordHeader header;
    std::span<const std::byte> payload;  // to be copied; empty: it is in the buffer, encoded
    {
      std::lock_guard lock(mu_);
      write_at_ = absl::InfiniteFuture();
      if (!breaker_.on() || write_queue_.empty()) return;
      const auto it = writes_.find(write_queue_.front());
      if (it == writes_.end() || it->second.flying ||
          (it->second.coding != nullptr && it->second.coding->state != Coding::State::kDone) ||
          (it->second.coding == nullptr && options_.compress)) {  // answered since, and perhaps come again
        write_queue_.pop_front();
        continue;
      }
      WriteCall& call = it->second;
      const auto end = [&] {
        writes_.erase(it);
        write_queue_.pop_front();
      };
      if (call.erased) {
        probe_.write_cancelled.Add();
        AnswerWrite(
            std::move(call), [] { return absl::CancelledError("disk tier: the block was erased"); }, answers);
        end();
        continue;
      }
      const bool coded = call.coding != nullptr;
      if (writes_flying_ >= options_.write_depth || (!coded && free_buffers_.empty()) ||
          changes_.size() >= kChangesMax) {
        return;  // the next completion, or batch of the index, comes back here
      }
      Stored stored;
      stored.bytes = call.payload.size();
      if (coded) stored = call.coding->stored;
      const size_t record_bytes = RecordBytes(header_bytes_, stored.bytes);
      const WriteGate::Decision decision = gate_->Ask(now, WallDay(), record_bytes);
      if (decision.answer == WriteGate::Answer::kLater) {
        write_at_ = now + decision.wait;
        return;
      }
      if (decision.answer == WriteGate::Answer::kWornOut) {
        Drop(std::move(call), probe_.dropped_endurance, "the day's budget of writes is used up", answers);
        end();
        continue;
      }
      const auto extent = Allocate(record_bytes);
      if (!extent.has_value()) {
        Drop(std::move(call), probe_.dropped_no_room, "no room and nothing to evict", answers);
        end();
        continue;
      }
      gate_->Take(now, record_bytes);
      write_queue_.pop_front();
      call.flying = true;
      call.stamp = {run_, ++next_serial_};
      if (!coded) payload = call.payload;
      header = HeaderOf(call.info, *extent, call.payload.size(), stored, call.stamp);
      flight.extent = *extent;
      flight.offset = PageOffset(table_->page(*extent));
      flight.key = it->first;
      flight.stamp = header.stamp;
      flight.wanted = true;
      flight.bytes = record_bytes;
      flight.started = now;
      if (coded) {
        flight.buffer = call.coding->buffer;
        --writes_coded_;
      } else {
        flight.buffer = free_buffers_.back();
        free_buffers_.pop_back();
      }
      ++writes_flying_;
      write_speed_.OnStart(now);
    }
    // The caller's bytes stay until the write is answered, and only this thread answers it.
    const std::span<std::byte> memory = Buffer(flight.buffer).first(flight.bytes);
    if (!payload.empty())
      header.payload_crc = header.stored_crc = Crc32cCopy(memory.subspan(header_bytes_), payload);
    const absl::Status sealed = SealRecord(header, memory);
    TP_CHECK(sealed.ok());  // Write has seen to it
    Launch(flight, memory);
    // Beside loads one at a time: copying takes a while, and what they need comes first.
    std::lock_guard lock(mu_);
    if (reads_.empty()) continue;
    write_at_ = absl::InfinitePast();
    return;
  }
}

// Makes room for a record and tells of what had to go for it; holds mu_.
std::optional<ExtentTable::Id> DiskTier::Impl::Allocate(uint64_t record_bytes) {
  std::vector<ExtentTable::Removed> removed;
  const auto extent = table_->Allocate(record_bytes, removed);
  for (const ExtentTable::Removed& r : removed) {
    changes_.push_back({RocksIndex::Change{r.key, std::nullopt}, nullptr});
    if (r.foreign) continue;
    probe_.evicted_capacity.Add();
    events_.push_back({.kind = Event::Kind::kRemoved, .info = {.key = r.key}, .why = TierRemoval::kEvicted});
  }
  return extent;
}

// Puts the header before what is stored in `memory`, and nothing behind it.
absl::Status DiskTier::Impl::SealRecord(const RecordHeader& header, std::span<std::byte> memory) const {
  const auto end = memory.subspan(header_bytes_ + header.stored_bytes);
  std::memset(end.data(), 0, end.size());  // what the buffer held before is not this tenant's
  return EncodeRecordHeader(header, memory.first(header_bytes_));
}

// A write to `extent` came back with an error; holds mu_.
void DiskTier::Impl::WriteFailed(Id extent, int error, std::vector<Answer>& answers) {
  if (error == ENOSPC || error == EDQUOT) {
    // Kept until a probe could write to it: whether there is room again shows nowhere else.
    if (suspect_ != kNoExtent) table_->Abandon(suspect_);
    suspect_ = extent;
    SwitchOff(probe_.fault_no_space,
              absl::StrCat(directory_path_, ": no space is left on the device; make room"), answers);
  } else {
    table_->Retire(extent);
    SwitchOff(probe_.fault_io,
              absl::StrCat(directory_path_, ": writing failed: ", std::generic_category().message(error)),
              answers);
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
      WriteFailed(flight.extent, error, answers);
    } else if (!waited) {
      table_->Abandon(flight.extent);
    } else if (it->second.erased) {
      table_->Abandon(flight.extent);
      probe_.write_cancelled.Add();
      AnswerWrite(
          std::move(it->second), [] { return absl::CancelledError("disk tier: the block was erased"); },
          answers);
      writes_.erase(it);
    } else {
      const BlockInfo& info = it->second.info;
      IndexEntry entry;
      entry.key = info.key;
      entry.place = table_->page(flight.extent);
      entry.stamp = flight.stamp;
      entry.space = FirstEight(space_);
      entry.parent = info.parent;
      entry.tenant = info.tenant;
      entry.session = info.session;
      entry.turn = info.turn;
      entry.position = info.position;
      entry.compute_seconds = info.compute_seconds;
      entry.payload_bytes = entry.stored_bytes = it->second.payload.size();
      if (it->second.coding != nullptr) {
        entry.encoding = it->second.coding->stored.encoding;
        entry.stored_bytes = it->second.coding->stored.bytes;
      }
      entry.stored_at = WallSeconds();
      table_->Commit(flight.extent, entry);
      changes_.push_back({RocksIndex::Change{entry.key, entry}, nullptr});
      events_.push_back({.kind = Event::Kind::kStored, .info = std::move(it->second.info)});
      probe_.write_ok.Add();
      probe_.write_seconds.Observe(absl::ToDoubleSeconds(latency));
      AnswerWrite(
          std::move(it->second), [] { return absl::OkStatus(); }, answers);
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
  for (std::deque<BlockKey>* queue : {&code_queue_, &write_queue_}) {
    while (!queue->empty()) {
      const auto it = writes_.find(queue->front());
      if (it != writes_.end() && !it->second.flying) {
        if (now < it->second.accepted + options_.write_wait) break;
        Drop(std::move(it->second), probe_.dropped_wait, "the store waited too long", answers);
        writes_.erase(it);
      }
      queue->pop_front();
    }
  }
  while (!recode_queue_.empty() &&
         now >= recode_queue_.front()->accepted + kRecodeWaits * options_.write_wait) {
    AnswerRecode(*recode_queue_.front(),
                 absl::ResourceExhaustedError("disk tier: loads left no time to compress"), answers);
    recode_queue_.pop_front();
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
  // Also while it is off: what is asked of a disk that hangs altogether is late sooner than the index, and
  // who waits for the index has nobody else to be answered by.
  if (index_busy_ && now - index_busy_since_ > kSlowIndexOps * options_.slow_op) {
    std::string why = absl::StrCat(directory_path_, ": a change of the index has taken ",
                                   absl::ToInt64Milliseconds(now - index_busy_since_), " ms, more than ",
                                   kSlowIndexOps, " times kv.disk.slow_op");
    FailIndex(absl::UnavailableError("disk tier: " + why), answers);
    if (breaker_.on()) SwitchOff(probe_.fault_index, std::move(why), answers);
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
    AnswerWrite(
        std::move(call), [status] { return status; }, answers);
  }
  writes_.clear();
  write_queue_.clear();
  code_queue_.clear();
  // What is at the disk, or with a coder, ends by itself, and finds nobody.
  for (const auto& recode : recodes_) AnswerRecode(*recode, status, answers);
  for (const auto& recode : recode_queue_) AnswerRecode(*recode, status, answers);
  recode_queue_.clear();
}

// A look at a tier that is off: a page (or, after a full disk, the record that did not fit) is written and
// read back, and the index is opened again if that was what failed.
void DiskTier::Impl::StartProbe(absl::Time now) {
  Flight flight{.kind = FlightKind::kProbeWrite};
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
    flight.bytes = kDiskPageBytes;
    if (suspect_ != kNoExtent) {
      flight.bytes = kDiskPageBytes * table_->pages(suspect_);
      flight.offset = PageOffset(table_->page(suspect_));
    }
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
  Launch(flight, memory);
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
    Launch(next, memory);
  }
  Run(answers);
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
  auto impl = std::make_shared<Impl>(std::move(options));
  TP_RETURN_IF_ERROR(impl->Start());
  return std::unique_ptr<DiskTier>(new DiskTier(std::move(impl)));
}

DiskTier::DiskTier(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
DiskTier::~DiskTier() { impl_->Close(); }

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
void DiskTier::Compress(const BlockKey& key, CompressDone done) { impl_->Compress(key, std::move(done)); }
std::optional<BlockKey> DiskTier::NextVictim(size_t payload_bytes) const {
  return impl_->NextVictim(payload_bytes);
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
