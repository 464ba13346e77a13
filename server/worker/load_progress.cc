#include "server/worker/load_progress.h"

#include <unistd.h>

#include <cstdio>
#include <string>

#include "base/clock.h"
#include "base/log.h"

namespace tidepool {
namespace {

constexpr absl::Duration kLineInterval = absl::Seconds(5);
constexpr absl::Duration kBarInterval = absl::Milliseconds(100);
constexpr uint64_t kBarWidth = 40;

}  // namespace

LoadProgressPrinter::LoadProgressPrinter()
    : terminal_(isatty(STDERR_FILENO) == 1), start_(Clock::Real().Now()), last_(start_) {}

LoadProgressPrinter::~LoadProgressPrinter() {
  if (bar_open_) std::fputc('\n', stderr);
}

void LoadProgressPrinter::Update(uint64_t bytes_done, uint64_t bytes_total) {
  const absl::Time now = Clock::Real().Now();
  if (bytes_total == 0 || now - last_ < (terminal_ ? kBarInterval : kLineInterval)) return;
  last_ = now;
  const double share = static_cast<double>(bytes_done) / static_cast<double>(bytes_total);
  const double mib = static_cast<double>(bytes_done) / (1 << 20);
  if (terminal_) {
    const uint64_t filled = bytes_done * kBarWidth / bytes_total;
    std::fprintf(stderr, "\rloading [%s%s] %3.0f%% %.0f MiB", std::string(filled, '#').c_str(),
                 std::string(kBarWidth - filled, ' ').c_str(), share * 100, mib);
    bar_open_ = true;
  } else {
    const absl::Duration left = share > 0 ? (now - start_) * (1 / share - 1) : absl::ZeroDuration();
    spdlog::info("loading weights: {:.0f} MiB, {:.0f}%, {:.0f} s left", mib, share * 100,
                 absl::ToDoubleSeconds(left));
  }
}

}  // namespace tidepool
