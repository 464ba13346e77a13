#include "kvstore/codec/encoded_tier.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/status.h"

namespace tidepool {
namespace {

// Erasures are small; so many waiting means that something floods.
constexpr size_t kMaxErasures = 65536;
constexpr size_t kMaxDecodes = 65536;
constexpr double kWeight = 0.1;  // of the latest measurement

void Blend(double& mean, double latest, bool first) {
  mean = first ? latest : mean + kWeight * (latest - mean);
}

}  // namespace

absl::StatusOr<std::unique_ptr<EncodedTier>> EncodedTier::Create(Options options) {
  if (options.codec == nullptr || options.inner == nullptr || options.metrics == nullptr ||
      options.max_waiting == 0 || options.layout.block_bytes() == 0)
    return absl::InvalidArgumentError(
        "encoded tier: a codec, a layout, a tier, metrics and room for a write are needed");
  const size_t need = options.codec->MaxEncodedBytes(options.layout),
               have = options.inner->caps().block_bytes;
  if (have < need)
    return absl::InvalidArgumentError("encoded tier: the tier below takes payloads of " +
                                      std::to_string(have) + " bytes, " + std::string(options.codec->name()) +
                                      " needs " + std::to_string(need) + " for layout " +
                                      options.layout.ToString());
  return std::unique_ptr<EncodedTier>(new EncodedTier(std::move(options)));
}

EncodedTier::EncodedTier(Options options)
    : codec_(*options.codec),
      layout_(options.layout),
      clock_(*options.clock),
      max_waiting_(options.max_waiting),
      probe_(*options.metrics, "disk"),
      inner_(std::move(options.inner)),
      changes_(options.max_waiting + kMaxErasures),
      decodes_(kMaxDecodes),
      changer_([this] { RunChanges(); }),
      decoder_([this] { RunDecodes(); }) {}

EncodedTier::~EncodedTier() {
  changes_.Close();  // what was accepted is still passed on
  changer_.join();
  inner_.reset();  // answers its reads; those that succeeded are decoded below
  decodes_.Close();
  decoder_.join();
}

BlockTier::Caps EncodedTier::caps() const {
  Caps caps = inner_->caps();
  caps.block_bytes = layout_.block_bytes();
  caps.max_writes = std::min(caps.max_writes, max_waiting_);
  caps.max_reads = std::min(caps.max_reads, kMaxDecodes);
  return caps;
}

TierStats EncodedTier::stats() const {
  TierStats stats = inner_->stats();
  std::lock_guard lock(mu_);
  stats.read.bytes_per_second *= ratio_;
  stats.write.bytes_per_second *= ratio_;
  if (stats.read.latency_seconds > 0) stats.read.latency_seconds += decode_seconds_;
  return stats;
}

// --- reads ---

BlockTier::ReadId EncodedTier::Read(const BlockKey& key, std::span<const int32_t> tokens,
                                    std::span<std::byte> dst, absl::Duration timeout, ReadDone done) {
  if (dst.size() < layout_.block_bytes()) {
    done(absl::InvalidArgumentError("encoded tier: buffer of " + std::to_string(dst.size()) +
                                    " bytes, a block has " + std::to_string(layout_.block_bytes())));
    return 0;
  }
  auto read = std::make_shared<PendingRead>();
  read->key = key;
  read->dst = dst.first(layout_.block_bytes());
  read->payload.resize(codec_.MaxEncodedBytes(layout_));
  read->deadline = clock_.Now() + timeout;
  read->done = std::move(done);
  ReadId id;
  {
    std::lock_guard lock(mu_);
    id = ++last_read_;
    reads_[id] = read;
  }
  // `read` keeps the payload until the tier below is done with it, whatever becomes of the entry.
  const ReadId inner =
      inner_->Read(key, tokens, read->payload, timeout,
                   [this, id, read](absl::StatusOr<Record> record) { OnRead(id, std::move(record)); });
  std::lock_guard lock(mu_);
  read->inner = inner;
  return id;
}

void EncodedTier::OnRead(ReadId id, absl::StatusOr<Record> record) {
  std::shared_ptr<PendingRead> failed;
  {
    std::lock_guard lock(mu_);
    const auto it = reads_.find(id);
    if (it == reads_.end()) return;  // cancelled meanwhile
    if (record.ok()) {
      it->second->record = std::move(*record);
      if (decodes_.TryPush(id)) return;
      record = absl::ResourceExhaustedError("encoded tier: too many reads");
    }
    failed = std::move(it->second);
    reads_.erase(it);
  }
  failed->done(record.status());
}

bool EncodedTier::CancelRead(ReadId id) {
  std::shared_ptr<PendingRead> read;
  ReadId inner = 0;
  {
    std::lock_guard lock(mu_);
    const auto it = reads_.find(id);
    if (it == reads_.end() || it->second->decoding) return false;
    if (!it->second->record) {
      inner = it->second->inner;
    } else {  // waits for its turn to be decoded
      read = std::move(it->second);
      reads_.erase(it);
    }
  }
  // The tier below answers with Cancelled, through OnRead, before this returns.
  if (read == nullptr) return inner != 0 && inner_->CancelRead(inner);
  read->done(absl::CancelledError("encoded tier: not wanted any more"));
  return true;
}

void EncodedTier::RunDecodes() {
  while (const std::optional<ReadId> id = decodes_.Pop(absl::InfiniteDuration())) Decode(*id);
}

void EncodedTier::Decode(ReadId id) {
  std::shared_ptr<PendingRead> read;
  {
    std::lock_guard lock(mu_);
    const auto it = reads_.find(id);
    if (it == reads_.end()) return;
    read = it->second;
    read->decoding = true;
  }
  const absl::Time begin = clock_.Now();
  absl::Status status = absl::DeadlineExceededError("encoded tier: decoding came too late");
  if (begin < read->deadline) {
    const std::span<const std::byte> payload = std::span(read->payload).first(read->record->bytes);
    status = codec_.Decode(layout_, payload, read->dst);
    const double seconds = absl::ToDoubleSeconds(clock_.Now() - begin);
    probe_.decode_seconds.Observe(seconds);
    std::lock_guard lock(mu_);
    Blend(decode_seconds_, seconds, decode_seconds_ == 0);
    if (!status.ok()) probe_.decode_failures.Add();
  }
  {
    std::lock_guard lock(mu_);
    reads_.erase(id);
  }
  if (status.ok()) {
    Record record = std::move(*read->record);
    record.bytes = layout_.block_bytes();
    read->done(std::move(record));
    return;
  }
  // Written by another codec, or damaged where no checksum of the tier's reaches: of no use to anyone.
  const bool useless = !absl::IsDeadlineExceeded(status);
  if (useless && PushChange(PendingErase{read->key, [](absl::Status) {}}, kMaxErasures)) {
    status = absl::DataLossError(status.message());
  }
  read->done(std::move(status));
}

// --- changes ---

bool EncodedTier::PushChange(Change change, size_t limit) {
  std::lock_guard lock(changes_mu_);
  const bool write = std::holds_alternative<PendingWrite>(change);
  if ((write ? writes_waiting_ : changes_.size()) >= limit || !changes_.TryPush(change)) return false;
  writes_waiting_ += write ? 1 : 0;
  return true;
}

void EncodedTier::Write(const BlockInfo& info, std::span<const std::byte> block, Done done) {
  if (block.size() != layout_.block_bytes()) {
    done(absl::InvalidArgumentError("encoded tier: a block of " + std::to_string(block.size()) +
                                    " bytes, not " + std::to_string(layout_.block_bytes())));
    return;
  }
  // Moved into the queue only if there is room: keep what a refusal needs.
  Done refuse = done;
  if (!PushChange(PendingWrite{info, block, std::move(done)}, max_waiting_))
    refuse(absl::ResourceExhaustedError("encoded tier: " + std::to_string(max_waiting_) +
                                        " writes wait already"));
}

void EncodedTier::Erase(const BlockKey& key, Done done) {
  Done refuse = done;
  if (!PushChange(PendingErase{key, std::move(done)}, max_waiting_ + kMaxErasures))
    refuse(absl::ResourceExhaustedError("encoded tier: too many erasures"));
}

void EncodedTier::EraseIf(Predicate matches, CountDone done) {
  CountDone refuse = done;
  if (!PushChange(PendingEraseIf{std::move(matches), std::move(done)}, max_waiting_ + kMaxErasures))
    refuse(absl::ResourceExhaustedError("encoded tier: too many erasures"));
}

void EncodedTier::RunChanges() {
  while (std::optional<Change> change = changes_.Pop(absl::InfiniteDuration())) {
    if (std::holds_alternative<PendingWrite>(*change)) {
      std::lock_guard lock(changes_mu_);
      --writes_waiting_;
    }
    std::visit([this](auto& c) { Do(c); }, *change);
  }
}

void EncodedTier::Do(PendingWrite& write) {
  // What is there already needs no encoding.
  if (inner_->Contains(write.info.key)) return write.done(absl::OkStatus());
  auto payload = std::make_shared<std::vector<std::byte>>(codec_.MaxEncodedBytes(layout_));
  const absl::Time begin = clock_.Now();
  const absl::StatusOr<size_t> bytes = codec_.Encode(layout_, write.block, *payload);
  probe_.encode_seconds.Observe(absl::ToDoubleSeconds(clock_.Now() - begin));
  if (!bytes.ok()) {
    probe_.encode_failures.Add();
    return write.done(bytes.status());
  }
  probe_.raw_bytes.Add(write.block.size());
  probe_.coded_bytes.Add(*bytes);
  {
    std::lock_guard lock(mu_);
    const double ratio = static_cast<double>(write.block.size()) / static_cast<double>(*bytes);
    Blend(ratio_, ratio, ratio_ == 1);
  }
  const std::span<const std::byte> coded = std::span(*payload).first(*bytes);
  inner_->Write(write.info, coded,
                [payload, done = std::move(write.done)](absl::Status status) { done(std::move(status)); });
}

}  // namespace tidepool
