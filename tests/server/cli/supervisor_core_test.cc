#include "server/cli/supervisor_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace tidepool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Event = SupervisorCore::Event;
using Action = SupervisorCore::Action;
using State = SupervisorCore::State;

enum : size_t { kScheduler, kPrefill, kDecode, kGateway };

// Drives a core of serve's four children and prints actions as "spawn scheduler".
class SupervisorCoreTest : public testing::Test {
 protected:
  SupervisorCoreTest() : core_(Policy(), {"scheduler", "prefill", "decode", "gateway"}, {0, 1, 1, 2}) {}

  static SupervisorPolicy Policy() {
    SupervisorPolicy policy;
    policy.start_timeout = absl::Seconds(60);
    policy.drain_timeout = absl::Seconds(30);
    policy.kill_grace = absl::Seconds(5);
    return policy;
  }

  std::vector<std::string> Step(Event event) {
    static const char* const kNames[] = {"scheduler", "prefill", "decode", "gateway"};
    static const char* const kVerbs[] = {"spawn", "terminate", "kill", "all ready", "finish"};
    std::vector<std::string> out;
    for (const Action& action : core_.Step(event, now_)) {
      if (action.kind == Action::kFinish) {
        out.push_back(absl::StrCat("finish ", action.exit_code));
        reason_ = action.reason;
      } else if (action.kind == Action::kAllReady) {
        out.push_back("all ready");
      } else {
        out.push_back(absl::StrCat(kVerbs[action.kind], " ", kNames[action.child]));
      }
    }
    return out;
  }
  std::vector<std::string> Tick(absl::Duration later = absl::ZeroDuration()) {
    now_ += later;
    return Step({Event::kTick});
  }
  std::vector<std::string> Ready(size_t child) { return Step({Event::kReady, child}); }
  std::vector<std::string> Exited(size_t child, int code) { return Step({Event::kExited, child, code}); }
  void StartAll() {
    Tick();
    for (const size_t child : {kScheduler, kPrefill, kDecode, kGateway}) Ready(child);
  }

  SupervisorCore core_;
  absl::Time now_ = absl::UnixEpoch();
  std::string reason_;
};

TEST_F(SupervisorCoreTest, StartsStageByStage) {
  EXPECT_THAT(Tick(), ElementsAre("spawn scheduler"));
  EXPECT_THAT(Tick(), IsEmpty());
  EXPECT_THAT(Ready(kScheduler), ElementsAre("spawn prefill", "spawn decode"));
  EXPECT_THAT(Ready(kDecode), IsEmpty());
  EXPECT_THAT(Ready(kPrefill), ElementsAre("spawn gateway"));
  EXPECT_THAT(Ready(kGateway), ElementsAre("all ready"));
}

TEST_F(SupervisorCoreTest, RestartsWithDoublingBackOffUpToTheMaximum) {
  StartAll();
  for (const double seconds : {0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0}) {
    EXPECT_THAT(Exited(kPrefill, 139), IsEmpty());
    EXPECT_EQ(core_.NextWake(), now_ + absl::Seconds(seconds));
    EXPECT_THAT(Tick(absl::Seconds(seconds) - absl::Milliseconds(1)), IsEmpty());
    EXPECT_THAT(Tick(absl::Milliseconds(1)), ElementsAre("spawn prefill"));
    EXPECT_THAT(Ready(kPrefill), IsEmpty());
  }
  EXPECT_EQ(core_.child(kPrefill).restarts, 8);
}

TEST_F(SupervisorCoreTest, BackOffStartsOverAfterAHealthyTime) {
  StartAll();
  for (int i = 0; i < 4; ++i) {
    Exited(kDecode, 1);
    Tick(absl::Seconds(10));
    Ready(kDecode);
  }
  now_ += absl::Seconds(30);
  Exited(kDecode, 1);
  EXPECT_EQ(core_.NextWake(), now_ + absl::Milliseconds(200));
}

TEST_F(SupervisorCoreTest, BackOffStaysWhereReadyWasShort) {
  StartAll();
  Exited(kDecode, 1);
  Tick(absl::Seconds(10));
  Ready(kDecode);
  now_ += absl::Seconds(29);
  Exited(kDecode, 1);
  EXPECT_EQ(core_.NextWake(), now_ + absl::Milliseconds(400));
}

TEST_F(SupervisorCoreTest, AConfigurationErrorAtStartStopsEverythingWithTwo) {
  Tick();
  Ready(kScheduler);
  EXPECT_THAT(Exited(kPrefill, 2), ElementsAre("terminate decode"));
  EXPECT_THAT(Exited(kDecode, 0), ElementsAre("terminate scheduler"));
  EXPECT_THAT(Exited(kScheduler, 0), ElementsAre("finish 2"));
  EXPECT_THAT(reason_, HasSubstr("prefill refused its configuration"));
}

TEST_F(SupervisorCoreTest, AConfigurationErrorOfARestartedChildIsRetried) {
  StartAll();
  Exited(kPrefill, 137);
  Tick(absl::Seconds(1));
  EXPECT_THAT(Exited(kPrefill, 2), IsEmpty());
  EXPECT_THAT(Tick(absl::Seconds(1)), ElementsAre("spawn prefill"));
}

TEST_F(SupervisorCoreTest, AStartThatKeepsFailingIsGivenUp) {
  Tick();
  for (int i = 0; i < 2; ++i) {
    EXPECT_THAT(Exited(kScheduler, 1), IsEmpty());
    EXPECT_THAT(Tick(absl::Seconds(1)), ElementsAre("spawn scheduler"));
  }
  EXPECT_THAT(Exited(kScheduler, 1), ElementsAre("finish 1"));
  EXPECT_THAT(reason_, HasSubstr("scheduler exited with code 1 before it was ready, 3 times"));
}

TEST_F(SupervisorCoreTest, AChildThatIsNotReadyInTimeFailsTheStart) {
  Tick();
  EXPECT_EQ(core_.NextWake(), now_ + absl::Seconds(60));
  EXPECT_THAT(Tick(absl::Seconds(60)), ElementsAre("kill scheduler"));
  EXPECT_THAT(Exited(kScheduler, 137), ElementsAre("finish 1"));
  EXPECT_THAT(reason_, HasSubstr("scheduler was not ready within 1m"));
}

TEST_F(SupervisorCoreTest, ARestartedChildThatIsNotReadyInTimeIsKilledAndStartedAgain) {
  StartAll();
  Exited(kDecode, 1);
  Tick(absl::Seconds(1));
  EXPECT_THAT(Tick(absl::Seconds(60)), ElementsAre("kill decode"));
  EXPECT_THAT(Tick(absl::Seconds(60)), IsEmpty());  // killed once
  EXPECT_THAT(Exited(kDecode, 137), IsEmpty());
  EXPECT_THAT(Tick(absl::Seconds(1)), ElementsAre("spawn decode"));
}

TEST_F(SupervisorCoreTest, StopsGatewayThenWorkersThenScheduler) {
  StartAll();
  EXPECT_THAT(Step({Event::kStop}), ElementsAre("terminate gateway"));
  EXPECT_THAT(Tick(absl::Seconds(10)), IsEmpty());
  EXPECT_THAT(Exited(kGateway, 0), ElementsAre("terminate prefill", "terminate decode"));
  EXPECT_THAT(Exited(kPrefill, 0), IsEmpty());
  EXPECT_THAT(Exited(kDecode, 0), ElementsAre("terminate scheduler"));
  EXPECT_THAT(Exited(kScheduler, 0), ElementsAre("finish 0"));
}

TEST_F(SupervisorCoreTest, NothingIsRestartedWhileStopping) {
  StartAll();
  Step({Event::kStop});
  EXPECT_THAT(Exited(kPrefill, 139), IsEmpty());
  EXPECT_THAT(Tick(absl::Seconds(20)), IsEmpty());
  EXPECT_THAT(Exited(kGateway, 0), ElementsAre("terminate decode"));
}

TEST_F(SupervisorCoreTest, AChildInBackOffIsNotWaitedForWhenStopping) {
  StartAll();
  Exited(kGateway, 1);
  EXPECT_THAT(Step({Event::kStop}), ElementsAre("terminate prefill", "terminate decode"));
}

TEST_F(SupervisorCoreTest, ADrainThatOverrunsIsKilledAndReportedAsFailure) {
  StartAll();
  Step({Event::kStop});
  EXPECT_EQ(core_.NextWake(), now_ + absl::Seconds(35));
  EXPECT_THAT(Tick(absl::Seconds(35)), ElementsAre("kill gateway"));
  EXPECT_THAT(Tick(absl::Seconds(35)), IsEmpty());
  Exited(kGateway, 137);
  Exited(kPrefill, 0);
  Exited(kDecode, 0);
  EXPECT_THAT(Exited(kScheduler, 0), ElementsAre("finish 1"));
  EXPECT_THAT(reason_, HasSubstr("gateway did not end within its drain time"));
}

TEST_F(SupervisorCoreTest, StopNowKillsEveryoneOnce) {
  StartAll();
  Step({Event::kStop});
  EXPECT_THAT(Step({Event::kStopNow}),
              ElementsAre("kill scheduler", "kill prefill", "kill decode", "kill gateway"));
  EXPECT_THAT(Step({Event::kStopNow}), IsEmpty());
  for (const size_t child : {kScheduler, kPrefill, kDecode}) Exited(child, 137);
  EXPECT_THAT(Exited(kGateway, 137), ElementsAre("finish 1"));
}

TEST_F(SupervisorCoreTest, StopDuringTheStartEndsWhatRuns) {
  Tick();
  EXPECT_THAT(Step({Event::kStop}), ElementsAre("terminate scheduler"));
  EXPECT_THAT(Exited(kScheduler, 143), ElementsAre("finish 0"));
}

TEST_F(SupervisorCoreTest, NothingHappensAfterTheEnd) {
  Tick();
  Step({Event::kStop});
  Exited(kScheduler, 0);
  EXPECT_THAT(Step({Event::kStop}), IsEmpty());
  EXPECT_THAT(Tick(absl::Hours(1)), IsEmpty());
}

// Whatever happens in whatever order: the core never spawns what lives, and always ends after kStopNow.
TEST_F(SupervisorCoreTest, RandomEventsNeverSpawnTwiceAndAlwaysEnd) {
  uint32_t seed = 12345;
  const auto draw = [&](uint32_t n) { return (seed = seed * 1664525 + 1013904223) / 65536 % n; };
  for (int round = 0; round < 300; ++round) {
    core_.~SupervisorCore();
    new (&core_) SupervisorCore(Policy(), {"scheduler", "prefill", "decode", "gateway"}, {0, 1, 1, 2});
    bool alive[4] = {}, finished = false;
    const auto apply = [&](Event event) {
      for (const Action& action : core_.Step(event, now_)) {
        ASSERT_FALSE(finished);
        if (action.kind == Action::kSpawn) {
          ASSERT_FALSE(alive[action.child]);
          alive[action.child] = true;
        }
        if (action.kind == Action::kTerminate || action.kind == Action::kKill) {
          ASSERT_TRUE(alive[action.child]);
        }
        finished |= action.kind == Action::kFinish;
      }
    };
    apply({Event::kTick});
    for (int i = 0; i < 200; ++i) {
      const size_t child = draw(4);
      now_ += absl::Milliseconds(draw(20000));
      switch (draw(4)) {
        case 0:
          if (alive[child]) apply({Event::kReady, child});
          break;
        case 1:
          if (alive[child]) {
            alive[child] = false;
            apply({Event::kExited, child, static_cast<int>(draw(3))});
          }
          break;
        default:
          apply({Event::kTick});
      }
    }
    apply({Event::kStopNow});
    for (size_t child = 0; child < 4; ++child) {
      if (!alive[child]) continue;
      alive[child] = false;
      apply({Event::kExited, child, 137});
    }
    EXPECT_TRUE(finished) << "round " << round;
  }
}

}  // namespace
}  // namespace tidepool
