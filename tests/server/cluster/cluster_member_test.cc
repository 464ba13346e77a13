#include "server/cluster/cluster_member.h"

#include <gtest/gtest.h>

#include <memory>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "server/cluster/member_codec.h"
#include "tests/server/cluster/etcd_process.h"

namespace tidepool {
namespace {

// One process, as far as etcd knows it.
struct Process {
  Process(const EtcdProcess& etcd, const std::string& role, const std::string& id) {
    ClusterMember::Options options;
    options.config.etcd = {etcd.address()};
    options.config.lease = absl::Seconds(2);
    options.candidate = role == "scheduler";
    options.watch_members = options.candidate;
    options.boot_id = absl::StrCat(id, "-", reinterpret_cast<uintptr_t>(this));
    options.metrics = &metrics;
    member = *ClusterMember::Start(std::move(options));
    self.set_id(id);
    self.set_role(role);
    self.set_address(absl::StrCat(id, ".test:1"));
  }
  Process& Join() {
    member->Join(self);
    return *this;
  }
  bool leads() const { return member->Term(0).has_value(); }

  MetricRegistry metrics;
  v1::Member self;
  std::unique_ptr<ClusterMember> member;
};

class ClusterMemberTest : public testing::Test {
 protected:
  void SetUp() override {
    TP_NEEDS_ETCD();
    etcd_ = std::make_unique<EtcdProcess>();
    ASSERT_TRUE(etcd_->ready());
  }
  static size_t Leaders(const std::vector<const Process*>& all) {
    size_t n = 0;
    for (const Process* p : all) n += p->leads();
    return n;
  }

  std::unique_ptr<EtcdProcess> etcd_;
};

TEST_F(ClusterMemberTest, OneSchedulerLeadsAndEverybodyKnowsWho) {
  Process a(*etcd_, "scheduler", "a"), b(*etcd_, "scheduler", "b"), worker(*etcd_, "decode", "w");
  a.Join();
  ASSERT_TRUE(Eventually([&] { return a.leads(); }));
  b.Join();
  worker.Join();
  ASSERT_TRUE(Eventually([&] { return worker.member->Get().address == "a.test:1"; }));
  ASSERT_TRUE(Eventually([&] { return b.member->LeaderAddress() == "a.test:1"; }));
  ASSERT_TRUE(Eventually([&] { return b.member->Members().size() == 3; }));
  EXPECT_FALSE(b.leads());
  EXPECT_EQ(worker.member->Get().term, a.member->Term(0));
}

TEST_F(ClusterMemberTest, AnotherTakesOverWithAHigherTermWhenTheLeaderGoes) {
  auto a = std::make_unique<Process>(*etcd_, "scheduler", "a");
  Process b(*etcd_, "scheduler", "b"), worker(*etcd_, "decode", "w");
  a->Join();
  ASSERT_TRUE(Eventually([&] { return a->leads(); }));
  b.Join();
  worker.Join();
  ASSERT_TRUE(Eventually([&] { return worker.member->Get().address == "a.test:1"; }));
  const uint64_t term = *a->member->Term(0);
  a.reset();
  ASSERT_TRUE(Eventually([&] { return b.leads(); }));
  EXPECT_GT(*b.member->Term(0), term);
  ASSERT_TRUE(Eventually([&] { return worker.member->Get().address == "b.test:1"; }));
}

TEST_F(ClusterMemberTest, WithoutEtcdNothingChangesAndAfterwardsItGoesOn) {
  Process a(*etcd_, "scheduler", "a"), b(*etcd_, "scheduler", "b");
  auto worker = std::make_unique<Process>(*etcd_, "decode", "w");
  a.Join();
  ASSERT_TRUE(Eventually([&] { return a.leads(); }));
  b.Join();
  worker->Join();
  ASSERT_TRUE(Eventually([&] { return b.member->Members().size() == 3; }));
  ASSERT_TRUE(Eventually([&] { return a.member->Members().size() == 3; }));
  etcd_->Kill();
  // Longer than the lease; both have noticed.
  ASSERT_TRUE(Eventually([&] { return !a.member->EtcdReachable() && !b.member->EtcdReachable(); }));
  const absl::Time until = absl::Now() + absl::Seconds(3);
  while (absl::Now() < until) {
    ASSERT_TRUE(a.leads());
    ASSERT_FALSE(b.leads());
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  EXPECT_EQ(a.member->Members().size(), 3u);
  etcd_->Start();
  ASSERT_TRUE(Eventually([&] { return a.member->EtcdReachable() && b.member->EtcdReachable(); }));
  EXPECT_TRUE(Eventually([&] { return Leaders({&a, &b}) == 1 && a.member->Members().size() == 3; }));
  worker.reset();
  EXPECT_TRUE(Eventually([&] { return a.member->Members().size() == 2; }));
}

TEST_F(ClusterMemberTest, AnEtcdThatLostItsDataGetsALeaderWithAHigherTermAllTheSame) {
  Process a(*etcd_, "scheduler", "a"), b(*etcd_, "scheduler", "b"), worker(*etcd_, "decode", "w");
  // Far ahead of what the new etcd counts to.
  auto client = *EtcdClient::Create(etcd_->options());
  ASSERT_TRUE(client->Put("/tidepool/term", "200", 0).ok());
  a.Join();
  b.Join();
  worker.Join();
  ASSERT_TRUE(Eventually([&] { return Leaders({&a, &b}) == 1; }));
  ASSERT_TRUE(Eventually([&] { return worker.member->Get().term > 200; }));
  const uint64_t term = worker.member->Get().term;
  etcd_->Kill();
  etcd_->LoseData();
  etcd_->Start();
  EXPECT_TRUE(Eventually([&] { return worker.member->Get().term > term; }));
  EXPECT_TRUE(Eventually([&] { return Leaders({&a, &b}) == 1 && a.member->Members().size() == 3; }));
}

TEST_F(ClusterMemberTest, ACallerWithAHigherTermEndsALeadership) {
  Process a(*etcd_, "scheduler", "a");
  a.Join();
  ASSERT_TRUE(Eventually([&] { return a.leads(); }));
  const uint64_t term = *a.member->Term(0);
  EXPECT_EQ(a.member->Term(term + 100), std::nullopt);
  // Nobody else is there: it wins again, above what was known.
  ASSERT_TRUE(Eventually([&] { return a.leads(); }));
  EXPECT_GT(*a.member->Term(0), term + 100);
}

TEST_F(ClusterMemberTest, OrdersOfAnOlderTermAreNotObeyed) {
  Process a(*etcd_, "scheduler", "a"), worker(*etcd_, "decode", "w");
  a.Join();
  worker.Join();
  ASSERT_TRUE(Eventually([&] { return worker.member->Get().term != 0; }));
  const uint64_t term = worker.member->Get().term;
  EXPECT_TRUE(worker.member->Obey(term));
  EXPECT_FALSE(worker.member->Obey(term - 1));
  EXPECT_TRUE(worker.member->Obey(term + 1));
  EXPECT_FALSE(worker.member->Obey(term));
}

TEST_F(ClusterMemberTest, WhoLeavesIsKnownNoMoreAndMayJoinAgain) {
  Process a(*etcd_, "scheduler", "a"), worker(*etcd_, "decode", "w");
  a.Join();
  worker.Join();
  ASSERT_TRUE(Eventually([&] { return a.member->Members().size() == 2; }));
  worker.member->Leave();
  ASSERT_TRUE(Eventually([&] { return a.member->Members().size() == 1; }));
  worker.Join();
  ASSERT_TRUE(Eventually([&] { return a.member->Members().size() == 2; }));
}

TEST_F(ClusterMemberTest, WhoJoinsWithAnotherRoleIsKnownByThatAlone) {
  Process a(*etcd_, "scheduler", "a"), worker(*etcd_, "decode", "w");
  a.Join();
  worker.Join();
  ASSERT_TRUE(Eventually([&] { return a.member->Members().size() == 2; }));
  const auto roles = [&] {
    std::string out;
    for (const v1::Member& m : a.member->Members()) {
      if (m.id() == "w") out += m.role();
    }
    return out;
  };
  for (const char* role : {"prefill", "both", "decode"}) {
    worker.self.set_role(role);
    worker.Join();
    EXPECT_TRUE(Eventually([&] { return roles() == role; })) << roles();
  }
  // Twice at once: whatever was put first goes, too.
  worker.self.set_role("prefill");
  worker.Join();
  worker.self.set_role("both");
  worker.Join();
  EXPECT_TRUE(Eventually([&] { return roles() == "both"; })) << roles();
  worker.member->Leave();
  EXPECT_TRUE(Eventually([&] { return roles().empty(); })) << roles();
}

TEST_F(ClusterMemberTest, GarbageInEtcdIsCountedAndLeftAlone) {
  auto client = *EtcdClient::Create(etcd_->options());
  ASSERT_TRUE(client->Put("/tidepool/members/decode/x", "\xff garbage", 0).ok());
  ASSERT_TRUE(client->Put("/tidepool/members/decode/y", "{}", 0).ok());
  ASSERT_TRUE(client->Put("/tidepool/leader", "me", 0).ok());
  Process a(*etcd_, "scheduler", "a");
  a.Join();
  ASSERT_TRUE(Eventually([&] { return a.member->Members().size() == 1; }));
  EXPECT_FALSE(a.leads());
  EXPECT_NE(a.metrics.Render().find("tidepool_cluster_etcd_malformed_total"), std::string::npos);
  // Taken away by hand, it is replaced.
  const auto lease = client->Get("/tidepool/leader");
  ASSERT_TRUE(lease.ok() && *lease);
  ASSERT_TRUE(*client->DeleteOf("/tidepool/leader", 0));
  EXPECT_TRUE(Eventually([&] { return a.leads(); }));
}

TEST_F(ClusterMemberTest, ALeaderOfATermThatNobodyCountsUpToIsNone) {
  auto client = *EtcdClient::Create(etcd_->options());
  v1::Member forged;
  forged.set_id("x");
  forged.set_role("scheduler");
  forged.set_boot_id(std::string(32, 'a'));
  forged.set_address("127.0.0.1:1");
  forged.set_term(UINT64_MAX);
  ASSERT_TRUE(client->Put("/tidepool/leader", EncodeMember(forged), 0).ok());
  Process a(*etcd_, "scheduler", "a");
  a.Join();
  ASSERT_TRUE(Eventually([&] { return a.member->Members().size() == 1; }));
  EXPECT_FALSE(a.leads());
  EXPECT_EQ(a.member->Get().address, "");
  ASSERT_TRUE(*client->DeleteOf("/tidepool/leader", 0));
  ASSERT_TRUE(Eventually([&] { return a.leads(); }));
  EXPECT_LE(a.member->Get().term, MemberCore::kTermMax);
}

TEST_F(ClusterMemberTest, OfTwoProcessesWithOneIdTheNewerIsKnown) {
  Process a(*etcd_, "scheduler", "a"), old(*etcd_, "decode", "w"), young(*etcd_, "decode", "w");
  a.Join();
  old.Join();
  ASSERT_TRUE(Eventually([&] { return a.member->Members().size() == 2; }));
  young.Join();
  const auto boot = [&] {
    for (const v1::Member& m : a.member->Members()) {
      if (m.role() == "decode") return m.boot_id();
    }
    return std::string();
  };
  const std::string old_boot = boot();
  ASSERT_TRUE(Eventually([&] { return boot() != old_boot && !boot().empty(); }));
  old.member.reset();  // does not take the newer one's entry along
  auto client = *EtcdClient::Create(etcd_->options());
  EXPECT_TRUE((*client->Get("/tidepool/members/decode/w")).has_value());
}

}  // namespace
}  // namespace tidepool
