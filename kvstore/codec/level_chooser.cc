#include "kvstore/codec/level_chooser.h"

#include <algorithm>
#include <limits>

namespace tidepool {
namespace {

constexpr double kWeight = 0.25;  // of the latest measurement: a link changes within seconds
constexpr double kLeastSeconds = 0.001;
constexpr double kCaution =
    0.8;  // of the measured bandwidth is counted on: a mean lags behind a link that slows down

// Until something was measured: payload bytes of a block / its own, and the speed of coding.
constexpr double kFirstRatio[] = {1.0, 0.5, 0.5, 0.31, 0.19, 0.23, 0.27};  // by CodecId
constexpr double kFirstBytesPerSecond = 300e6;

void Blend(double& mean, double latest) { mean += kWeight * (latest - mean); }

}  // namespace

double CodecLoadSeconds(const CodecLevel& level, size_t blocks, double bytes_per_second,
                        double latency_seconds) {
  if (blocks == 0) return 0;
  if (!(bytes_per_second > 0)) return std::numeric_limits<double>::infinity();
  const double send = level.bytes / bytes_per_second;
  const double pace = std::max({level.encode_seconds, send, level.decode_seconds});
  return latency_seconds + level.encode_seconds + send + level.decode_seconds +
         pace * static_cast<double>(blocks - 1);
}

CodecChoice ChooseCodecLevel(std::span<const CodecLevel> levels, size_t blocks, double bytes_per_second,
                             double latency_seconds, double recompute_seconds, double budget_seconds) {
  CodecChoice best{.recompute = true, .level = 0, .seconds = recompute_seconds};
  for (size_t i = 0; i < levels.size(); ++i) {
    const double seconds = CodecLoadSeconds(levels[i], blocks, bytes_per_second, latency_seconds);
    if (seconds >= recompute_seconds) continue;  // exact and no later: computing it is better
    if (seconds <= budget_seconds) return {.recompute = false, .level = i, .seconds = seconds};
    if (seconds < best.seconds) best = {.recompute = false, .level = i, .seconds = seconds};
  }
  return best;
}

CodecLevelChooser::CodecLevelChooser(const BlockCodec& codec, const BlockLayout& layout) {
  const auto add = [&](CodecId id) {
    const double raw = static_cast<double>(layout.block_bytes());
    const double coding = id == CodecId::kNone ? 0 : raw / kFirstBytesPerSecond;
    levels_.push_back({id, raw * kFirstRatio[static_cast<size_t>(id)], coding, coding});
  };
  if (codec.name() == "cachegen") {
    for (const CodecId id : {CodecId::kNone, CodecId::kCacheGen3, CodecId::kCacheGen2, CodecId::kCacheGen1})
      add(id);
  } else {
    add(codec.id());
  }
}

CodecLevel* CodecLevelChooser::Find(CodecId codec) {
  const auto it = std::ranges::find(levels_, codec, &CodecLevel::codec);
  return it == levels_.end() ? nullptr : &*it;
}

void CodecLevelChooser::ObserveEncode(CodecId codec, size_t payload_bytes, double seconds) {
  const CodecLevel* level = Find(codec);
  if (level == nullptr || codec == CodecId::kNone) return;
  // The levels differ by known factors: what is seen of one tells of those that were not chosen for long.
  const double factor = static_cast<double>(payload_bytes) / level->bytes;
  for (CodecLevel& l : levels_) {
    if (l.codec == CodecId::kNone) continue;
    Blend(l.bytes, l.bytes * factor);
    Blend(l.encode_seconds, seconds);
  }
}

void CodecLevelChooser::ObserveDecode(CodecId codec, double seconds) {
  if (Find(codec) == nullptr || codec == CodecId::kNone) return;
  for (CodecLevel& l : levels_) {
    if (l.codec != CodecId::kNone) Blend(l.decode_seconds, seconds);
  }
}

void CodecLevelChooser::ObserveSend(double bytes, double seconds) {
  if (seconds < kLeastSeconds || bytes <= 0) return;
  const double latest = bytes / seconds;
  bytes_per_second_ =
      bytes_per_second_ == 0 ? latest : bytes_per_second_ + kWeight * (latest - bytes_per_second_);
}

CodecChoice CodecLevelChooser::Choose(size_t blocks, double recompute_seconds, double budget_seconds) const {
  if (bytes_per_second_ == 0) return {};
  return ChooseCodecLevel(levels_, blocks, kCaution * bytes_per_second_, 0, recompute_seconds,
                          budget_seconds);
}

}  // namespace tidepool
