#include "kvstore/disk/write_gate.h"

#include <algorithm>

namespace tidepool {

WriteGate::WriteGate(const Options& options, const WrittenToday& written, absl::Time now)
    : options_(options), written_(written), bucket_(options.bytes_per_second, options.record_bytes, now) {}

void WriteGate::OnReadsActive(absl::Time now) { reads_until_ = now + options_.read_quiet; }

void WriteGate::OnReadDone(uint64_t bytes, absl::Time now) {
  OnReadsActive(now);
  // No more than two stores' worth is saved up: loads that came alone for a while do not make a burst.
  credit_ = std::min(credit_ + options_.read_share * static_cast<double>(bytes),
                     2 * static_cast<double>(options_.record_bytes));
}

WriteGate::Decision WriteGate::Ask(absl::Time now, uint32_t day, uint64_t bytes) {
  const auto wanted = static_cast<double>(bytes);
  if (written_.day != day) written_ = {day, 0};
  if (options_.bytes_per_day != 0 && written_.bytes + bytes > options_.bytes_per_day)
    return {Answer::kWornOut, absl::InfiniteDuration()};
  if (now < reads_until_ && credit_ < wanted) return {Answer::kLater, reads_until_ - now};
  const absl::Duration wait = bucket_.Wait(bytes, now);
  if (wait > absl::ZeroDuration()) return {Answer::kLater, wait};
  return {};
}

void WriteGate::Take(absl::Time now, uint64_t bytes) {
  bucket_.Take(bytes);
  if (now < reads_until_) credit_ -= static_cast<double>(bytes);
  written_.bytes += bytes;
}

}  // namespace tidepool
