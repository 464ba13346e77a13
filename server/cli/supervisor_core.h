#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace tidepool {

struct SupervisorPolicy {
  absl::Duration backoff_min = absl::Milliseconds(200);  // before the first restart; doubles with each
  absl::Duration backoff_max = absl::Seconds(10);
  absl::Duration healthy_reset = absl::Seconds(30);  // ready for this long: the back-off starts over
  absl::Duration start_timeout = absl::Minutes(10);  // from spawn to ready
  absl::Duration drain_timeout = absl::Seconds(30);  // from SIGTERM to exit
  // On top of drain_timeout before SIGKILL: what closing takes after that where nothing answers. 6 s for
  // transfers to peers; of a disk that hangs 0.2 s for what waits to be stored, 2 s for what is being stored
  // (WriteBehind::Options::end_wait), 2 s for operations and 2 s for the index (DiskTierOptions::close_wait),
  // 2 s for the threads of DiskIo: 14.2 s, and the rest for a busy machine.
  absl::Duration kill_grace = absl::Seconds(20);
  // A child that never was ready and failed this often will not be: the whole start is given up.
  int start_failures_max = 3;
};

// SupervisorCore: decides which child process to start, restart, stop and kill, and when to end. Pure: no
// process, no clock; the driver (Supervisor) executes the actions in order. Not thread-safe.
//
// Children start stage by stage: a stage begins once every child of the stages below was ready once. They
// stop in the opposite order, each stage after the one above is gone.
class SupervisorCore {
 public:
  enum class State {
    kPending,   // a lower stage is not up yet
    kStarting,  // spawned, not ready
    kReady,
    kBackoff,  // exited; waits for its restart
    kStopped,  // gone for good: the supervisor is stopping
  };

  struct Event {
    enum Kind {
      kTick,   // time passed
      kReady,  // `child` reported that it serves
      kExited,
      kStop,     // drain and end
      kStopNow,  // end at once
    };
    Kind kind = kTick;
    size_t child = 0;
    int exit_code = 0;  // of kExited; 128 + signal where a signal ended it
  };

  struct Action {
    enum Kind {
      kSpawn,
      kTerminate,  // SIGTERM: drain
      kKill,       // SIGKILL
      kAllReady,   // every child was ready: said once
      kFinish,     // the last action: end with `exit_code`
    };
    Kind kind;
    size_t child = 0;
    int exit_code = 0;
    std::string reason;  // for the log; of a non-zero kFinish, what went wrong
  };

  struct ChildView {
    State state = State::kPending;
    int restarts = 0;
  };

  // `stages[i]`: the stage of child i, from 0. `names` are for reasons.
  SupervisorCore(SupervisorPolicy policy, std::vector<std::string> names, std::vector<int> stages);

  std::vector<Action> Step(const Event& event, absl::Time now);
  // When Step(kTick) is due; InfiniteFuture where nothing is.
  absl::Time NextWake() const;
  ChildView child(size_t i) const { return {children_[i].state, children_[i].restarts}; }
  bool stopping() const { return stopping_; }

 private:
  struct Child {
    std::string name;
    int stage = 0;
    State state = State::kPending;
    bool was_ready = false;
    bool terminated = false;  // SIGTERM sent
    bool killed = false;      // SIGKILL sent
    int start_failures = 0;
    int restarts = 0;
    absl::Duration backoff;
    absl::Time ready_since;
    absl::Time deadline = absl::InfiniteFuture();  // of the start, the restart or the drain
  };

  static bool Alive(const Child& child) {
    return child.state == State::kStarting || child.state == State::kReady;
  }
  void OnReady(Child& child, absl::Time now);
  void OnExited(Child& child, int exit_code, absl::Time now);
  void Kill(size_t i, std::string reason, std::vector<Action>& actions);
  void BeginStop(int exit_code, std::string reason);
  void AdvanceRunning(absl::Time now, std::vector<Action>& actions);
  void AdvanceStopping(absl::Time now, std::vector<Action>& actions);

  const SupervisorPolicy policy_;
  std::vector<Child> children_;
  bool all_ready_said_ = false;
  bool stopping_ = false;
  bool stop_now_ = false;
  bool finished_ = false;
  int exit_code_ = 0;
  std::string reason_;
};

}  // namespace tidepool
