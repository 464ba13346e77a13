#include "kvstore/disk/write_gate.h"

#include <algorithm>

namespace tidepool {
namespace {

// The bucket: a quarter of a second's worth, so that a burst is no more than the rate over any short while.
double BucketBytes(const WriteGate::Options& o) {
  return std::max(static_cast<double>(o.bytes_per_second) / 4, static_cast<double>(o.record_bytes));
}

}  // namespace

WriteGate::WriteGate(const Options& options, const WrittenToday& written, absl::Time now)
    : options_(options), written_(written), tokens_(BucketBytes(options)), refilled_(now) {}

void WriteGate::OnReadsActive(absl::Time now) { reads_until_ = now + options_.read_quiet; }

void WriteGate::OnReadDone(uint64_t bytes, absl::Time now) {
  OnReadsActive(now);
  // No more than two stores' worth is saved up: loads that came alone for a while do not make a burst.
  credit_ = std::min(credit_ + options_.read_share * static_cast<double>(bytes),
                     2 * static_cast<double>(options_.record_bytes));
}

void WriteGate::Refill(absl::Time now) {
  const double seconds = std::max(0.0, absl::ToDoubleSeconds(now - refilled_));
  tokens_ =
      std::min(tokens_ + seconds * static_cast<double>(options_.bytes_per_second), BucketBytes(options_));
  refilled_ = now;
}

WriteGate::Decision WriteGate::Ask(absl::Time now, uint32_t day, uint64_t bytes) {
  const auto wanted = static_cast<double>(bytes);
  if (written_.day != day) written_ = {day, 0};
  if (options_.bytes_per_day != 0 && written_.bytes + bytes > options_.bytes_per_day)
    return {Answer::kWornOut, absl::InfiniteDuration()};
  if (now < reads_until_ && credit_ < wanted) return {Answer::kLater, reads_until_ - now};
  if (options_.bytes_per_second != 0) {
    Refill(now);
    if (tokens_ < wanted)
      return {Answer::kLater,
              absl::Seconds((wanted - tokens_) / static_cast<double>(options_.bytes_per_second))};
  }
  return {};
}

void WriteGate::Take(absl::Time now, uint64_t bytes) {
  const auto taken = static_cast<double>(bytes);
  if (options_.bytes_per_second != 0) tokens_ -= taken;
  if (now < reads_until_) credit_ -= taken;
  written_.bytes += bytes;
}

}  // namespace tidepool
