#pragma once

#include <algorithm>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/digest.h"
#include "kvstore/block_tier.h"

namespace tidepool {

// FakeBlockTier: the simplest correct BlockTier, in memory; answers before the call returns, unless a test
// holds its reads. Evicts the oldest record first. Tests may flip a bit of a record or switch the tier off.
class FakeBlockTier final : public BlockTier {
 public:
  FakeBlockTier(size_t block_bytes, size_t max_blocks) : block_bytes_(block_bytes), max_blocks_(max_blocks) {}
  ~FakeBlockTier() override { Release(); }

  Caps caps() const override {
    return {.name = "fake",
            .block_bytes = block_bytes_,
            .capacity_bytes = block_bytes_ * max_blocks_,
            .max_reads = kMaxReads,
            .max_writes = 1,
            .survives_restart = false};
  }

  ReadId Read(const BlockKey& key, std::span<const int32_t> tokens, std::span<std::byte> dst,
              absl::Duration timeout, ReadDone done) override {
    if (timeout <= absl::ZeroDuration()) {
      done(absl::DeadlineExceededError("fake tier: no time left"));
      return 0;
    }
    Held read{key, {tokens.begin(), tokens.end()}, dst, std::move(done)};
    bool full = false;
    {
      std::lock_guard lock(mu_);
      full = held_.size() >= kMaxReads;
      if (holding_ && !full) {
        held_.emplace(++last_read_, std::move(read));
        return last_read_;
      }
    }
    if (full) {
      read.done(absl::ResourceExhaustedError("fake tier: too many reads"));
    } else {
      Answer(std::move(read));
    }
    return 0;
  }
  bool CancelRead(ReadId id) override {
    Held read;
    {
      std::lock_guard lock(mu_);
      auto node = held_.extract(id);
      if (node.empty()) return false;
      read = std::move(node.mapped());
    }
    read.done(absl::CancelledError("fake tier: not wanted any more"));
    return true;
  }
  void Write(const BlockInfo& info, std::span<const std::byte> payload, Done done) override {
    done(WriteNow(info, payload));
  }
  void Erase(const BlockKey& key, Done done) override {
    {
      std::lock_guard lock(mu_);
      Drop(key, TierRemoval::kErased);
    }
    done(absl::OkStatus());
  }
  void EraseIf(Predicate matches, CountDone done) override {
    uint64_t erased = 0;
    {
      std::lock_guard lock(mu_);
      if (holding_erases_) return held_erases_.push_back(std::move(done));
      std::vector<BlockKey> keys;
      for (const auto& [key, record] : records_) {
        if (matches(EntryOf(record))) keys.push_back(key);
      }
      for (const BlockKey& key : keys) Drop(key, TierRemoval::kErased);
      erased = keys.size();
    }
    done(erased);
  }
  // A quarter less, it says.
  void Compress(const BlockKey& key, CompressDone done) override {
    absl::StatusOr<Compressed> answer = absl::NotFoundError("fake tier: no such block");
    {
      std::lock_guard lock(mu_);
      if (const auto it = records_.find(key); it != records_.end()) {
        const uint64_t shorter = block_bytes_ - block_bytes_ / 4;
        answer = Compressed{it->second.compressed ? shorter : block_bytes_, shorter};
        it->second.compressed = true;
      }
    }
    done(std::move(answer));
  }
  bool Contains(const BlockKey& key) const override {
    std::lock_guard lock(mu_);
    return health_.state == TierState::kOn && records_.contains(key);
  }
  std::optional<TierEntry> Find(const BlockKey& key) const override {
    std::lock_guard lock(mu_);
    const auto it = records_.find(key);
    if (health_.state != TierState::kOn || it == records_.end()) return std::nullopt;
    return EntryOf(it->second);
  }
  Page List(uint64_t cursor, size_t max) const override {
    std::lock_guard lock(mu_);
    Page page;
    for (auto it = by_number_.lower_bound(cursor); it != by_number_.end(); ++it) {
      if (page.entries.size() == max) {
        page.next = it->first;
        break;
      }
      page.entries.push_back(EntryOf(records_.at(it->second)));
    }
    return page;
  }
  TierStats stats() const override {
    std::lock_guard lock(mu_);
    return {.health = health_,
            .capacity_bytes = block_bytes_ * max_blocks_,
            .bytes = block_bytes_ * records_.size(),
            .blocks = records_.size(),
            .reads_waiting = held_.size(),
            .writes_waiting = 0,
            .read = speed_,
            .write = speed_};
  }
  TierHealth health() const override {
    std::lock_guard lock(mu_);
    return health_;
  }
  void SetObserver(TierObserver* observer) override {
    std::lock_guard lock(mu_);
    observer_ = observer;
  }

  // What a bad sector would do.
  void Corrupt(const BlockKey& key) {
    std::lock_guard lock(mu_);
    records_.at(key).bytes.at(0) ^= std::byte{1};
  }
  void SetHealth(TierHealth health) {
    std::lock_guard lock(mu_);
    health_ = std::move(health);
    if (observer_ != nullptr) observer_->OnHealth(health_);
  }
  void set_speed(TierSpeed speed) {
    std::lock_guard lock(mu_);
    speed_ = speed;
  }
  // From now on reads stay unanswered until Release.
  void Hold() {
    std::lock_guard lock(mu_);
    holding_ = true;
  }
  void Release() {
    std::map<ReadId, Held> reads;
    {
      std::lock_guard lock(mu_);
      holding_ = false;
      reads.swap(held_);
    }
    for (auto& [id, read] : reads) Answer(std::move(read));
  }
  // From now on EraseIf erases nothing and does not answer until the tier ends.
  void HoldErases() {
    std::lock_guard lock(mu_);
    holding_erases_ = true;
  }

 private:
  static constexpr size_t kMaxReads = 64;

  struct Stored {
    BlockInfo info;
    std::vector<std::byte> bytes;
    uint64_t checksum = 0;
    uint64_t number = 0;
    bool compressed = false;
  };
  struct Held {
    BlockKey key;
    std::vector<int32_t> tokens;
    std::span<std::byte> dst;
    ReadDone done;
  };

  void Answer(Held read) {
    auto record = ReadNow(read.key, read.tokens, read.dst);
    read.done(std::move(record));
  }

  absl::StatusOr<Record> ReadNow(const BlockKey& key, std::span<const int32_t> tokens,
                                 std::span<std::byte> dst) {
    std::lock_guard lock(mu_);
    if (health_.state != TierState::kOn) return absl::UnavailableError("fake tier: " + health_.reason);
    const auto it = records_.find(key);
    if (it == records_.end()) return absl::NotFoundError("fake tier: no such block");
    const Stored& stored = it->second;
    if (!tokens.empty() && !std::ranges::equal(tokens, stored.info.tokens))
      return absl::NotFoundError("fake tier: the block is of other tokens");
    if (dst.size() < stored.bytes.size())
      return absl::InvalidArgumentError("fake tier: buffer of " + std::to_string(dst.size()) +
                                        " bytes, the block has " + std::to_string(stored.bytes.size()));
    if (PayloadChecksum(stored.bytes) != stored.checksum) {
      Drop(key, TierRemoval::kDamaged);
      return absl::DataLossError("fake tier: checksum differs");
    }
    std::memcpy(dst.data(), stored.bytes.data(), stored.bytes.size());
    return Record{stored.info, stored.bytes.size()};
  }

  absl::Status WriteNow(const BlockInfo& info, std::span<const std::byte> payload) {
    std::lock_guard lock(mu_);
    if (health_.state != TierState::kOn) return absl::UnavailableError("fake tier: " + health_.reason);
    if (payload.empty() || payload.size() > block_bytes_)
      return absl::InvalidArgumentError("fake tier: payload of " + std::to_string(payload.size()) +
                                        " bytes, a block has at most " + std::to_string(block_bytes_));
    if (records_.contains(info.key)) return absl::OkStatus();
    if (max_blocks_ == 0) return absl::ResourceExhaustedError("fake tier: no room and nothing to evict");
    if (records_.size() == max_blocks_) Drop(BlockKey(by_number_.begin()->second), TierRemoval::kEvicted);
    by_number_[++last_number_] = info.key;
    records_[info.key] = {info, {payload.begin(), payload.end()}, PayloadChecksum(payload), last_number_};
    if (observer_ != nullptr) observer_->OnStored(info);
    return absl::OkStatus();
  }

  static TierEntry EntryOf(const Stored& s) {
    return {.key = s.info.key,
            .parent = s.info.parent,
            .tenant = s.info.tenant,
            .session = s.info.session,
            .turn = s.info.turn,
            .position = s.info.position,
            .bytes = s.bytes.size()};
  }

  void Drop(const BlockKey& key, TierRemoval why) {
    const auto it = records_.find(key);
    if (it == records_.end()) return;
    by_number_.erase(it->second.number);
    records_.erase(it);
    if (observer_ != nullptr) observer_->OnRemoved(key, why);
  }

  const size_t block_bytes_;
  const size_t max_blocks_;
  mutable std::mutex mu_;  // guards everything below
  absl::flat_hash_map<BlockKey, Stored> records_;
  std::map<uint64_t, BlockKey> by_number_;  // in the order of writing
  uint64_t last_number_ = 0;
  TierHealth health_;
  TierSpeed speed_;
  TierObserver* observer_ = nullptr;
  bool holding_ = false;
  bool holding_erases_ = false;
  std::vector<CountDone> held_erases_;
  std::map<ReadId, Held> held_;
  ReadId last_read_ = 0;
};

}  // namespace tidepool
