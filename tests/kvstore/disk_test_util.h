#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <bit>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "kvstore/disk/disk_tier.h"
#include "kvstore/disk/record.h"

namespace tidepool {

// TempDir: a directory of the test's own on a real file system; removed with all it holds. Handle.
class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "tidepool-disk-XXXXXX").string();
    if (mkdtemp(name.data()) != nullptr) path_ = name;
  }
  ~TempDir() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// 4 tokens and 256 bytes a block: one page a record.
inline BlockLayout SmallLayout() {
  return {.layers = 2, .kv_heads = 1, .head_dim = 8, .block_tokens = 4, .dtype = DType::kBF16};
}

// 8 tokens and 32 KiB a block: nine pages a record, of which an encoding takes six or seven.
inline BlockLayout NumbersLayout() {
  return {.layers = 4, .kv_heads = 4, .head_dim = 64, .block_tokens = 8, .dtype = DType::kBF16};
}

inline uint64_t BytesFor(const BlockLayout& layout, size_t records) {
  return kDiskPageBytes + records * RecordBytes(RecordHeaderBytes(layout.block_tokens), layout.block_bytes());
}

// A tier for tests: quick to give up, quick to look again.
inline DiskTierOptions SmallOptions(const std::string& path, MetricRegistry& metrics, size_t records = 8) {
  DiskTierOptions o;
  o.path = path;
  o.name = "worker";
  o.fingerprint = "model";
  o.layout = SmallLayout();
  o.bytes = BytesFor(o.layout, records);
  o.slow_op = absl::Milliseconds(300);
  o.read_quiet = absl::ZeroDuration();
  o.probe_after = absl::Milliseconds(20);
  o.probe_after_max = absl::Milliseconds(200);
  o.lock_wait = absl::ZeroDuration();
  o.metrics = &metrics;
  return o;
}

inline std::unique_ptr<DiskTier> MustCreate(DiskTierOptions options) {
  auto tier = DiskTier::Create(std::move(options));
  EXPECT_TRUE(tier.ok()) << tier.status();
  return *std::move(tier);
}

// Created, and on.
inline std::unique_ptr<DiskTier> MustOpen(DiskTierOptions options) {
  auto tier = MustCreate(std::move(options));
  EXPECT_EQ(tier->WaitOpened(absl::Seconds(20)), (TierHealth{TierState::kOn, ""}));
  return tier;
}

// Waits until the tier's state is `state`; false after 20 s.
inline bool AwaitState(const BlockTier& tier, TierState state) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (tier.health().state != state) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// Block n: contents, key and info follow from the number alone.
inline BlockKey KeyOf(uint64_t n) {
  BlockKey key;
  Rng rng(n);
  for (size_t i = 0; i < 32; i += 8) {
    const uint64_t v = rng.Next();
    std::memcpy(key.bytes.data() + i, &v, 8);
  }
  return key;
}
inline BlockInfo InfoOf(uint64_t n) {
  BlockInfo info;
  info.key = KeyOf(n);
  const auto token = static_cast<int32_t>(n);
  info.tokens = {token, token + 1, token + 2, token + 3};
  info.tenant = n % 2 == 0 ? "even" : "odd";
  info.session = n % 3 + 1;
  return info;
}
inline std::vector<std::byte> BytesOf(uint64_t n, size_t bytes = 256) {
  std::vector<std::byte> out(bytes);
  Rng rng(~n);
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t v = rng.Next();
    std::memcpy(out.data() + i, &v, std::min<size_t>(8, bytes - i));
  }
  return out;
}

// The same as numbers (bf16) of normal size, as KV has them: an encoding makes them shorter by a third.
inline std::vector<std::byte> NumbersOf(uint64_t n, size_t bytes) {
  Rng rng(~n);
  std::vector<std::byte> out(bytes);
  for (size_t i = 0; i + 2 <= bytes; i += 2) {
    double sum = 0;
    for (int k = 0; k < 4; ++k) sum += static_cast<double>(rng.Below(1 << 20)) / (1 << 19) - 1;
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(sum)) >> 16;
    std::memcpy(out.data() + i, &bits, 2);
  }
  return out;
}

template <typename T>
T AwaitAnswer(const std::function<void(std::function<void(T)>)>& call) {
  auto answer = std::make_shared<std::promise<T>>();
  auto future = answer->get_future();
  call([answer](T s) { answer->set_value(std::move(s)); });  // throws if answered twice
  if (future.wait_for(std::chrono::seconds(20)) != std::future_status::ready)
    return absl::DeadlineExceededError("the tier did not answer within 20 s");
  return future.get();
}

inline absl::Status Store(BlockTier& tier, uint64_t n, const std::vector<std::byte>& bytes) {
  const BlockInfo info = InfoOf(n);
  return AwaitAnswer<absl::Status>([&](BlockTier::Done d) { tier.Write(info, bytes, std::move(d)); });
}

inline absl::Status Store(BlockTier& tier, uint64_t n) {
  return Store(tier, n, BytesOf(n, tier.caps().block_bytes));
}

// The status; DataLoss "wrong bytes" where the tier said OK and the bytes are others.
inline absl::Status Load(BlockTier& tier, uint64_t n, const std::vector<std::byte>& bytes) {
  const BlockInfo info = InfoOf(n);
  std::vector<std::byte> dst(tier.caps().block_bytes);
  const auto record = AwaitAnswer<absl::StatusOr<BlockTier::Record>>(
      [&](BlockTier::ReadDone d) { tier.Read(info.key, info.tokens, dst, absl::Seconds(10), std::move(d)); });
  if (!record.ok()) return record.status();
  if (record->info != info || record->bytes != dst.size() || dst != bytes)
    return absl::DataLossError("wrong bytes");
  return absl::OkStatus();
}
inline absl::Status Load(BlockTier& tier, uint64_t n) {
  return Load(tier, n, BytesOf(n, tier.caps().block_bytes));
}
inline absl::StatusOr<BlockTier::Compressed> Compress(BlockTier& tier, uint64_t n) {
  return AwaitAnswer<absl::StatusOr<BlockTier::Compressed>>(
      [&](BlockTier::CompressDone d) { tier.Compress(KeyOf(n), std::move(d)); });
}
inline bool WrongBytes(const absl::Status& status) { return status.message() == "wrong bytes"; }

inline absl::Status Forget(BlockTier& tier, uint64_t n) {
  return AwaitAnswer<absl::Status>([&](BlockTier::Done d) { tier.Erase(KeyOf(n), std::move(d)); });
}

// Flips one bit of a file.
inline void FlipBit(const std::string& file, uint64_t offset, int bit) {
  std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
  f.seekg(static_cast<std::streamoff>(offset));
  char c = 0;
  f.get(c);
  c = static_cast<char>(c ^ (1 << bit));
  f.seekp(static_cast<std::streamoff>(offset));
  f.put(c);
}

// Damages the payload of the record of `key`.
inline void DamagePayload(const std::string& blocks_file, const BlockLayout& layout, const BlockKey& key) {
  const size_t header = RecordHeaderBytes(layout.block_tokens);
  std::ifstream in(blocks_file, std::ios::binary);
  const std::string all{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  for (size_t at = kDiskPageBytes; at + header <= all.size(); at += kDiskPageBytes) {
    const auto found = DecodeRecordHeader(std::as_bytes(std::span(all.data() + at, header)));
    if (found.ok() && found->info.key == key) FlipBit(blocks_file, at + header, 0);
  }
}

inline uint64_t CounterOf(MetricRegistry& metrics, const std::string& name, const Labels& labels) {
  return metrics.AddCounter(name, "", labels).value();
}

}  // namespace tidepool
