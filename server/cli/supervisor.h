#pragma once

#include <sys/types.h>

#include <csignal>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/probe.h"
#include "base/status.h"
#include "server/cli/supervisor_core.h"

namespace tidepool {

// A child finds here the number of the descriptor to report readiness on: one line "READY key=value ...".
inline constexpr char kReadyFdEnv[] = "TIDEPOOL_READY_FD";

using ReadyInfo = std::map<std::string, std::string>;

// "READY a=1 b=2" -> {a: 1, b: 2}. Errors: InvalidArgument.
absl::StatusOr<ReadyInfo> ParseReadyLine(std::string_view line);
// Values may hold neither spaces nor line ends.
std::string FormatReadyLine(const ReadyInfo& info);

struct ChildLaunch {
  std::string executable;                  // path
  std::vector<std::string> argv;           // argv[0] is the name shown by ps
  std::map<std::string, std::string> env;  // on top of the supervisor's own environment
};

struct ChildSpec {
  std::string name;
  int stage = 0;
  // Called before every start with what the children reported so far (a restarted scheduler is told its
  // port again, so that nobody has to be told anew).
  std::function<ChildLaunch(const std::map<std::string, ReadyInfo>& ready)> launch;
};

struct ChildStatus {
  std::string name;
  SupervisorCore::State state = SupervisorCore::State::kPending;
  pid_t pid = 0;  // 0: not running
  int restarts = 0;
  ReadyInfo ready;  // of its latest start
};

// Supervisor: runs child processes as SupervisorCore decides. Driver: Run uses the calling thread, which
// must outlive the children (their parent-death signal follows the thread that forked them). Children get
// their own process groups, so that a terminal's Ctrl-C reaches the supervisor alone and the drain order
// holds, and SIGKILL when the supervisor dies, however it dies.
class Supervisor {
 public:
  struct Options {
    SupervisorPolicy policy;
    MetricRegistry* metrics = nullptr;  // borrowed; null: none
    // On Run's thread: after every change, and once when all children were ready.
    std::function<void(const std::vector<ChildStatus>&)> on_change;
    std::function<void(const std::vector<ChildStatus>&)> on_all_ready;
    // The configuration is to be read again; before the children are told.
    std::function<void()> on_hangup;
  };

  Supervisor(Options options, std::vector<ChildSpec> children);

  // Blocks the signals that Run waits for. Before the process starts its first thread.
  static void BlockSignals();

  // Until every child is gone, because SIGTERM or SIGINT came (a second one: at once), or the start failed.
  // SIGHUP, and SIGUSR1, are passed on as SIGHUP to the children that are ready; started from a terminal,
  // SIGHUP ends it like SIGTERM. OK after a clean stop. Errors: InvalidArgument (a child refused its
  // configuration), Internal.
  absl::Status Run();

  std::vector<ChildStatus> Children() const;

 private:
  struct Process {
    pid_t pid = 0;
    int ready_fd = -1;
    std::string ready_text;
    ReadyInfo ready;
  };

  void Execute(const std::vector<SupervisorCore::Action>& actions);
  void Feed(SupervisorCore::Event event);
  absl::Status Spawn(size_t i);
  void ReadReady(size_t i);
  void ReadSignals(int signal_fd);
  void Reap();
  void WaitForEvents(int signal_fd);

  const Options options_;
  const std::vector<ChildSpec> specs_;
  SupervisorCore core_;
  std::vector<Process> processes_;
  std::map<std::string, ReadyInfo> ready_;
  std::vector<Counter*> restarts_;
  std::vector<Gauge*> up_;
  bool stop_requested_ = false;
  bool terminal_ = false;  // started from one: SIGHUP says that it is gone
  bool finished_ = false;
  absl::Status result_;
};

}  // namespace tidepool
