// The half of DiskTier that encodes and decodes: stores on their way to the disk, and blocks that are there
// already (Compress). What is read is decoded in disk_tier.cc.
#include <algorithm>
#include <system_error>

#include "kvstore/disk/crc32c.h"
#include "kvstore/disk/disk_tier_impl.h"

namespace tidepool {

// Buffers that coders are through with.
void DiskTier::Impl::TakeBack() {
  std::lock_guard lock(mu_);
  free_buffers_.insert(free_buffers_.end(), returned_buffers_.begin(), returned_buffers_.end());
  returned_buffers_.clear();
}

// What is to be written of `payload`, in `area`: its encoding where that takes fewer pages and is worth it.
DiskTier::Impl::Stored DiskTier::Impl::Encode(PlaneCodec& codec, std::span<const std::byte> payload,
                                              std::span<std::byte> area) const {
  Stored out;
  out.payload_crc = Crc32c(payload);
  const auto limit = static_cast<size_t>(kWorthEncoding * static_cast<double>(payload.size()));
  const auto pages = [&](size_t bytes) { return table_->SizeOf(RecordBytes(header_bytes_, bytes)); };
  const auto bytes = codec.Encode(payload, area.first(limit));
  if (bytes.has_value() && pages(*bytes) < pages(payload.size())) {
    out.encoding = RecordEncoding::kPlanes;
    out.bytes = *bytes;
    out.crc = Crc32c(area.first(*bytes));
  } else {
    std::memcpy(area.data(), payload.data(), payload.size());
    out.bytes = payload.size();
    out.crc = out.payload_crc;
  }
  return out;
}

// ---------------------------------------------------------------------------------------------------------
// Stores.

void DiskTier::Impl::StartCoding(std::vector<Answer>& answers) {
  while (true) {
    std::shared_ptr<Coding> coding;
    {
      std::lock_guard lock(mu_);
      if (!breaker_.on() || code_queue_.empty() || free_buffers_.empty() ||
          writes_coded_ + writes_flying_ >= options_.write_depth) {
        return;
      }
      const auto it = writes_.find(code_queue_.front());
      code_queue_.pop_front();
      if (it == writes_.end() || it->second.coding != nullptr) continue;  // answered since
      if (it->second.erased) {
        probe_.write_cancelled.Add();
        AnswerWrite(
            std::move(it->second), [] { return absl::CancelledError("disk tier: the block was erased"); },
            answers);
        writes_.erase(it);
        continue;
      }
      coding = std::make_shared<Coding>();
      coding->key = it->first;
      coding->payload = it->second.payload;
      coding->buffer = free_buffers_.back();
      free_buffers_.pop_back();
      it->second.coding = coding;
      ++writes_coded_;
    }
    coders_->Encode([this, coding](PlaneCodec& codec) { RunCoding(codec, coding); });
  }
}

// On a coder's thread.
void DiskTier::Impl::RunCoding(PlaneCodec& codec, const std::shared_ptr<Coding>& coding) {
  const auto give_back = [&] {
    returned_buffers_.push_back(coding->buffer);
    --writes_coded_;
  };
  std::vector<Answer> deferred;
  bool dropped = false;
  {
    std::lock_guard lock(mu_);
    dropped = coding->state == Coding::State::kDropped;
    if (dropped) {
      give_back();
    } else {
      coding->state = Coding::State::kRunning;
    }
  }
  if (!dropped) {
    const Stored stored = Encode(codec, coding->payload, Buffer(coding->buffer).subspan(header_bytes_));
    probe_.coded_payload_bytes.Add(coding->payload.size());
    probe_.coded_stored_bytes.Add(stored.bytes);
    std::lock_guard lock(mu_);
    coding->stored = stored;
    coding->state = Coding::State::kDone;
    const double share = static_cast<double>(stored.bytes) / static_cast<double>(coding->payload.size());
    coded_share_ += (coded_share_ == 0 ? 1 : kCodedShareWeight) * (share - coded_share_);
    deferred.swap(coding->deferred);
    const auto it = writes_.find(coding->key);
    if (it != writes_.end() && it->second.coding == coding) {
      write_queue_.push_back(coding->key);
      write_at_ = absl::InfinitePast();
    } else {
      give_back();
    }
  }
  WakeIo();
  for (const Answer& answer : deferred) answer();
}

// ---------------------------------------------------------------------------------------------------------
// Blocks that are there already. One is read, encoded, decoded again and compared, written elsewhere, and
// only then does the index point there; it is pinned meanwhile, so that it is not evicted for its own copy.

void DiskTier::Impl::Compress(const BlockKey& key, CompressDone done) {
  absl::StatusOr<Compressed> answer = Compressed{};
  bool accepted = false;
  {
    std::lock_guard lock(mu_);
    const auto same_key = [&](const std::shared_ptr<Recode>& r) { return r->key == key; };
    const Id extent = table_ == nullptr ? kNoExtent : table_->Find(key).value_or(kNoExtent);
    if (!breaker_.on() || stop_) {
      answer = absl::UnavailableError("disk tier is off or opening: nothing can be compressed");
    } else if (extent == kNoExtent) {
      answer = absl::NotFoundError("disk tier: no such block");
    } else if (table_->encoding(extent) != RecordEncoding::kPlain) {
      const uint64_t bytes = kDiskPageBytes * table_->pages(extent);
      answer = Compressed{bytes, bytes};
    } else if (recode_queue_.size() >= kRecodesMax || std::ranges::any_of(recode_queue_, same_key) ||
               std::ranges::any_of(recodes_, same_key)) {
      answer = absl::ResourceExhaustedError(absl::StrCat("disk tier: ", recode_queue_.size(),
                                                         " blocks wait to be compressed, or this one does"));
    } else {
      auto recode = std::make_shared<Recode>();
      recode->key = key;
      recode->done = std::move(done);
      recode->accepted = Now();
      recode_queue_.push_back(std::move(recode));
      read_at_ = absl::InfinitePast();
      accepted = true;
    }
  }
  if (accepted) {
    WakeIo();
  } else {
    done(std::move(answer));
  }
}

void DiskTier::Impl::AnswerRecode(Recode& recode, absl::StatusOr<Compressed> answer,
                                  std::vector<Answer>& answers) {
  if (recode.done == nullptr) return;
  answers.push_back(
      [done = std::exchange(recode.done, nullptr), answer = std::move(answer)] { done(answer); });
}

// Answers it and gives back what it holds; holds mu_. Not for one in recode_queue_, which holds nothing.
void DiskTier::Impl::EndRecode(const std::shared_ptr<Recode>& recode, absl::StatusOr<Compressed> answer,
                               std::vector<Answer>& answers) {
  AnswerRecode(*recode, std::move(answer), answers);
  table_->Unpin(recode->extent);
  free_buffers_.push_back(recode->from);
  free_buffers_.push_back(recode->to);
  std::erase(recodes_, recode);
}

void DiskTier::Impl::StartRecodes(absl::Time now, std::vector<Answer>& answers) {
  std::vector<std::shared_ptr<Recode>> coded;
  {
    std::lock_guard lock(mu_);
    for (const auto& recode : recodes_) {
      if (recode->stage == Recode::Stage::kCoded) coded.push_back(recode);
    }
  }
  for (const auto& recode : coded) StartRecodeWrite(now, recode, answers);
  StartRecodeReads(now, answers);
}

void DiskTier::Impl::StartRecodeReads(absl::Time now, std::vector<Answer>& answers) {
  while (true) {
    Flight flight{.kind = FlightKind::kRecodeRead};
    {
      std::lock_guard lock(mu_);
      // Loads first.
      if (!breaker_.on() || recode_queue_.empty() || recodes_.size() >= kRecodeDepth ||
          !read_queue_.empty() || free_buffers_.size() < 2) {
        return;
      }
      const std::shared_ptr<Recode> recode = recode_queue_.front();
      const auto extent = table_->Find(recode->key);
      if (!extent.has_value()) {
        AnswerRecode(*recode, absl::NotFoundError("disk tier: no such block"), answers);
        recode_queue_.pop_front();
        continue;
      }
      // It may have been evicted, and stored again, since Compress looked.
      if (table_->encoding(*extent) != RecordEncoding::kPlain) {
        const uint64_t bytes = kDiskPageBytes * table_->pages(*extent);
        AnswerRecode(*recode, Compressed{bytes, bytes}, answers);
        recode_queue_.pop_front();
        continue;
      }
      flight.bytes = RecordBytes(header_bytes_, table_->stored_bytes(*extent));
      // A load that comes now does not wait for what this takes.
      if (const absl::Duration pause = read_bucket_->Wait(flight.bytes + record_bytes_, now);
          pause > absl::ZeroDuration()) {
        read_at_ = now + pause;
        return;
      }
      read_bucket_->Take(flight.bytes);
      recode_queue_.pop_front();
      table_->Pin(*extent);
      recode->stage = Recode::Stage::kReading;
      recode->extent = *extent;
      recode->stamp = table_->stamp(*extent);
      recode->before = kDiskPageBytes * table_->pages(*extent);
      for (size_t* buffer : {&recode->from, &recode->to}) {
        *buffer = free_buffers_.back();
        free_buffers_.pop_back();
      }
      recodes_.push_back(recode);
      flight.extent = *extent;
      flight.offset = PageOffset(table_->page(*extent));
      flight.buffer = recode->from;
      flight.payload_bytes = table_->payload_bytes(*extent);
      flight.encoding = table_->encoding(*extent);
      flight.version = table_->version(*extent);
      flight.started = now;
      flight.key = recode->key;
      flight.stamp = recode->stamp;
      flight.recode = recode;
    }
    Launch(flight, Buffer(flight.buffer).first(flight.bytes));
  }
}

void DiskTier::Impl::OnRecodeRead(const Flight& flight, int error) {
  const std::shared_ptr<Recode> recode = flight.recode;
  std::vector<Answer> answers;
  if (error != 0) {
    std::lock_guard lock(mu_);
    if (table_->live(flight.extent) && table_->stamp(flight.extent) == flight.stamp)
      RemoveBlock(flight.extent, TierRemoval::kDamaged, probe_.evicted_damaged);
    EndRecode(recode, absl::DataLossError("disk tier: the block cannot be read"), answers);
    SwitchOff(probe_.fault_io,
              absl::StrCat(directory_path_, ": reading failed: ", std::generic_category().message(error)),
              answers);
  } else {
    recode->stage = Recode::Stage::kCoding;
    coders_->Encode([this, flight](PlaneCodec& codec) {
      RunRecode(codec, flight);
      {
        std::lock_guard lock(mu_);
        flight.recode->stage = Recode::Stage::kCoded;
        write_at_ = absl::InfinitePast();
      }
      WakeIo();
    });
  }
  Run(answers);
}

// On a coder's thread, which has the recode to itself meanwhile (but for `done`).
void DiskTier::Impl::RunRecode(PlaneCodec& codec, const Flight& flight) const {
  Recode& recode = *flight.recode;
  auto header = TakeHeader(flight);
  recode.status = header.status();
  if (!header.ok()) return;
  recode.header = *std::move(header);
  const auto payload = Buffer(recode.from).subspan(header_bytes_, recode.header.payload_bytes);
  if (Crc32c(payload) != recode.header.payload_crc) {
    recode.status = absl::DataLossError("the payload's checksum differs");
    return;
  }
  const auto area = Buffer(recode.to).subspan(header_bytes_);
  recode.stored = Encode(codec, payload, area);
  if (recode.stored.encoding == RecordEncoding::kPlain) return;
  // The only copy is about to go: what is not restored to the bit must not take its place.
  std::vector<std::byte> restored(payload.size());
  const absl::Status decoded = codec.Decode(area.first(recode.stored.bytes), restored);
  if (decoded.ok() && std::ranges::equal(restored, payload)) return;
  spdlog::error("disk tier: block {} does not come back from its encoding; it stays as it is",
                recode.key.ToHex());
  recode.stored = {};
}

void DiskTier::Impl::StartRecodeWrite(absl::Time now, const std::shared_ptr<Recode>& recode,
                                      std::vector<Answer>& answers) {
  Flight flight{.kind = FlightKind::kRecodeWrite};
  RecordHeader header;
  {
    std::lock_guard lock(mu_);
    const bool there = table_->live(recode->extent) && table_->stamp(recode->extent) == recode->stamp;
    if (!recode->status.ok()) {
      const bool damaged = absl::IsDataLoss(recode->status);
      (damaged ? probe_.read_damaged : probe_.read_mismatch).Add();
      if (there) {
        RemoveBlock(recode->extent, TierRemoval::kDamaged,
                    damaged ? probe_.evicted_damaged : probe_.evicted_mismatch);
      }
      return EndRecode(recode, recode->status, answers);
    }
    if (!there) return EndRecode(recode, absl::NotFoundError("disk tier: the block is gone"), answers);
    if (recode->stored.encoding == RecordEncoding::kPlain) {
      probe_.compressed_not_worth.Add();
      return EndRecode(recode, Compressed{recode->before, recode->before}, answers);
    }
    if (!breaker_.on()) return EndRecode(recode, absl::UnavailableError("disk tier is off"), answers);
    if (now >= recode->accepted + kRecodeWaits * options_.write_wait) {
      return EndRecode(
          recode, absl::ResourceExhaustedError("disk tier: no time to compress beside other work"), answers);
    }
    if (changes_.size() >= kChangesMax) return;  // the next batch of the index comes back here
    flight.bytes = RecordBytes(header_bytes_, recode->stored.bytes);
    const WriteGate::Decision decision = gate_->Ask(now, WallDay(), flight.bytes);
    if (decision.answer == WriteGate::Answer::kLater) {
      write_at_ = std::min(write_at_, now + decision.wait);
      return;
    }
    if (decision.answer == WriteGate::Answer::kWornOut) {
      return EndRecode(
          recode, absl::ResourceExhaustedError("disk tier: the day's budget of writes is used up"), answers);
    }
    const auto fresh = Allocate(flight.bytes);
    if (!fresh.has_value()) {
      return EndRecode(recode, absl::ResourceExhaustedError("disk tier: no room and nothing to evict"),
                       answers);
    }
    gate_->Take(now, flight.bytes);
    recode->stage = Recode::Stage::kWriting;
    recode->fresh = *fresh;
    recode->fresh_stamp = {run_, ++next_serial_};
    header = HeaderOf(recode->header.info, *fresh, recode->header.payload_bytes, recode->stored,
                      recode->fresh_stamp);
    flight.extent = *fresh;
    flight.offset = PageOffset(table_->page(*fresh));
    flight.buffer = recode->to;
    flight.started = now;
    flight.recode = recode;
  }
  const std::span<std::byte> memory = Buffer(flight.buffer).first(flight.bytes);
  if (const absl::Status sealed = SealRecord(header, memory); !sealed.ok()) {
    std::lock_guard lock(mu_);
    table_->Abandon(recode->fresh);
    return EndRecode(recode, absl::InternalError(absl::StrCat("disk tier: ", std::string(sealed.message()))),
                     answers);
  }
  Launch(flight, memory);
}

void DiskTier::Impl::OnRecodeWrite(const Flight& flight, int error) {
  const std::shared_ptr<Recode> recode = flight.recode;
  std::vector<Answer> answers;
  {
    std::lock_guard lock(mu_);
    if (error != 0) {
      EndRecode(recode, absl::UnavailableError("disk tier: writing failed"), answers);
      WriteFailed(recode->fresh, error, answers);
    } else if (!table_->live(recode->extent) || table_->stamp(recode->extent) != recode->stamp) {
      table_->Abandon(recode->fresh);
      EndRecode(recode, absl::NotFoundError("disk tier: the block was erased"), answers);
    } else {
      IndexEntry entry = table_->Entry(recode->extent);
      entry.version = kRecordVersion;
      entry.place = table_->page(recode->fresh);
      entry.stamp = recode->fresh_stamp;
      entry.space = FirstEight(space_);
      entry.encoding = recode->stored.encoding;
      entry.stored_bytes = recode->stored.bytes;
      const uint64_t after = kDiskPageBytes * table_->pages(recode->fresh);
      table_->Relocate(recode->extent, recode->fresh, entry);
      changes_.push_back({RocksIndex::Change{entry.key, entry}, nullptr});
      probe_.compressed_shorter.Add();
      probe_.coded_payload_bytes.Add(recode->header.payload_bytes);
      probe_.coded_stored_bytes.Add(recode->stored.bytes);
      EndRecode(recode, Compressed{recode->before, after}, answers);
    }
    probe_.written_bytes.Add(error == 0 ? flight.bytes : 0);
    UpdateGauges();
  }
  Run(answers);
  changed_.notify_all();
}

}  // namespace tidepool
