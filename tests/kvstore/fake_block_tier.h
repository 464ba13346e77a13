#pragma once

#include <cstring>
#include <list>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/digest.h"
#include "kvstore/block_tier.h"

namespace tidepool {

// FakeBlockTier: the simplest correct BlockTier, in memory; answers before the call returns. Evicts the
// oldest record first. Tests may flip a bit of a record or fail the backend.
class FakeBlockTier final : public BlockTier {
 public:
  FakeBlockTier(size_t block_bytes, size_t max_blocks) : block_bytes_(block_bytes), max_blocks_(max_blocks) {}

  Caps caps() const override {
    return {.name = "fake",
            .block_bytes = block_bytes_,
            .capacity_bytes = block_bytes_ * max_blocks_,
            .max_inflight = 1,
            .survives_restart = false};
  }

  void Read(const BlockKey& key, std::span<std::byte> dst, Done done) override { done(ReadNow(key, dst)); }
  void Write(const BlockKey& key, std::span<const std::byte> block, Done done) override {
    done(WriteNow(key, block));
  }
  void Erase(const BlockKey& key, Done done) override {
    {
      std::lock_guard lock(mu_);
      Drop(key);
    }
    done(absl::OkStatus());
  }
  bool Contains(const BlockKey& key) const override {
    std::lock_guard lock(mu_);
    return records_.contains(key);
  }

  // What a bad sector would do.
  void Corrupt(const BlockKey& key) {
    std::lock_guard lock(mu_);
    records_.at(key).bytes.at(0) ^= std::byte{1};
  }
  void set_failed(bool failed) {
    std::lock_guard lock(mu_);
    failed_ = failed;
  }

 private:
  struct Record {
    std::vector<std::byte> bytes;
    uint64_t checksum = 0;
    std::list<BlockKey>::iterator age;
  };

  absl::Status ReadNow(const BlockKey& key, std::span<std::byte> dst) {
    std::lock_guard lock(mu_);
    if (failed_) return absl::UnavailableError("fake tier: failed");
    if (dst.size() != block_bytes_) return WrongSize(dst.size());
    const auto it = records_.find(key);
    if (it == records_.end()) return absl::NotFoundError("fake tier: no such block");
    if (PayloadChecksum(it->second.bytes) != it->second.checksum) {
      Drop(key);
      return absl::DataLossError("fake tier: checksum differs");
    }
    std::memcpy(dst.data(), it->second.bytes.data(), dst.size());
    return absl::OkStatus();
  }

  absl::Status WriteNow(const BlockKey& key, std::span<const std::byte> block) {
    std::lock_guard lock(mu_);
    if (failed_) return absl::UnavailableError("fake tier: failed");
    if (block.size() != block_bytes_) return WrongSize(block.size());
    if (records_.contains(key)) return absl::OkStatus();
    if (max_blocks_ == 0) return absl::ResourceExhaustedError("fake tier: no room and nothing to evict");
    if (records_.size() == max_blocks_) Drop(BlockKey(ages_.front()));
    ages_.push_back(key);
    records_[key] = {{block.begin(), block.end()}, PayloadChecksum(block), std::prev(ages_.end())};
    return absl::OkStatus();
  }

  absl::Status WrongSize(size_t got) const {
    return absl::InvalidArgumentError("fake tier: buffer of " + std::to_string(got) + " bytes, a block has " +
                                      std::to_string(block_bytes_));
  }

  void Drop(const BlockKey& key) {
    const auto it = records_.find(key);
    if (it == records_.end()) return;
    ages_.erase(it->second.age);
    records_.erase(it);
  }

  const size_t block_bytes_;
  const size_t max_blocks_;
  mutable std::mutex mu_;  // guards everything below
  absl::flat_hash_map<BlockKey, Record> records_;
  std::list<BlockKey> ages_;  // oldest first
  bool failed_ = false;
};

}  // namespace tidepool
