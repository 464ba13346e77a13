#include "server/cluster/etcd_client.h"

#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "tests/server/cluster/etcd_process.h"

namespace tidepool {
namespace {

TEST(EtcdPrefixEnd, IsBehindEveryKeyOfThePrefix) {
  EXPECT_EQ(EtcdPrefixEnd("/a/"), "/a0");
  EXPECT_EQ(EtcdPrefixEnd("a\xff"), "b");
  EXPECT_EQ(EtcdPrefixEnd("\xff\xff"), std::string(1, '\0'));
}

TEST(EtcdClient, SaysWhatIsWrongWithItsOptions) {
  EXPECT_EQ(EtcdClient::Create({}).status().code(), absl::StatusCode::kInvalidArgument);
  EtcdOptions options;
  options.endpoints = {"127.0.0.1:1"};
  options.ca = "/nowhere/ca.pem";
  const absl::Status status = EtcdClient::Create(options).status();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message().find("/nowhere/ca.pem"), std::string::npos) << status;
}

TEST(EtcdClient, GivesUpAtItsDeadlineWhereNobodyAnswers) {
  EtcdOptions options;
  options.endpoints = {"127.0.0.1:1", "127.0.0.1:2"};
  options.call_timeout = absl::Milliseconds(300);
  auto client = EtcdClient::Create(options);
  ASSERT_TRUE(client.ok());
  const absl::Time began = absl::Now();
  const absl::Status status = (*client)->Get("/x").status();
  EXPECT_TRUE(absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) << status;
  EXPECT_LT(absl::Now() - began, absl::Seconds(5));
}

class EtcdClientTest : public testing::Test {
 protected:
  void SetUp() override {
    TP_NEEDS_ETCD();
    etcd_ = std::make_unique<EtcdProcess>();
    ASSERT_TRUE(etcd_->ready());
    client_ = *EtcdClient::Create(etcd_->options());
  }

  // What Watch gives, on a thread of its own, until the test ends.
  struct Watched {
    std::mutex mu;
    std::vector<EtcdClient::WatchEvent> events;
    int64_t revision = 0;
    std::atomic<bool> ready{false};
    EtcdClient::WatchSink sink{.on_ready = [this] { ready = true; },
                               .on_events =
                                   [this](const std::vector<EtcdClient::WatchEvent>& more, int64_t at) {
                                     std::lock_guard lock(mu);
                                     events.insert(events.end(), more.begin(), more.end());
                                     revision = at;
                                   }};
    size_t count() {
      std::lock_guard lock(mu);
      return events.size();
    }
  };

  std::unique_ptr<EtcdProcess> etcd_;
  std::unique_ptr<EtcdClient> client_;
};

TEST_F(EtcdClientTest, PutsGetsAndListsAPrefix) {
  EXPECT_EQ(*client_->Get("/p/a"), std::nullopt);
  const auto first = client_->Put("/p/a", "1", 0);
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(client_->Put("/p/b", std::string("\0\xff", 2), 0).ok());
  ASSERT_TRUE(client_->Put("/q", "not of it", 0).ok());
  const auto one = client_->Get("/p/a");
  ASSERT_TRUE(one.ok() && *one);
  EXPECT_EQ((*one)->value, "1");
  EXPECT_EQ((*one)->create_revision, *first);
  const auto all = client_->List("/p/");
  ASSERT_TRUE(all.ok());
  ASSERT_EQ(all->entries.size(), 2u);
  EXPECT_EQ(all->entries[1].value, std::string("\0\xff", 2));
  EXPECT_EQ(all->revision, *first + 2);
}

TEST_F(EtcdClientTest, OneOfTwoCreatesWinsAndTheOtherSeesWhose) {
  const auto mine = client_->Grant(absl::Seconds(10)), other = client_->Grant(absl::Seconds(10));
  ASSERT_TRUE(mine.ok() && other.ok());
  const auto won = client_->Create("/leader", "me", mine->id);
  ASSERT_TRUE(won.ok()) << won.status();
  EXPECT_EQ(won->lease, mine->id);
  const auto lost = client_->Create("/leader", "you", other->id);
  ASSERT_TRUE(lost.ok());
  EXPECT_EQ(lost->value, "me");
  EXPECT_EQ(lost->lease, mine->id);
  EXPECT_EQ(lost->create_revision, won->create_revision);
  // Asked again, as after an answer that was lost.
  EXPECT_EQ(client_->Create("/leader", "me", mine->id)->lease, mine->id);
  EXPECT_FALSE(*client_->DeleteOf("/leader", other->id));
  EXPECT_TRUE(*client_->DeleteOf("/leader", mine->id));
  // A later leader has a higher create revision.
  EXPECT_GT(client_->Create("/leader", "you", other->id)->create_revision, won->create_revision);
}

TEST_F(EtcdClientTest, CreatesOnlyWhereWhatIsPutAlongWasNotChanged) {
  const auto lease = client_->Grant(absl::Seconds(10));
  const EtcdClient::Along first{"/count", "1", 0};
  ASSERT_TRUE(client_->Create("/leader", "me", lease->id, &first).ok());
  EXPECT_EQ((*client_->Get("/count"))->value, "1");
  ASSERT_TRUE(*client_->DeleteOf("/leader", lease->id));
  EXPECT_TRUE(absl::IsAborted(client_->Create("/leader", "you", lease->id, &first).status()));
  EXPECT_EQ(*client_->Get("/leader"), std::nullopt);
  const EtcdClient::Along second{"/count", "2", (*client_->Get("/count"))->mod_revision};
  EXPECT_TRUE(client_->Create("/leader", "you", lease->id, &second).ok());
  EXPECT_EQ((*client_->Get("/count"))->lease, 0) << "counts on when the lease is over";
}

TEST_F(EtcdClientTest, ReplacesOnlyWhatWasNotChanged) {
  const auto first = client_->Put("/c", "1", 0);
  EXPECT_TRUE(*client_->Replace("/c", *first, "2", 0));
  EXPECT_FALSE(*client_->Replace("/c", *first, "3", 0));
  EXPECT_EQ((*client_->Get("/c"))->value, "2");
}

TEST_F(EtcdClientTest, ALeaseTakesItsKeysAlong) {
  const auto lease = client_->Grant(absl::Seconds(30));
  ASSERT_TRUE(lease.ok());
  ASSERT_TRUE(client_->Put("/k", "v", lease->id).ok());
  EXPECT_EQ(*client_->KeepAlive(lease->id), lease->ttl);
  ASSERT_TRUE(client_->Revoke(lease->id).ok());
  EXPECT_EQ(*client_->Get("/k"), std::nullopt);
  EXPECT_TRUE(absl::IsNotFound(client_->KeepAlive(lease->id).status()));
  EXPECT_TRUE(absl::IsNotFound(client_->Put("/k", "v", lease->id).status()));
  EXPECT_TRUE(absl::IsNotFound(client_->Create("/k", "v", lease->id).status()));
}

TEST_F(EtcdClientTest, ALeaseThatIsNotRenewedEnds) {
  const auto lease = client_->Grant(absl::Seconds(1));  // etcd gives a little more
  ASSERT_TRUE(lease.ok());
  ASSERT_TRUE(client_->Put("/k", "v", lease->id).ok());
  EXPECT_TRUE(Eventually([&] { return !*client_->Get("/k"); }));
}

TEST_F(EtcdClientTest, AWatchGoesOnFromARevision) {
  const auto before = client_->Put("/w/a", "1", 0);
  ASSERT_TRUE(client_->Put("/w/a", "2", 0).ok());
  Watched watched;
  std::thread watch([&] { (void)client_->Watch("/w/", *before + 1, absl::Seconds(30), watched.sink); });
  ASSERT_TRUE(Eventually([&] { return watched.count() == 1; }));
  EXPECT_TRUE(watched.ready);
  EXPECT_EQ(watched.events[0].entry.value, "2");
  ASSERT_TRUE(client_->Put("/w/b", "3", 0).ok());
  ASSERT_TRUE(client_->Put("/other", "4", 0).ok());
  const auto lease = client_->Grant(absl::Seconds(30));
  ASSERT_TRUE(client_->Put("/w/c", "5", lease->id).ok());
  ASSERT_TRUE(client_->Revoke(lease->id).ok());
  ASSERT_TRUE(Eventually([&] { return watched.count() == 4; }));
  EXPECT_EQ(watched.events[2].entry.key, "/w/c");
  EXPECT_TRUE(watched.events[3].deleted);
  EXPECT_EQ(watched.events[3].entry.key, "/w/c");
  EXPECT_EQ(watched.revision, watched.events[3].entry.mod_revision);
  client_->Stop();
  watch.join();
}

TEST_F(EtcdClientTest, AWatchOfWhatIsCompactedAwaySaysSo) {
  const auto first = client_->Put("/w", "1", 0);
  int64_t last = 0;
  for (int i = 0; i < 5; ++i) last = *client_->Put("/w", "2", 0);
  ASSERT_TRUE(client_->Compact(last).ok());
  Watched watched;
  EXPECT_TRUE(absl::IsOutOfRange(client_->Watch("/w", *first, absl::Seconds(30), watched.sink)));
  EXPECT_EQ(watched.count(), 0u);
}

TEST_F(EtcdClientTest, AWatchOfAFutureThatWasLostSaysSo) {
  Watched watched;
  EXPECT_TRUE(absl::IsOutOfRange(client_->Watch("/w", 1000, absl::Seconds(30), watched.sink)));
}

TEST_F(EtcdClientTest, AWatchEndsAtItsLimit) {
  Watched watched;
  EXPECT_TRUE(absl::IsDeadlineExceeded(client_->Watch("/w", 1, absl::Milliseconds(100), watched.sink)));
}

TEST_F(EtcdClientTest, AsksTheNextEndpointWhereOneDoesNotAnswer) {
  EtcdOptions options = etcd_->options();
  options.endpoints.insert(options.endpoints.begin(), {"127.0.0.1:1", "127.0.0.1:2"});
  auto client = *EtcdClient::Create(options);
  ASSERT_TRUE(client->Put("/f", "1", 0).ok());
  // A watch begins where the last call was answered.
  Watched watched;
  std::thread watch([&] { (void)client->Watch("/f", 1, absl::Seconds(30), watched.sink); });
  EXPECT_TRUE(Eventually([&] { return watched.count() > 0; }));
  client->Stop();
  watch.join();
}

TEST_F(EtcdClientTest, AHangingEndpointLeavesTheOthersTime) {
  EtcdProcess second;
  ASSERT_TRUE(second.ready());
  EtcdOptions options;
  options.endpoints = {etcd_->address(), second.address()};
  auto client = *EtcdClient::Create(options);
  ASSERT_TRUE(client->Put("/h", "1", 0).ok());
  etcd_->Signal(SIGSTOP);
  const auto put = client->Put("/h", "2", 0);
  EXPECT_TRUE(put.ok()) << put.status();
  etcd_->Signal(SIGCONT);
  auto direct = *EtcdClient::Create(second.options());
  EXPECT_EQ((*direct->Get("/h"))->value, "2");
}

TEST_F(EtcdClientTest, StopEndsCallsUnderWay) {
  etcd_->Signal(SIGSTOP);
  std::atomic<bool> ended{false};
  Watched watched;
  std::thread watch([&] {
    (void)client_->Watch("/w", 1, absl::Seconds(600), watched.sink);
    ended = true;
  });
  client_->Stop();
  EXPECT_TRUE(Eventually([&] { return ended.load(); }));
  watch.join();
  EXPECT_TRUE(absl::IsCancelled(client_->Get("/x").status()));
  etcd_->Signal(SIGCONT);
}

TEST_F(EtcdClientTest, GoesOnAfterARestart) {
  const auto lease = client_->Grant(absl::Seconds(30));
  ASSERT_TRUE(client_->Put("/k", "v", lease->id).ok());
  etcd_->Kill();
  EXPECT_FALSE(client_->Get("/k").ok());
  etcd_->Start();
  ASSERT_TRUE(Eventually([&] { return client_->Get("/k").ok(); }));
  EXPECT_EQ((*client_->Get("/k"))->value, "v");
  EXPECT_TRUE(client_->KeepAlive(lease->id).ok());
}

}  // namespace
}  // namespace tidepool
