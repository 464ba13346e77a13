#include "server/cli/role_process.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "base/log.h"
#include "kvstore/disk/disk_tier.h"
#include "server/cli/config_flags.h"

namespace tidepool {
namespace {

// -1: there is none, or it was closed.
int& ReadyFd() {
  static int fd = -1;
  return fd;
}

constexpr absl::Duration kLookForEnd = absl::Milliseconds(100);

sigset_t StopSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

// Waits for one of `set`; 0: none came within `timeout`.
int WaitFor(const sigset_t& set, absl::Duration timeout) {
  const timespec wait = absl::ToTimespec(timeout);
  return std::max(0, sigtimedwait(&set, nullptr, &wait));
}

// Whether the process has to end by EndNow: a thread hangs in a disk, and whatever waits for it at the end of
// a process would wait for ever.
bool SomethingHangs() { return DiskTiersLeftBehind() > 0; }

[[noreturn]] void EndNow(int exit_code) {
  spdlog::default_logger()->flush();
  _exit(exit_code);
}

}  // namespace

void ReportReady(const ReadyInfo& info) {
  const int fd = std::exchange(ReadyFd(), -1);
  if (fd < 0) return;
  const std::string line = FormatReadyLine(info);
  // Shorter than PIPE_BUF, so it goes out whole. A supervisor that is gone needs no line.
  if (write(fd, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    spdlog::warn("the readiness line could not be written");
  }
  close(fd);
}

void TakeReadyFd() {
  const char* text = std::getenv(kReadyFdEnv);
  int fd = -1;
  if (text != nullptr && absl::SimpleAtoi(text, &fd) && fd > 2 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0) {
    ReadyFd() = fd;
  }
  unsetenv(kReadyFdEnv);
}

int RunRole(const std::string& role, absl::Duration drain_timeout,
            const std::function<absl::StatusOr<RunningRole>()>& start) {
  const sigset_t set = StopSignals();
  sigset_t all = set;
  sigaddset(&all, SIGHUP);
  sigprocmask(SIG_BLOCK, &all, nullptr);
  signal(SIGPIPE, SIG_IGN);
  // While the role loads nothing is in flight: a signal ends the process at once.
  std::atomic<bool> starting{true};
  std::thread watcher([&starting, &set] {
    while (starting) {
      if (WaitFor(set, absl::Milliseconds(10)) != 0) _exit(0);
    }
  });
  auto started = [&]() -> absl::StatusOr<RunningRole> {
    try {
      return start();
    } catch (const std::bad_alloc&) {
      return absl::ResourceExhaustedError("not enough memory");
    }
  }();
  starting = false;
  watcher.join();
  if (!started.ok()) {
    spdlog::error("{} cannot start: {}", role, std::string(started.status().message()));
    const int exit_code = ExitCode(started.status());
    if (SomethingHangs()) EndNow(exit_code);
    return exit_code;
  }
  auto running = std::make_unique<const RunningRole>(*std::move(started));
  std::string where = FormatReadyLine(running->info).substr(6);
  where.pop_back();  // the line end
  spdlog::info("{} {} listens: {}", role, TIDEPOOL_VERSION, where);

  bool stop = false, reported = false;
  while (!stop) {
    if (!reported && running->ready()) {
      ReportReady(running->info);
      reported = true;
      spdlog::info("{} is ready", role);
    }
    // Readiness has no callback in the roles; once it was seen only signals matter, and what was asked for.
    const absl::Duration look = running->wants_to_end ? kLookForEnd : absl::Hours(1);
    const int signal_number = WaitFor(all, reported ? look : absl::Milliseconds(20));
    if (signal_number == SIGHUP && running->reload) running->reload();
    stop =
        (signal_number != 0 && signal_number != SIGHUP) || (running->wants_to_end && running->wants_to_end());
  }

  spdlog::info("{} drains for at most {}; a second signal ends it now", role,
               absl::FormatDuration(drain_timeout));
  std::thread([set, role] {
    int signal_number = 0;
    sigwait(&set, &signal_number);
    spdlog::warn("{} ends without waiting", role);
    _exit(1);
  }).detach();
  running->begin_drain();
  running->shutdown(drain_timeout);
  running.reset();
  spdlog::info("{} ended", role);
  if (SomethingHangs()) EndNow(0);
  return 0;
}

}  // namespace tidepool
