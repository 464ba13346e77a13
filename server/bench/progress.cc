#include "server/bench/progress.h"

#include <unistd.h>

#include <algorithm>

#include "absl/strings/str_format.h"

namespace tidepool {
namespace {

constexpr size_t kBarCells = 30;
constexpr absl::Duration kLineInterval = absl::Seconds(5);

}  // namespace

ProgressLine::ProgressLine(std::string label, bool quiet)
    : label_(std::move(label)), quiet_(quiet), terminal_(::isatty(STDERR_FILENO) == 1) {}

ProgressLine::~ProgressLine() {
  if (open_) std::fputs("\n", stderr);
}

std::string ProgressLine::Bar(const LoadProgress& p, absl::Duration duration) {
  double share = 0;
  if (p.planned_max != UINT64_MAX) share = static_cast<double>(p.done) / static_cast<double>(p.planned_max);
  if (duration != absl::InfiniteDuration()) {
    share = std::max(share, absl::FDivDuration(p.elapsed, duration));
  }
  share = std::clamp(share, 0.0, 1.0);
  const auto filled = static_cast<size_t>(share * kBarCells);
  const double seconds = std::max(absl::ToDoubleSeconds(p.elapsed), 1e-3);
  return absl::StrFormat("[%s%s] %3.0f%% %d done, %d under way, %d failed, %.1f req/s, %.0f tok/s",
                         std::string(filled, '='), std::string(kBarCells - filled, ' '), share * 100, p.done,
                         p.sent - p.done, p.failed, static_cast<double>(p.done) / seconds,
                         static_cast<double>(p.output_tokens) / seconds);
}

void ProgressLine::Show(const LoadProgress& progress) {
  if (quiet_) return;
  if (terminal_) {
    // To the line's beginning, and whatever was longer is erased.
    std::fprintf(stderr, "\r%s%s\x1b[K", label_.c_str(), Bar(progress, duration_).c_str());
    std::fflush(stderr);
    open_ = true;
  } else if (progress.elapsed - last_ >= kLineInterval) {
    last_ = progress.elapsed;
    std::fprintf(stderr, "%s%s\n", label_.c_str(), Bar(progress, duration_).c_str());
  }
}

}  // namespace tidepool
