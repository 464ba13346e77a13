#include "server/cli/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"
#include "base/log.h"

namespace tidepool {
namespace {

// The child's end of the readiness pipe: the lowest free number, which any shell can redirect to.
constexpr int kChildReadyFd = 3;
constexpr size_t kReadyLineMax = 4096;

sigset_t SupervisorSignals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGTERM, SIGINT, SIGCHLD, SIGHUP, SIGUSR1}) sigaddset(&set, signal);
  return set;
}

std::vector<std::string> MergedEnvironment(const std::map<std::string, std::string>& extra) {
  std::map<std::string, std::string> merged;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const size_t equals = text.find('=');
    if (equals != std::string_view::npos)
      merged[std::string(text.substr(0, equals))] = text.substr(equals + 1);
  }
  for (const auto& [name, value] : extra) merged[name] = value;
  merged[kReadyFdEnv] = absl::StrCat(kChildReadyFd);
  std::vector<std::string> out;
  for (const auto& [name, value] : merged) out.push_back(absl::StrCat(name, "=", value));
  return out;
}

std::vector<char*> Pointers(const std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (const std::string& text : texts) out.push_back(const_cast<char*>(text.c_str()));
  out.push_back(nullptr);
  return out;
}

// After fork and before exec only async-signal-safe calls are allowed: other threads may hold any lock.
[[noreturn]] void ExecChild(pid_t parent, int ready_fd, const char* executable, char* const* argv,
                            char* const* env) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // The supervisor may have died between fork and prctl: then nobody would send the signal.
  if (getppid() != parent) _exit(1);
  setpgid(0, 0);
  if (ready_fd == kChildReadyFd) {
    fcntl(ready_fd, F_SETFD, 0);
  } else {
    dup2(ready_fd, kChildReadyFd);
  }
  signal(SIGPIPE, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  // Libraries open sockets without CLOEXEC (Asio does); a child that held them would keep peers waiting.
  close_range(kChildReadyFd + 1, ~0u, 0);
  execve(executable, argv, env);
  _exit(127);
}

int ExitCodeOf(int wait_status) {
  return WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 128 + WTERMSIG(wait_status);
}

std::vector<std::string> Names(const std::vector<ChildSpec>& specs) {
  std::vector<std::string> out;
  for (const ChildSpec& spec : specs) out.push_back(spec.name);
  return out;
}

std::vector<int> Stages(const std::vector<ChildSpec>& specs) {
  std::vector<int> out;
  for (const ChildSpec& spec : specs) out.push_back(spec.stage);
  return out;
}

}  // namespace

absl::StatusOr<ReadyInfo> ParseReadyLine(std::string_view line) {
  ReadyInfo info;
  bool first = true;
  for (const std::string& word :
       std::vector<std::string>(absl::StrSplit(std::string(line), ' ', absl::SkipEmpty()))) {
    if (first) {
      if (word != "READY") break;
      first = false;
      continue;
    }
    const size_t equals = word.find('=');
    if (equals == std::string::npos || equals == 0) {
      return absl::InvalidArgumentError(absl::StrCat("readiness line: '", word, "' is not key=value"));
    }
    info[word.substr(0, equals)] = word.substr(equals + 1);
  }
  if (first) return absl::InvalidArgumentError("readiness line: does not begin with READY");
  return info;
}

std::string FormatReadyLine(const ReadyInfo& info) {
  std::string line = "READY";
  for (const auto& [key, value] : info) absl::StrAppend(&line, " ", key, "=", value);
  return line + "\n";
}

Supervisor::Supervisor(Options options, std::vector<ChildSpec> children)
    : options_(std::move(options)),
      specs_(std::move(children)),
      core_(options_.policy, Names(specs_), Stages(specs_)),
      processes_(specs_.size()),
      restarts_(specs_.size()),
      up_(specs_.size()) {
  if (options_.metrics == nullptr) return;
  for (size_t i = 0; i < specs_.size(); ++i) {
    const Labels labels = {{"child", specs_[i].name}};
    restarts_[i] = &options_.metrics->AddCounter("tidepool_supervisor_restarts_total",
                                                 "Restarts of a supervised process.", labels);
    up_[i] = &options_.metrics->AddGauge("tidepool_supervisor_child_ready",
                                         "1 while the supervised process is ready.", labels);
  }
}

void Supervisor::BlockSignals() {
  const sigset_t set = SupervisorSignals();
  sigprocmask(SIG_BLOCK, &set, nullptr);
}

std::vector<ChildStatus> Supervisor::Children() const {
  std::vector<ChildStatus> out;
  for (size_t i = 0; i < specs_.size(); ++i) {
    const auto view = core_.child(i);
    out.push_back({specs_[i].name, view.state, processes_[i].pid, view.restarts, processes_[i].ready});
  }
  return out;
}

absl::Status Supervisor::Run() {
  BlockSignals();
  terminal_ = isatty(STDIN_FILENO) == 1;
  const sigset_t set = SupervisorSignals();
  const int signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  if (signal_fd < 0) return absl::InternalError(absl::StrCat("signalfd: ", std::strerror(errno)));
  Feed({SupervisorCore::Event::kTick});
  while (!finished_) {
    WaitForEvents(signal_fd);
    for (size_t i = 0; i < processes_.size(); ++i) ReadReady(i);
    // Signals before exits: a SIGCHLD that is taken off after its child was looked at would be lost.
    ReadSignals(signal_fd);
    Reap();
    Feed({SupervisorCore::Event::kTick});
  }
  close(signal_fd);
  return result_;
}

void Supervisor::WaitForEvents(int signal_fd) {
  std::vector<pollfd> fds = {{signal_fd, POLLIN, 0}};
  for (const Process& process : processes_) {
    if (process.ready_fd >= 0) fds.push_back({process.ready_fd, POLLIN, 0});
  }
  // A minute bounds an infinite wait. Rounded up: waking before the deadline would only wake again.
  const absl::Duration left = std::min(core_.NextWake() - Clock::Real().Now(), absl::Minutes(1));
  const int64_t ms = std::max<int64_t>(absl::ToInt64Milliseconds(left) + 1, 0);
  poll(fds.data(), fds.size(), static_cast<int>(ms));
}

void Supervisor::Feed(SupervisorCore::Event event) {
  const bool informs = event.kind != SupervisorCore::Event::kTick;
  const auto actions = core_.Step(event, Clock::Real().Now());
  Execute(actions);
  for (size_t i = 0; i < up_.size(); ++i) {
    if (up_[i] != nullptr) up_[i]->Set(core_.child(i).state == SupervisorCore::State::kReady);
  }
  if ((informs || !actions.empty()) && options_.on_change) options_.on_change(Children());
}

void Supervisor::Execute(const std::vector<SupervisorCore::Action>& actions) {
  using Action = SupervisorCore::Action;
  for (const Action& action : actions) {
    const std::string& name = specs_[action.child].name;
    Process& process = processes_[action.child];
    switch (action.kind) {
      case Action::kSpawn:
        if (!action.reason.empty() && restarts_[action.child] != nullptr) restarts_[action.child]->Add();
        if (const absl::Status status = Spawn(action.child); !status.ok()) {
          spdlog::error("{}: {}", name, status.ToString());
          Feed({SupervisorCore::Event::kExited, action.child, 1});
        } else {
          spdlog::info("{} {} as process {}", action.reason.empty() ? "started" : "restarted", name,
                       process.pid);
        }
        break;
      case Action::kTerminate:
        spdlog::info("draining {}", name);
        if (process.pid > 0) kill(process.pid, SIGTERM);
        break;
      case Action::kKill:
        spdlog::warn("killing {}{}{}", name, action.reason.empty() ? "" : ": ", action.reason);
        if (process.pid > 0) kill(process.pid, SIGKILL);
        break;
      case Action::kAllReady:
        if (options_.on_all_ready) options_.on_all_ready(Children());
        break;
      case Action::kFinish:
        finished_ = true;
        if (action.exit_code == 2) {
          result_ = absl::InvalidArgumentError(action.reason);
        } else if (action.exit_code != 0) {
          result_ = absl::InternalError(action.reason);
        }
        break;
    }
  }
}

absl::Status Supervisor::Spawn(size_t i) {
  Process& process = processes_[i];
  const ChildLaunch launch = specs_[i].launch(ready_);
  // Everything that allocates happens before the fork.
  const std::vector<std::string> env = MergedEnvironment(launch.env);
  const std::vector<char*> argv_pointers = Pointers(launch.argv), env_pointers = Pointers(env);
  int fds[2];
  if (pipe2(fds, O_CLOEXEC | O_NONBLOCK) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("pipe: ", std::strerror(errno)));
  }
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0)
    ExecChild(parent, fds[1], launch.executable.c_str(), argv_pointers.data(), env_pointers.data());
  const int fork_errno = errno;
  close(fds[1]);
  if (pid < 0) {
    close(fds[0]);
    return absl::ResourceExhaustedError(absl::StrCat("fork: ", std::strerror(fork_errno)));
  }
  process.pid = pid;
  process.ready_fd = fds[0];
  process.ready_text.clear();
  return absl::OkStatus();
}

void Supervisor::ReadReady(size_t i) {
  Process& process = processes_[i];
  if (process.ready_fd < 0) return;
  char buffer[512];
  const ssize_t n = read(process.ready_fd, buffer, sizeof buffer);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n > 0) process.ready_text.append(buffer, static_cast<size_t>(n));
  const size_t end = process.ready_text.find('\n');
  const bool over = n <= 0 || process.ready_text.size() > kReadyLineMax;
  if (end == std::string::npos && !over) return;
  close(process.ready_fd);
  process.ready_fd = -1;
  if (end == std::string::npos) return;  // closed without a word: its exit says the rest
  auto info = ParseReadyLine(std::string_view(process.ready_text).substr(0, end));
  if (!info.ok()) {
    spdlog::error("{}: {}", specs_[i].name, info.status().ToString());
    return;
  }
  process.ready = *info;
  ready_[specs_[i].name] = *std::move(info);
  spdlog::info("{} is ready: {}", specs_[i].name, process.ready_text.substr(6, end - 6));
  Feed({SupervisorCore::Event::kReady, i});
}

void Supervisor::Reap() {
  for (size_t i = 0; i < processes_.size(); ++i) {
    Process& process = processes_[i];
    int status = 0;
    if (process.pid <= 0 || waitpid(process.pid, &status, WNOHANG) != process.pid) continue;
    const int code = ExitCodeOf(status);
    if (core_.stopping() && code == 0) {
      spdlog::info("{} ended", specs_[i].name);
    } else {
      spdlog::warn("{} (process {}) {}", specs_[i].name, process.pid,
                   code > 128 ? absl::StrCat("was ended by signal ", code - 128)
                              : absl::StrCat("exited with code ", code));
    }
    process.pid = 0;
    if (process.ready_fd >= 0) close(process.ready_fd);
    process.ready_fd = -1;
    Feed({SupervisorCore::Event::kExited, i, code});
  }
}

void Supervisor::ReadSignals(int signal_fd) {
  signalfd_siginfo info;
  while (read(signal_fd, &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
    if (info.ssi_signo == SIGCHLD) continue;
    if (info.ssi_signo == SIGUSR1 || (info.ssi_signo == SIGHUP && !terminal_)) {
      if (options_.on_hangup) options_.on_hangup();
      for (size_t i = 0; i < processes_.size(); ++i) {
        // Before it is ready a child may not have said yet what it does with the signal.
        const bool ready = core_.child(i).state == SupervisorCore::State::kReady;
        if (ready && processes_[i].pid > 0) kill(processes_[i].pid, SIGHUP);
      }
      continue;
    }
    spdlog::info(stop_requested_ ? "second signal: stopping now" : "draining; a second signal stops now");
    Feed({stop_requested_ ? SupervisorCore::Event::kStopNow : SupervisorCore::Event::kStop});
    stop_requested_ = true;
  }
}

}  // namespace tidepool
