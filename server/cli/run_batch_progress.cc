#include "server/cli/run_batch_progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/clock.h"
#include "base/log.h"

namespace tidepool {
namespace {

constexpr absl::Duration kTerminalEvery = absl::Milliseconds(200);
constexpr absl::Duration kLogEvery = absl::Seconds(5);
constexpr int kBarCells = 24;

}  // namespace

std::string ProgressText(const BatchCounts& counts, uint64_t done_before, absl::Duration elapsed) {
  const uint64_t done = counts.completed + counts.failed;
  const double part = counts.lines == 0 ? 1 : static_cast<double>(done) / static_cast<double>(counts.lines);
  const double rate =
      static_cast<double>(done - done_before) / std::max(1e-3, absl::ToDoubleSeconds(elapsed));
  std::string text = absl::StrFormat("%d of %d lines (%.1f%%), %d failed, %d in flight, %.1f lines/s", done,
                                     counts.lines, part * 100, counts.failed, counts.running, rate);
  if (counts.retries > 0) absl::StrAppendFormat(&text, ", %d retries", counts.retries);
  if (rate > 0 && counts.left() > 0) {
    const absl::Duration left = absl::Seconds(static_cast<double>(counts.left()) / rate);
    absl::StrAppend(&text, ", ", absl::FormatDuration(absl::Trunc(left, absl::Seconds(1))), " left");
  }
  return text;
}

BatchProgress::BatchProgress()
    : terminal_(::isatty(STDERR_FILENO) == 1),
      next_(Clock::Real().Now() + (terminal_ ? kTerminalEvery : kLogEvery)) {}

BatchProgress::~BatchProgress() { Clear(); }

bool BatchProgress::Due() {
  const absl::Time now = Clock::Real().Now();
  if (now < next_) return false;
  next_ = now + (terminal_ ? kTerminalEvery : kLogEvery);
  return true;
}

void BatchProgress::Reading(uint64_t bytes, uint64_t bytes_total) {
  if (!Due()) return;
  Show(bytes_total == 0 ? 1 : static_cast<double>(bytes) / static_cast<double>(bytes_total),
       absl::StrFormat("reading the input: %.1f of %.1f MB", static_cast<double>(bytes) / 1e6,
                       static_cast<double>(bytes_total) / 1e6));
}

void BatchProgress::Running(const BatchCounts& counts) {
  const uint64_t done = counts.completed + counts.failed;
  const absl::Time now = Clock::Real().Now();
  if (began_ == absl::InfiniteFuture()) {
    began_ = now;
    done_before_ = done;
  }
  if (!Due()) return;
  Show(counts.lines == 0 ? 1 : static_cast<double>(done) / static_cast<double>(counts.lines),
       ProgressText(counts, done_before_, now - began_));
}

void BatchProgress::Show(double part, const std::string& text) {
  if (!terminal_) return spdlog::info("{}", text);
  const int filled = static_cast<int>(std::clamp(part, 0.0, 1.0) * kBarCells);
  std::fprintf(stderr, "\r\x1b[K[%s%s] %s", std::string(static_cast<size_t>(filled), '#').c_str(),
               std::string(static_cast<size_t>(kBarCells - filled), '.').c_str(), text.c_str());
  std::fflush(stderr);
  shown_ = true;
}

void BatchProgress::Clear() {
  if (shown_) std::fputs("\r\x1b[K", stderr);
  shown_ = false;
}

}  // namespace tidepool
