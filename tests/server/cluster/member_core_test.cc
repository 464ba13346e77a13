#include "server/cluster/member_core.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <vector>

#include "base/rng.h"

namespace tidepool {
namespace {

using Do = MemberCore::Do;

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

Leader LeaderOf(const std::string& boot, uint64_t term) {
  return {.address = boot + ":1", .boot_id = boot, .term = term};
}

MemberCore Candidate(const std::string& boot) { return MemberCore({.candidate = true, .boot_id = boot}); }

// Has a lease, and leads `term`.
MemberCore Leading(const std::string& boot, uint64_t term) {
  MemberCore core = Candidate(boot);
  core.OnGranted(7, absl::Seconds(3), kStart);
  core.OnCampaign(LeaderOf(boot, term), 0);
  EXPECT_TRUE(core.leading());
  return core;
}

TEST(MemberCore, AsksForALeaseThenRegistersThenRenewsAfterAThird) {
  MemberCore core({.candidate = false, .boot_id = "w"});
  core.WantRegistration(true);
  EXPECT_EQ(core.Next(kStart).what, Do::kGrant);
  core.OnGranted(7, absl::Seconds(3), kStart);
  EXPECT_EQ(core.Next(kStart).what, Do::kRegister);
  EXPECT_EQ(core.Next(kStart).lease, 7);
  core.OnRegistered();
  EXPECT_EQ(core.Next(kStart).what, Do::kWait);
  EXPECT_EQ(core.Next(kStart).until, kStart + absl::Seconds(1));
  EXPECT_EQ(core.Next(kStart + absl::Seconds(1)).what, Do::kKeepAlive);
  core.OnKeptAlive(absl::Seconds(3), kStart + absl::Seconds(1));
  EXPECT_EQ(core.Next(kStart + absl::Seconds(1)).until, kStart + absl::Seconds(2));
}

TEST(MemberCore, RegistersAgainUnderANewLease) {
  MemberCore core({.candidate = false, .boot_id = "w"});
  core.WantRegistration(true);
  core.OnGranted(7, absl::Seconds(3), kStart);
  core.OnRegistered();
  core.OnLeaseGone();
  EXPECT_EQ(core.Next(kStart).what, Do::kGrant);
  core.OnGranted(8, absl::Seconds(3), kStart);
  EXPECT_EQ(core.Next(kStart).what, Do::kRegister);
  EXPECT_EQ(core.Next(kStart).lease, 8);
}

TEST(MemberCore, LeavesWhenItIsNotToBeRegisteredAnyMore) {
  MemberCore core({.candidate = false, .boot_id = "w"});
  core.WantRegistration(true);
  core.OnGranted(7, absl::Seconds(3), kStart);
  core.OnRegistered();
  core.WantRegistration(false);
  EXPECT_EQ(core.Next(kStart).what, Do::kLeave);
  core.OnLeft();
  EXPECT_EQ(core.Next(kStart).what, Do::kWait);
}

TEST(MemberCore, WaitsLongerAndLongerWhileEtcdIsAway) {
  MemberCore core = Candidate("a");
  absl::Duration last;
  for (int i = 0; i < 12; ++i) {
    core.OnFailed(kStart);
    EXPECT_EQ(core.Next(kStart).what, Do::kWait);
    const absl::Duration wait = core.Next(kStart).until - kStart;
    EXPECT_GE(wait, last);
    EXPECT_LE(wait, absl::Seconds(1));
    last = wait;
  }
  EXPECT_EQ(last, absl::Seconds(1));
  EXPECT_FALSE(core.reachable());
  EXPECT_EQ(core.Next(kStart + last).what, Do::kGrant);
  core.OnGranted(7, absl::Seconds(3), kStart + last);
  EXPECT_TRUE(core.reachable());
}

TEST(MemberCore, CampaignsWhereNobodyLeadsAndStandsByWhereSomebodyDoes) {
  MemberCore core = Candidate("a");
  core.OnGranted(7, absl::Seconds(3), kStart);
  EXPECT_EQ(core.Next(kStart).what, Do::kCampaign);
  core.OnCampaign(LeaderOf("b", 20), 0);
  EXPECT_FALSE(core.leading());
  EXPECT_EQ(core.leader(), LeaderOf("b", 20));
  EXPECT_EQ(core.Next(kStart).what, Do::kWait);
  core.OnLeaderKey(std::nullopt, 0);
  EXPECT_EQ(core.Next(kStart).what, Do::kCampaign);
  EXPECT_EQ(core.Next(kStart).term, 20u) << "the one to be above";
  // Until somebody wins, the last one stays known: it may be alive, with only its lease gone.
  EXPECT_EQ(core.leader(), LeaderOf("b", 20));
  core.OnCampaign(LeaderOf("a", 25), 0);
  EXPECT_TRUE(core.leading());
}

TEST(MemberCore, OthersNeverCampaign) {
  MemberCore core({.candidate = false, .boot_id = "w"});
  core.OnGranted(7, absl::Seconds(3), kStart);
  core.OnLeaderKey(std::nullopt, 0);
  EXPECT_EQ(core.Next(kStart).what, Do::kWait);
  core.OnLeaderKey(LeaderOf("w", 9), 0);  // its own boot id makes it no leader
  EXPECT_FALSE(core.leading());
}

TEST(MemberCore, LeadsOnWhileEtcdIsAwayHoweverLong) {
  MemberCore core = Leading("a", 10);
  absl::Time now = kStart;
  for (int i = 0; i < 100; ++i) {
    core.OnFailed(now);
    now += absl::Seconds(10);
    EXPECT_TRUE(core.leading());
  }
  // Etcd is back and has ended the lease: it goes on, and campaigns.
  core.OnLeaseGone();
  EXPECT_TRUE(core.leading());
  core.OnGranted(8, absl::Seconds(3), now);
  EXPECT_EQ(core.Next(now).what, Do::kCampaign);
  core.OnCampaign(LeaderOf("a", 30), 0);
  EXPECT_TRUE(core.leading());
  EXPECT_EQ(core.leader().term, 30u);
}

TEST(MemberCore, StopsLeadingWhereAnotherWasFaster) {
  MemberCore core = Leading("a", 10);
  core.OnLeaseGone();
  core.OnGranted(8, absl::Seconds(3), kStart);
  core.OnCampaign(LeaderOf("b", 12), 0);
  EXPECT_FALSE(core.leading());
  EXPECT_EQ(core.leader(), LeaderOf("b", 12));
}

TEST(MemberCore, StopsLeadingOnceACallerKnowsAHigherTerm) {
  MemberCore core = Leading("a", 10);
  core.OnTerm(10);
  EXPECT_TRUE(core.leading());
  core.OnTerm(11);
  EXPECT_FALSE(core.leading());
  EXPECT_EQ(core.leader().term, 11u);
  EXPECT_EQ(core.leader().address, "");
  // Its own key, if it still stands, says too little: it goes away, and the next one says more.
  EXPECT_EQ(core.Next(kStart).what, Do::kResign);
  core.OnResigned();
  EXPECT_EQ(core.Next(kStart).what, Do::kCampaign);
  EXPECT_EQ(core.Next(kStart).term, 11u);
}

TEST(MemberCore, ResignsAlsoWhereASecondHigherTermIsHeardOf) {
  MemberCore core = Leading("a", 10);
  core.OnTerm(11);
  core.OnTerm(12);
  EXPECT_EQ(core.Next(kStart).what, Do::kResign);
}

TEST(MemberCore, ResignsWhatItHasWonInATermThatIsOverAlready) {
  MemberCore core = Candidate("a");
  core.OnGranted(7, absl::Seconds(3), kStart);
  core.OnTerm(12);  // while its campaign for 11 was under way
  core.OnCampaign(LeaderOf("a", 11), 0);
  EXPECT_FALSE(core.leading());
  EXPECT_EQ(core.Next(kStart).what, Do::kResign);
  core.OnResigned();
  EXPECT_EQ(core.Next(kStart).what, Do::kCampaign);
  core.OnCampaign(LeaderOf("a", 13), 1);
  EXPECT_TRUE(core.leading());
  EXPECT_EQ(core.Next(kStart).what, Do::kWait);
}

TEST(MemberCore, TermsEndAtTheLargest) {
  EXPECT_EQ(MemberCore::NextTerm(MemberCore::kTermMax, std::nullopt), MemberCore::kTermMax);
  EXPECT_EQ(MemberCore::NextTerm(UINT64_MAX, std::nullopt), MemberCore::kTermMax);
  EXPECT_EQ(MemberCore::NextTerm(7, MemberCore::kTermMax - 1), MemberCore::kTermMax);
}

TEST(MemberCore, TermsAreCountedInEtcdAndFarAheadWhereItLostCount) {
  EXPECT_EQ(MemberCore::NextTerm(0, std::nullopt), 1u);
  EXPECT_EQ(MemberCore::NextTerm(0, 7), 8u);
  EXPECT_EQ(MemberCore::NextTerm(7, 7), 8u);
  EXPECT_EQ(MemberCore::NextTerm(5, 7), 8u);
  // Somebody may have won 8 and 9, and nobody here heard of it.
  EXPECT_GT(MemberCore::NextTerm(7, std::nullopt), 1000u);
  EXPECT_GT(MemberCore::NextTerm(7, 3), 1000u);
  EXPECT_EQ(MemberCore::NextTerm(0, UINT64_MAX), 1u) << "somebody else's hand";
}

TEST(MemberCore, TakesNoTermThatEtcdCannotReach) {
  MemberCore core = Leading("a", 10);
  core.OnTerm(UINT64_MAX);
  EXPECT_TRUE(core.leading());
}

TEST(MemberCore, AsksALeaderOfAnEtcdThatLostItsDataInTheTermThatItKnows) {
  MemberCore core({.candidate = false, .boot_id = "w"});
  core.OnLeaderKey(LeaderOf("old", 500), 0);
  core.OnLeaderKey(LeaderOf("new", 3), 0);
  EXPECT_EQ(core.leader().address, "new:1");
  EXPECT_EQ(core.leader().term, 500u) << "which makes it resign, and win one above";
  core.OnLeaderKey(std::nullopt, 0);
  core.OnLeaderKey(LeaderOf("new", 501), 0);
  EXPECT_EQ(core.leader(), LeaderOf("new", 501));
}

TEST(MemberCore, CampaignsThoughTheAnswerThatSomebodyLeadsComesAfterTheNewsThatHeIsGone) {
  MemberCore core = Candidate("a");
  core.OnGranted(7, absl::Seconds(3), kStart);
  core.OnLeaderKey(LeaderOf("b", 4), 8);
  core.OnLeaderKey(std::nullopt, 11);
  core.OnCampaign(LeaderOf("b", 4), 8);  // asked before 11
  EXPECT_EQ(core.Next(kStart).what, Do::kCampaign);
}

TEST(MemberCore, AKeyThatIsNoLeadersIsLeftAlone) {
  MemberCore core = Candidate("a");
  core.WantRegistration(true);
  core.OnGranted(7, absl::Seconds(3), kStart);
  core.OnUnreadableKey(5);
  EXPECT_EQ(core.Next(kStart).what, Do::kRegister);
  core.OnLeaderKey(std::nullopt, 6);
  EXPECT_EQ(core.Next(kStart).what, Do::kCampaign);
}

TEST(MemberCore, IsNotMisledByALateWatch) {
  MemberCore core = Candidate("a");
  core.OnGranted(7, absl::Seconds(3), kStart);
  core.OnCampaign(LeaderOf("a", 12), 0);
  core.OnLeaderKey(LeaderOf("b", 5), 0);
  core.OnLeaderKey(std::nullopt, 0);
  EXPECT_TRUE(core.leading());
  EXPECT_EQ(core.leader().term, 12u);
  // It looks again, which costs a call.
  EXPECT_EQ(core.Next(kStart).what, Do::kCampaign);
  core.OnCampaign(LeaderOf("a", 12), 0);
  EXPECT_TRUE(core.leading());
  EXPECT_EQ(core.Next(kStart).what, Do::kWait);
}

// Etcd as a key with a lease: what several candidates, cut off and delayed at random, make of it.
class World {
 public:
  explicit World(uint64_t seed) : rng_(seed) {
    for (int i = 0; i < 3; ++i) {
      nodes_.push_back(
          {std::make_unique<MemberCore>(Candidate(std::string(1, static_cast<char>('a' + i)))), false, {}});
    }
  }

  struct Node {
    std::unique_ptr<MemberCore> core;
    bool cut = false;
    std::vector<std::pair<std::optional<Leader>, int64_t>> unseen;  // of the watch
  };

  void Step() {
    now_ += absl::Milliseconds(20 + static_cast<int>(rng_.Uniform() * 100));
    for (auto it = leases_.begin(); it != leases_.end();) {
      if (it->second < now_) {
        if (key_ && key_lease_ == it->first) SetKey(std::nullopt, 0);
        it = leases_.erase(it);
      } else {
        ++it;
      }
    }
    if (!healed_ && rng_.Uniform() < 0.03) {
      Node& node = nodes_[static_cast<size_t>(rng_.Uniform() * 3)];
      node.cut = !node.cut;
    }
    for (size_t i = 0; i < nodes_.size(); ++i) {
      Node& node = nodes_[i];
      if (!node.cut && !node.unseen.empty() && rng_.Uniform() < 0.5) {
        node.core->OnLeaderKey(node.unseen.front().first, node.unseen.front().second);
        node.unseen.erase(node.unseen.begin());
      }
      const MemberCore::Step step = node.core->Next(now_);
      if (step.what == Do::kWait) continue;
      if (node.cut) {
        node.core->OnFailed(now_);
        continue;
      }
      if (step.what != Do::kGrant && !leases_.contains(step.lease)) {
        node.core->OnLeaseGone();
        continue;
      }
      switch (step.what) {
        case Do::kGrant:
          leases_[++last_lease_] = now_ + absl::Seconds(3);
          node.core->OnGranted(last_lease_, absl::Seconds(3), now_);
          break;
        case Do::kKeepAlive:
          leases_[step.lease] = now_ + absl::Seconds(3);
          node.core->OnKeptAlive(absl::Seconds(3), now_);
          break;
        case Do::kCampaign:
          if (!key_) {
            counted_ = MemberCore::NextTerm(step.term, counted_);
            SetKey(LeaderOf(std::string(1, static_cast<char>('a' + i)), *counted_), step.lease);
          }
          node.core->OnCampaign(*key_, key_revision_);
          break;
        case Do::kResign:
          if (key_ && key_lease_ == step.lease) SetKey(std::nullopt, 0);
          node.core->OnResigned();
          break;
        default:
          break;
      }
      if (node.core->leading()) {
        // Nobody leads a term that another has led.
        const auto [it, first] = led_by_.emplace(node.core->leader().term, i);
        ASSERT_EQ(it->second, i) << "term " << it->first;
      }
    }
    // Workers: whom they call knows the highest term that any of them knows.
    for (Node& node : nodes_) {
      if (!node.core->leading()) continue;
      if (node.core->leader().term > fence_) fence_ = node.core->leader().term;
      if (rng_.Uniform() < 0.2) node.core->OnTerm(fence_);
    }
  }

  void LoseEtcdData() {
    counted_.reset();
    key_.reset();
    leases_.clear();
    for (Node& node : nodes_) node.unseen = {{std::nullopt, ++revision_}};
  }
  void Heal() {
    healed_ = true;
    for (Node& node : nodes_) node.cut = false;
  }
  int leaders() const {
    int n = 0;
    for (const Node& node : nodes_) n += node.core->leading();
    return n;
  }
  bool agreed() const {
    for (const Node& node : nodes_) {
      if (node.core->leader() != nodes_[0].core->leader()) return false;
    }
    return leaders() == 1;
  }

 private:
  void SetKey(std::optional<Leader> key, int64_t lease) {
    key_ = std::move(key);
    key_lease_ = lease;
    key_revision_ = ++revision_;
    for (Node& node : nodes_) node.unseen.emplace_back(key_, key_revision_);
  }

  Rng rng_;
  absl::Time now_ = kStart;
  std::vector<Node> nodes_;
  std::map<int64_t, absl::Time> leases_;
  int64_t last_lease_ = 0, key_lease_ = 0;
  std::optional<Leader> key_;
  std::optional<uint64_t> counted_;
  uint64_t fence_ = 0;
  int64_t revision_ = 0, key_revision_ = 0;
  std::map<uint64_t, size_t> led_by_;
  bool healed_ = false;
};

TEST(MemberCore, NoTermHasTwoLeadersAndOneIsFoundOnceAllIsWell) {
  for (uint64_t seed = 1; seed <= 400; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    World world(seed);
    for (int i = 0; i < 400; ++i) {
      world.Step();
      if (testing::Test::HasFatalFailure()) return;
      if (seed % 4 == 0 && i == 200) world.LoseEtcdData();
    }
    world.Heal();
    for (int i = 0; i < 400; ++i) {
      world.Step();
      if (testing::Test::HasFatalFailure()) return;
    }
    ASSERT_TRUE(world.agreed()) << world.leaders() << " leaders";
  }
}

}  // namespace
}  // namespace tidepool
