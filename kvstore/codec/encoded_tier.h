#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/block_layout.h"
#include "base/bounded_queue.h"
#include "base/clock.h"
#include "kvstore/block_tier.h"
#include "kvstore/codec/block_codec.h"
#include "kvstore/codec/codec_probe.h"

namespace tidepool {

// EncodedTier: a BlockTier whose blocks lie encoded in another one (decorator). What its callers see are
// whole blocks; the tier below holds payloads of kvstore/codec/block_codec.h, which say themselves what they
// are. A payload that does not decode is a miss (DataLoss), and erased.
//
// Two threads of its own, so that nobody else pays: one encodes writes and passes erasures on behind them, in
// the order in which they came; one decodes what was read. Beyond `max_waiting` writes, Write answers
// ResourceExhausted (a store that is dropped); reads are bounded by the tier below.
class EncodedTier final : public BlockTier {
 public:
  struct Options {
    const BlockCodec* codec = nullptr;
    BlockLayout layout;
    std::unique_ptr<BlockTier> inner;  // of payloads up to codec->MaxEncodedBytes(layout)
    size_t max_waiting = 64;           // writes not yet encoded; each is a block of the caller's
    const Clock* clock = &Clock::Real();
    MetricRegistry* metrics = nullptr;
  };

  // InvalidArgument: a field that is missing, or an inner tier whose largest payload is too small.
  static absl::StatusOr<std::unique_ptr<EncodedTier>> Create(Options options);
  ~EncodedTier() override;

  // Of the tier below, but for block_bytes (the layout's) and max_writes.
  Caps caps() const override;
  ReadId Read(const BlockKey& key, std::span<const int32_t> tokens, std::span<std::byte> dst,
              absl::Duration timeout, ReadDone done) override;
  bool CancelRead(ReadId id) override;
  void Write(const BlockInfo& info, std::span<const std::byte> block, Done done) override;
  void Erase(const BlockKey& key, Done done) override;
  void EraseIf(Predicate matches, CountDone done) override;
  void Compress(const BlockKey& key, CompressDone done) override { inner_->Compress(key, std::move(done)); }
  std::optional<BlockKey> NextVictim(size_t) const override {
    return inner_->NextVictim(codec_.MaxEncodedBytes(layout_));
  }
  bool Contains(const BlockKey& key) const override { return inner_->Contains(key); }
  std::optional<TierEntry> Find(const BlockKey& key) const override { return inner_->Find(key); }
  Page List(uint64_t cursor, size_t max) const override { return inner_->List(cursor, max); }
  // Speeds are of blocks: the tier below's, times how much smaller payloads are, and the time to decode.
  TierStats stats() const override;
  TierHealth health() const override { return inner_->health(); }
  void SetObserver(TierObserver* observer) override { inner_->SetObserver(observer); }

 private:
  struct PendingWrite {
    BlockInfo info;
    std::span<const std::byte> block;
    Done done;
  };
  struct PendingErase {
    BlockKey key;
    Done done;
  };
  struct PendingEraseIf {
    Predicate matches;
    CountDone done;
  };
  using Change = std::variant<PendingWrite, PendingErase, PendingEraseIf>;

  // A read on its way. Whoever takes `done` out under mu_ answers it.
  struct PendingRead {
    BlockKey key;
    std::span<std::byte> dst;
    std::vector<std::byte> payload;
    absl::Time deadline;
    ReadDone done;
    ReadId inner = 0;       // as the tier below knows it; 0: not known (yet)
    bool decoding = false;  // its answer is being made
    std::optional<Record> record;
  };

  explicit EncodedTier(Options options);
  void RunChanges();
  void RunDecodes();
  void Do(PendingWrite& write);
  void Do(PendingErase& erase) { inner_->Erase(erase.key, std::move(erase.done)); }
  void Do(PendingEraseIf& erase) { inner_->EraseIf(std::move(erase.matches), std::move(erase.done)); }
  void OnRead(ReadId id, absl::StatusOr<Record> record);
  void Decode(ReadId id);
  bool PushChange(Change change, size_t limit);

  const BlockCodec& codec_;
  const BlockLayout layout_;
  const Clock& clock_;
  const size_t max_waiting_;
  CodecProbe probe_;
  std::unique_ptr<BlockTier> inner_;

  mutable std::mutex mu_;
  ReadId last_read_ = 0;
  absl::flat_hash_map<ReadId, std::shared_ptr<PendingRead>> reads_;
  double decode_seconds_ = 0;  // of a block, exponentially weighted
  double ratio_ = 1;           // bytes of a block / of its payload, the same

  std::mutex changes_mu_;  // makes a count and its push one step
  size_t writes_waiting_ = 0;
  BoundedQueue<Change> changes_;
  BoundedQueue<ReadId> decodes_;
  std::thread changer_, decoder_;
};

}  // namespace tidepool
