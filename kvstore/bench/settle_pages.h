#pragma once

#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/probe.h"
#include "kvstore/block_pool.h"
#include "kvstore/huge_pages.h"

namespace tidepool {

// A benchmark measures a worker that has run for a while: its memory is on huge pages so far as it will be.
// Uses the whole pool once, waits until no more pages are moved (2 s without one, 20 s in all).
inline void SettlePages(BlockPool& pool, MetricRegistry& metrics) {
  if (auto all = pool.Reserve(pool.stats().slots); all.ok()) BlockLease::DropAll(std::move(*all));
  const size_t whole = pool.arena().for_huge_pages().size() / kHugePageBytes * kHugePageBytes;
  const Gauge& bytes = HugePageProbe(metrics).bytes;
  const absl::Time end = absl::Now() + absl::Seconds(20);
  absl::Time moved = absl::Now();
  for (double last = 0; bytes.value() < static_cast<double>(whole);) {
    absl::SleepFor(absl::Milliseconds(10));
    const absl::Time now = absl::Now();
    if (bytes.value() != last) moved = now;
    last = bytes.value();
    if (now > end || now - moved > absl::Seconds(2)) break;
  }
}

}  // namespace tidepool
