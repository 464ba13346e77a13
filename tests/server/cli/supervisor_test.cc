#include "server/cli/supervisor.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "base/clock.h"

namespace tidepool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kReady[] = "echo READY port=4711 >&$TIDEPOOL_READY_FD; ";

ChildSpec Shell(std::string name, int stage, std::string script) {
  return {name, stage, [script](const auto&) { return ChildLaunch{"/bin/sh", {"sh", "-c", script}, {}}; }};
}

bool Alive(pid_t pid) { return kill(pid, 0) == 0; }

// Waits, with a deadline, for what another process does.
template <typename Predicate>
bool Eventually(Predicate predicate) {
  const absl::Time deadline = Clock::Real().Now() + absl::Seconds(20);
  while (!predicate()) {
    if (Clock::Real().Now() > deadline) return false;
    poll(nullptr, 0, 5);
  }
  return true;
}

SupervisorPolicy FastPolicy() {
  SupervisorPolicy policy;
  policy.backoff_min = absl::Milliseconds(10);
  policy.start_timeout = absl::Seconds(20);
  policy.drain_timeout = absl::Seconds(10);
  return policy;
}

class SupervisorTest : public testing::Test {
 protected:
  // A temporary directory for what scripts write.
  SupervisorTest() : dir_(testing::TempDir() + "/tidepool_supervisor_XXXXXX") {
    TP_CHECK(mkdtemp(dir_.data()) != nullptr);
    Supervisor::BlockSignals();
  }
  ~SupervisorTest() override { std::filesystem::remove_all(dir_); }

  std::vector<std::string> Lines(const std::string& name) const {
    std::ifstream in(dir_ + "/" + name);
    std::vector<std::string> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    return lines;
  }

  std::string dir_;
};

TEST(ReadyLineTest, ReadsWhatItWrites) {
  const ReadyInfo info = {{"http", "127.0.0.1:8000"}, {"pid", "7"}};
  EXPECT_EQ(FormatReadyLine(info), "READY http=127.0.0.1:8000 pid=7\n");
  EXPECT_EQ(*ParseReadyLine("READY http=127.0.0.1:8000 pid=7"), info);
  EXPECT_TRUE(ParseReadyLine("READY")->empty());
}

TEST(ReadyLineTest, RefusesOtherLines) {
  for (const char* line : {"", "ready", "READY=1", "READY x", "READY =1"})
    EXPECT_FALSE(ParseReadyLine(line).ok()) << line;
}

TEST_F(SupervisorTest, StartsInOrderPassesOnWhatWasLearnedAndStopsInReverse) {
  const std::string log = dir_ + "/log";
  const auto script = [&](const std::string& name) {
    return absl::StrCat("trap 'echo stop ", name, " >>", log, "; exit 0' TERM; echo start ", name,
                        " $LEARNED >>", log, "; ", kReady, "while :; do sleep 0.01; done");
  };
  std::vector<ChildSpec> children = {Shell("first", 0, script("first"))};
  children.push_back({"second", 1, [&](const std::map<std::string, ReadyInfo>& ready) {
                        return ChildLaunch{"/bin/sh",
                                           {"sh", "-c", script("second")},
                                           {{"LEARNED", ready.at("first").at("port")}}};
                      }});
  Supervisor::Options options;
  options.policy = FastPolicy();
  options.on_all_ready = [](const auto&) { kill(getpid(), SIGTERM); };
  Supervisor supervisor(options, children);
  EXPECT_TRUE(supervisor.Run().ok());
  EXPECT_THAT(Lines("log"), ElementsAre("start first", "start second 4711", "stop second", "stop first"));
}

TEST_F(SupervisorTest, RestartsAChildThatDiesAndCountsIt) {
  const std::string log = dir_ + "/log";
  // Dies after its first readiness, stays after the second.
  const std::string script = absl::StrCat("echo x >>", log, "; ", kReady, "if [ $(wc -l <", log,
                                          ") = 1 ]; then kill -SEGV $$; fi; exec sleep 100");
  MetricRegistry metrics;
  Supervisor::Options options;
  options.policy = FastPolicy();
  options.metrics = &metrics;
  bool told = false;  // the stop itself is a change, too
  options.on_change = [&](const std::vector<ChildStatus>& children) {
    const bool back = children[0].restarts == 1 && children[0].state == SupervisorCore::State::kReady;
    if (back && !told) kill(getpid(), SIGTERM);
    told |= back;
  };
  Supervisor supervisor(options, {Shell("child", 0, script)});
  EXPECT_TRUE(supervisor.Run().ok());
  EXPECT_EQ(Lines("log").size(), 2u);
  EXPECT_THAT(metrics.Render(), HasSubstr("tidepool_supervisor_restarts_total{child=\"child\"} 1"));
}

TEST_F(SupervisorTest, AConfigurationErrorEndsTheStart) {
  Supervisor::Options options;
  options.policy = FastPolicy();
  Supervisor supervisor(options, {Shell("picky", 0, "exit 2")});
  const absl::Status status = supervisor.Run();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("picky refused its configuration"));
}

TEST_F(SupervisorTest, AnExecutableThatIsMissingEndsTheStart) {
  Supervisor::Options options;
  options.policy = FastPolicy();
  Supervisor supervisor(options, {{"ghost", 0, [](const auto&) {
                                     return ChildLaunch{"/no/such/file", {"ghost"}, {}};
                                   }}});
  const absl::Status status = supervisor.Run();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("ghost exited with code 127 before it was ready, 3 times"));
}

TEST_F(SupervisorTest, AStartWithoutReadinessEndsAtItsDeadline) {
  Supervisor::Options options;
  options.policy = FastPolicy();
  options.policy.start_timeout = absl::Milliseconds(50);
  Supervisor supervisor(options, {Shell("mute", 0, "exec sleep 100")});
  EXPECT_THAT(std::string(supervisor.Run().message()), HasSubstr("mute was not ready within 50ms"));
}

TEST_F(SupervisorTest, ASecondSignalKillsAChildThatDoesNotDrain) {
  pid_t child = 0;
  Supervisor::Options options;
  options.policy = FastPolicy();
  options.on_all_ready = [&](const std::vector<ChildStatus>& children) {
    child = children[0].pid;
    kill(getpid(), SIGTERM);  // read before SIGINT: signalfd delivers by number, one Feed each
    kill(getpid(), SIGINT);
  };
  Supervisor supervisor(
      options, {Shell("stubborn", 0, absl::StrCat("trap '' TERM; ", kReady, "while :; do sleep 1; done"))});
  EXPECT_EQ(supervisor.Run().code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(Alive(child));
}

// Signals of one kind merge: one SIGCHLD may stand for several exits, or come while others are being handled.
TEST_F(SupervisorTest, ChildrenThatEndTogetherAreAllNoticed) {
  for (int round = 0; round < 10; ++round) {
    std::vector<ChildSpec> children;
    for (int i = 0; i < 6; ++i) {
      children.push_back(Shell(absl::StrCat("child", i), 0,
                               absl::StrCat("trap 'exit 0' TERM; ", kReady, "while :; do sleep 0.01; done")));
    }
    Supervisor::Options options;
    options.policy = FastPolicy();
    options.policy.drain_timeout = absl::Seconds(5);
    options.on_all_ready = [](const auto&) { kill(getpid(), SIGTERM); };
    Supervisor supervisor(options, children);
    const absl::Time started = Clock::Real().Now();
    ASSERT_TRUE(supervisor.Run().ok()) << "round " << round;
    // An exit that went unnoticed is found only when the drain time ends.
    ASSERT_LT(Clock::Real().Now() - started, options.policy.drain_timeout) << "round " << round;
  }
}

// The supervisor runs in a process of its own, is killed with -9, and its children must follow.
TEST_F(SupervisorTest, NoOrphanSurvivesAKilledSupervisor) {
  // Orphans come to us instead of init, so that they are reaped and their pids really go away.
  ASSERT_EQ(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
  const std::string log = dir_ + "/pids";
  const pid_t pid = fork();
  if (pid == 0) {
    Supervisor::Options options;
    options.policy = FastPolicy();
    options.on_all_ready = [&](const std::vector<ChildStatus>& children) {
      std::ofstream out(log + ".new");
      for (const ChildStatus& child : children) out << child.pid << "\n";
      out.close();
      std::filesystem::rename(log + ".new", log);
    };
    const std::string script = absl::StrCat("trap '' TERM INT HUP; ", kReady, "while :; do sleep 1; done");
    Supervisor supervisor(options, {Shell("a", 0, script), Shell("b", 0, script)});
    (void)supervisor.Run();
    _exit(0);
  }
  ASSERT_TRUE(Eventually([&] { return Lines("pids").size() == 2; }));
  for (const std::string& line : Lines("pids")) ASSERT_TRUE(Alive(std::stoi(line)));
  ASSERT_EQ(kill(pid, SIGKILL), 0);
  ASSERT_EQ(waitpid(pid, nullptr, 0), pid);
  for (const std::string& line : Lines("pids")) {
    const pid_t child = std::stoi(line);
    EXPECT_TRUE(Eventually([&] { return waitpid(child, nullptr, WNOHANG) == child || !Alive(child); }))
        << line;
  }
}

}  // namespace
}  // namespace tidepool
