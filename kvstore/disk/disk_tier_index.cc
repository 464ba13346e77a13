// The half of DiskTier that owns the index and the directory, on a thread of its own.
#include <algorithm>
#include <iterator>

#include "kvstore/disk/disk_tier_impl.h"
#include "kvstore/policy/policy.h"

namespace tidepool {

// After each call that may hang the thread may be alone: what the tier was given (metrics) is not touched
// then any more, only what is the tier's own.
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
      if (abandoned_) break;
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
      if (abandoned_) break;
      continue;
    }
    if (index_ != nullptr && !index_failed_ && !erase_tasks_.empty()) {
      EraseTask task = std::move(erase_tasks_.front());
      erase_tasks_.pop_front();
      RunErase(lock, std::move(task));
      if (abandoned_) break;
      continue;
    }
    if (index_ != nullptr && !index_failed_ && !changes_.empty()) {
      ApplyChanges(lock);
      if (abandoned_) break;
      continue;
    }
    if (stop_index_) break;
  }
  std::vector<Answer> answers;
  FailIndex(absl::UnavailableError("disk tier: it is being closed"), answers);
  const bool file_in_use = file_in_use_;
  lock.unlock();
  for (const Answer& answer : answers) answer();
  index_.reset();
  // An operation that begins later would meet whatever has the file's number then.
  if (directory_.has_value() && file_in_use) directory_->LeaveOpen();
  directory_.reset();
  lock.lock();
  index_ended_ = true;
  changed_.notify_all();
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
    {
      std::lock_guard lock(mu_);
      if (abandoned_) return absl::UnavailableError("disk tier: it is gone");
      probe_.index_resets.Add();
    }
    index_.reset();
    TP_RETURN_IF_ERROR(RocksIndex::Destroy(directory_->index_path()));
    table = LoadIndex(written);
  }
  TP_RETURN_IF_ERROR(Annotate(table.status(), directory_->path()));
  std::lock_guard lock(mu_);
  if (abandoned_) return absl::UnavailableError("disk tier: it is gone");
  table_ = *std::move(table);
  // Two records: one for what is to be compressed, and one that stays for a load.
  read_bucket_.emplace(options_.read_bytes_per_second, 2 * record_bytes_, Now());
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
  const uint64_t pages = uint64_t{extents_} * record_pages();
  TP_ASSIGN_OR_RETURN(auto policy, CreatePolicy({.name = options_.eviction,
                                                 .capacity = ExtentTable::MaxRecords(pages, record_pages()),
                                                 .typical = extents_}));
  auto table = std::make_unique<ExtentTable>(pages, record_pages(), std::move(policy));
  TP_ASSIGN_OR_RETURN(index_, RocksIndex::Open(directory_->index_path()));
  TP_ASSIGN_OR_RETURN(written, index_->LoadWritten());
  const uint64_t space = FirstEight(space_);
  std::vector<RocksIndex::Change> drop;
  uint64_t damaged = 0;
  TP_RETURN_IF_ERROR(index_->Load(
      [&](const IndexEntry& entry) {
        const uint64_t room = record_bytes_ - header_bytes_;
        const bool possible = entry.payload_bytes > 0 && entry.payload_bytes <= room &&
                              entry.stored_bytes > 0 && entry.stored_bytes <= room;
        if (!possible ||
            !table->Restore(entry, RecordBytes(header_bytes_, entry.stored_bytes), entry.space != space))
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
  const auto fail = [&](IndexChange& change) {
    if (change.done == nullptr) return;
    answers.push_back([done = std::exchange(change.done, nullptr), status] { done(status); });
  };
  std::ranges::for_each(applying_, fail);
  std::ranges::for_each(changes_, fail);
  for (EraseTask& task : erase_tasks_) {
    answers.push_back([done = std::move(task.done), status] { done(status); });
  }
  erase_tasks_.clear();
  if (erasing_.has_value() && erasing_->done != nullptr)
    answers.push_back([done = std::exchange(erasing_->done, nullptr), status] { done(status); });
}

void DiskTier::Impl::ApplyChanges(std::unique_lock<std::mutex>& lock) {
  std::vector<RocksIndex::Change> changes;
  bool sync = false;
  while (!changes_.empty() && applying_.size() < kChangesPerBatch) {
    applying_.push_back(std::move(changes_.front()));
    changes_.pop_front();
    if (applying_.back().change.has_value()) changes.push_back(*applying_.back().change);
    sync |= applying_.back().done != nullptr;
  }
  const WrittenToday written = gate_->written();
  index_busy_ = true;
  index_busy_since_ = Now();
  lock.unlock();
  if (options_.before_index_change) options_.before_index_change();
  const absl::Status status = index_->Apply(changes, written, sync);
  lock.lock();
  index_busy_ = false;
  // Those that wait are answered here, unless that took too long for them (FailIndex).
  std::vector<IndexChange> batch = std::move(applying_);
  applying_.clear();
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
  erasing_ = std::move(task);
  uint64_t erased = 0;
  const Id end = table_->size();  // blocks that come later were no part of what was there
  for (Id id = 0; id < end && !index_failed_ && !abandoned_;) {
    for (const Id step = std::min(end, id + kEraseStep); id < step; ++id) {
      const bool live = table_->live(id);
      if ((!live && !table_->foreign(id)) || !erasing_->matches(table_->Listed(id))) continue;
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
    while (changes_.size() > kChangesPerBatch && !index_failed_ && !abandoned_) ApplyChanges(lock);
  }
  CountDone answer = std::move(erasing_->done);
  erasing_.reset();
  if (answer == nullptr) return;  // it took too long
  Done done = [erased, done = std::move(answer)](const absl::Status& status) {
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
  if (abandoned_) return;
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

}  // namespace tidepool
