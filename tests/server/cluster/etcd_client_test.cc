#include "server/cluster/etcd_client.h"

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "base/small_file.h"
#include "server/rpc/rpc.h"
#include "tests/server/cluster/etcd_process.h"
#include "tests/transport/test_certificates.h"

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

// Of a StatusOr<bool>: it is no error, and says so.
MATCHER_P(IsTrueOf, expected, "") {
  if (!arg.ok()) *result_listener << arg.status();
  return arg.ok() && *arg == expected;
}

// What stands at `key`; "(none)" where there is no such key, "(error: ...)" where etcd did not say.
std::string ValueOf(EtcdClient& client, const std::string& key) {
  const auto got = client.Get(key);
  if (!got.ok()) return "(error: " + std::string(got.status().message()) + ")";
  return *got ? (*got)->value : "(none)";
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
  EXPECT_EQ(ValueOf(*client_, "/p/a"), "(none)");
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
  ASSERT_TRUE(lost.ok()) << lost.status();
  EXPECT_EQ(lost->value, "me");
  EXPECT_EQ(lost->lease, mine->id);
  EXPECT_EQ(lost->create_revision, won->create_revision);
  // Asked again, as after an answer that was lost.
  const auto again = client_->Create("/leader", "me", mine->id);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->lease, mine->id);
  EXPECT_THAT(client_->DeleteOf("/leader", other->id), IsTrueOf(false));
  EXPECT_THAT(client_->DeleteOf("/leader", mine->id), IsTrueOf(true));
  // A later leader has a higher create revision.
  const auto later = client_->Create("/leader", "you", other->id);
  ASSERT_TRUE(later.ok()) << later.status();
  EXPECT_GT(later->create_revision, won->create_revision);
}

TEST_F(EtcdClientTest, CreatesOnlyWhereWhatIsPutAlongWasNotChanged) {
  const auto lease = client_->Grant(absl::Seconds(10));
  ASSERT_TRUE(lease.ok()) << lease.status();
  const EtcdClient::Along first{"/count", "1", 0};
  ASSERT_TRUE(client_->Create("/leader", "me", lease->id, &first).ok());
  EXPECT_EQ(ValueOf(*client_, "/count"), "1");
  ASSERT_THAT(client_->DeleteOf("/leader", lease->id), IsTrueOf(true));
  EXPECT_TRUE(absl::IsAborted(client_->Create("/leader", "you", lease->id, &first).status()));
  EXPECT_EQ(ValueOf(*client_, "/leader"), "(none)");
  const auto counted = client_->Get("/count");
  ASSERT_TRUE(counted.ok() && *counted);
  const EtcdClient::Along second{"/count", "2", (*counted)->mod_revision};
  EXPECT_TRUE(client_->Create("/leader", "you", lease->id, &second).ok());
  const auto now = client_->Get("/count");
  ASSERT_TRUE(now.ok() && *now);
  EXPECT_EQ((*now)->lease, 0) << "counts on when the lease is over";
}

TEST_F(EtcdClientTest, ReplacesOnlyWhatWasNotChanged) {
  const auto first = client_->Put("/c", "1", 0);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_THAT(client_->Replace("/c", *first, "2", 0), IsTrueOf(true));
  EXPECT_THAT(client_->Replace("/c", *first, "3", 0), IsTrueOf(false));
  EXPECT_EQ(ValueOf(*client_, "/c"), "2");
}

TEST_F(EtcdClientTest, PutsSeveralKeysAtOnceWhereOneWasNotChanged) {
  const auto first = client_->CompareAndPut("/c", 0, {{"/c", "1"}, {"/d", "by me"}});
  ASSERT_TRUE(first.ok() && *first) << first.status();
  const auto c = client_->Get("/c"), d = client_->Get("/d");
  ASSERT_TRUE(c.ok() && *c && d.ok() && *d);
  EXPECT_EQ((*c)->mod_revision, **first);
  EXPECT_EQ((*d)->mod_revision, **first);
  const auto late = client_->CompareAndPut("/c", 0, {{"/c", "2"}, {"/d", "by you"}});
  ASSERT_TRUE(late.ok()) << late.status();
  EXPECT_FALSE(late->has_value());
  EXPECT_EQ(ValueOf(*client_, "/d"), "by me");
  const auto second = client_->CompareAndPut("/c", **first, {{"/c", "2"}});
  ASSERT_TRUE(second.ok() && *second) << second.status();
  EXPECT_EQ(ValueOf(*client_, "/c"), "2");
}

TEST_F(EtcdClientTest, ALeaseTakesItsKeysAlong) {
  const auto lease = client_->Grant(absl::Seconds(30));
  ASSERT_TRUE(lease.ok());
  ASSERT_TRUE(client_->Put("/k", "v", lease->id).ok());
  const auto kept = client_->KeepAlive(lease->id);
  ASSERT_TRUE(kept.ok()) << kept.status();
  EXPECT_EQ(*kept, lease->ttl);
  ASSERT_TRUE(client_->Revoke(lease->id).ok());
  EXPECT_EQ(ValueOf(*client_, "/k"), "(none)");
  EXPECT_TRUE(absl::IsNotFound(client_->KeepAlive(lease->id).status()));
  EXPECT_TRUE(absl::IsNotFound(client_->Put("/k", "v", lease->id).status()));
  EXPECT_TRUE(absl::IsNotFound(client_->Create("/k", "v", lease->id).status()));
}

TEST_F(EtcdClientTest, ALeaseThatIsNotRenewedEnds) {
  const auto lease = client_->Grant(absl::Seconds(1));  // etcd gives a little more
  ASSERT_TRUE(lease.ok());
  ASSERT_TRUE(client_->Put("/k", "v", lease->id).ok());
  EXPECT_TRUE(Eventually([&] { return ValueOf(*client_, "/k") == "(none)"; }));
}

TEST_F(EtcdClientTest, AWatchGoesOnFromARevision) {
  const auto before = client_->Put("/w/a", "1", 0);
  ASSERT_TRUE(before.ok()) << before.status();
  ASSERT_TRUE(client_->Put("/w/a", "2", 0).ok());
  Watched watched;
  std::thread watch([&] { (void)client_->Watch("/w/", *before + 1, absl::Seconds(30), watched.sink); });
  ASSERT_TRUE(Eventually([&] { return watched.count() == 1; }));
  EXPECT_TRUE(watched.ready);
  EXPECT_EQ(watched.events[0].entry.value, "2");
  ASSERT_TRUE(client_->Put("/w/b", "3", 0).ok());
  ASSERT_TRUE(client_->Put("/other", "4", 0).ok());
  const auto lease = client_->Grant(absl::Seconds(30));
  ASSERT_TRUE(lease.ok()) << lease.status();
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
  ASSERT_TRUE(first.ok()) << first.status();
  int64_t last = 0;
  for (int i = 0; i < 5; ++i) {
    const auto put = client_->Put("/w", "2", 0);
    ASSERT_TRUE(put.ok()) << put.status();
    last = *put;
  }
  ASSERT_TRUE(client_->Compact(last).ok());
  Watched watched;
  EXPECT_TRUE(absl::IsOutOfRange(client_->Watch("/w", *first, absl::Seconds(30), watched.sink)));
  EXPECT_EQ(watched.count(), 0u);
}

TEST_F(EtcdClientTest, AWatchOfAFutureThatWasLostSaysSo) {
  Watched watched;
  EXPECT_TRUE(absl::IsDataLoss(client_->Watch("/w", 1000, absl::Seconds(30), watched.sink)));
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
  ASSERT_TRUE(etcd_->Pause());
  const auto put = client->Put("/h", "2", 0);
  etcd_->Resume();
  ASSERT_TRUE(put.ok()) << put.status();
  auto direct = *EtcdClient::Create(second.options());
  EXPECT_EQ(ValueOf(*direct, "/h"), "2");
}

TEST_F(EtcdClientTest, StopEndsCallsUnderWay) {
  ASSERT_TRUE(etcd_->Pause());
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
  etcd_->Resume();
}

TEST_F(EtcdClientTest, GoesOnAfterARestart) {
  const auto lease = client_->Grant(absl::Seconds(30));
  ASSERT_TRUE(lease.ok()) << lease.status();
  ASSERT_TRUE(client_->Put("/k", "v", lease->id).ok());
  etcd_->Kill();
  EXPECT_FALSE(client_->Get("/k").ok());
  etcd_->Start();
  ASSERT_TRUE(Eventually([&] { return client_->Get("/k").ok(); }));
  EXPECT_EQ(ValueOf(*client_, "/k"), "v");
  EXPECT_TRUE(client_->KeepAlive(lease->id).ok());
}

// ---- TLS, and users

// Calls of etcd's Auth service that nobody but an administrator makes: name, then string fields from 1 on.
class EtcdAdmin {
 public:
  explicit EtcdAdmin(const EtcdOptions& options) {
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = *ReadSmallFile(options.ca, 1 << 20);
    ssl.pem_cert_chain = *ReadSmallFile(options.cert, 1 << 20);
    ssl.pem_private_key = *ReadSmallFile(options.key, 1 << 20);
    channel_ = grpc::CreateChannel(options.endpoints[0], grpc::SslCredentials(ssl));
  }

  grpc::Status Call(const std::string& method, const std::vector<std::string>& fields) {
    std::string message;
    for (size_t i = 0; i < fields.size(); ++i) message += Field(static_cast<int>(i) + 1, fields[i]);
    return Send(method, message);
  }
  // Reading and writing of all keys that begin with `prefix`.
  grpc::Status Grant(const std::string& role, const std::string& prefix) {
    const std::string permission =
        std::string("\x08\x02", 2) + Field(2, prefix) + Field(3, EtcdPrefixEnd(prefix));
    return Send("RoleGrantPermission", Field(1, role) + Field(2, permission));
  }

 private:
  // Length-delimited, of fewer than 128 bytes.
  static std::string Field(int number, const std::string& value) {
    return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(value.size())} + value;
  }
  grpc::Status Send(const std::string& method, const std::string& message) {
    grpc::GenericStub stub(channel_);
    grpc::ClientContext context;
    SetTimeout(context, absl::Seconds(15));
    context.set_wait_for_ready(true);
    const grpc::Slice slice(message);
    const grpc::ByteBuffer request(&slice, 1);
    grpc::ByteBuffer reply;
    grpc::CompletionQueue queue;
    const auto call = stub.PrepareUnaryCall(&context, "/etcdserverpb.Auth/" + method, request, &queue);
    call->StartCall();
    grpc::Status status;
    call->Finish(&reply, &status, this);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    return status;
  }

  std::shared_ptr<grpc::Channel> channel_;
};

// An etcd that speaks TLS, asks clients for a certificate, and knows users: root, and "tidepool", which may
// read and write what begins with /mine/.
class EtcdTlsTest : public testing::Test {
 protected:
  void SetUp() override {
    TP_NEEDS_ETCD();
    authority_.Issue("etcd", "127.0.0.1");
    authority_.Issue("nobody");
    etcd_ = std::make_unique<EtcdProcess>(
        std::vector<std::string>(),
        EtcdProcess::Tls{authority_.ca_file(), authority_.cert_file("etcd"), authority_.key_file("etcd"),
                         authority_.cert_file("nobody"), authority_.key_file("nobody")});
    ASSERT_TRUE(etcd_->ready());
    options_ = etcd_->options();
  }
  void EnableUsers() {
    EtcdAdmin admin(options_);
    const auto must = [](const grpc::Status& status) { ASSERT_TRUE(status.ok()) << status.error_message(); };
    must(admin.Call("UserAdd", {"root", "root's password"}));
    must(admin.Call("UserGrantRole", {"root", "root"}));
    must(admin.Call("RoleAdd", {"mine"}));
    must(admin.Grant("mine", "/mine/"));
    must(admin.Call("UserAdd", {"tidepool", "a password"}));
    must(admin.Call("UserGrantRole", {"tidepool", "mine"}));
    must(admin.Call("AuthEnable", {}));
  }
  std::unique_ptr<EtcdClient> Client(const EtcdOptions& options) { return *EtcdClient::Create(options); }

  TestAuthority authority_;
  std::unique_ptr<EtcdProcess> etcd_;
  EtcdOptions options_;
};

TEST_F(EtcdTlsTest, SpeaksToAnEtcdThatItsAuthorityVouchesFor) {
  auto client = Client(options_);
  ASSERT_TRUE(client->Put("/a", "1", 0).ok());
  EXPECT_EQ(ValueOf(*client, "/a"), "1");
}

TEST_F(EtcdTlsTest, SpeaksToNoOtherAndNotInPlaintext) {
  TestAuthority stranger;
  stranger.Issue("nobody");
  EtcdOptions other = options_;
  other.ca = stranger.ca_file();
  EXPECT_FALSE(Client(other)->Put("/a", "1", 0).ok()) << "etcd's certificate is another authority's";
  EtcdOptions plain = options_;
  plain.ca = plain.cert = plain.key = "";
  EXPECT_FALSE(Client(plain)->Put("/a", "1", 0).ok());
  EtcdOptions unnamed = options_;
  unnamed.cert = unnamed.key = "";
  EXPECT_FALSE(Client(unnamed)->Put("/a", "1", 0).ok()) << "etcd asks for a client's certificate";
  EtcdOptions forged = options_;
  forged.cert = stranger.cert_file("nobody");
  forged.key = stranger.key_file("nobody");
  EXPECT_FALSE(Client(forged)->Put("/a", "1", 0).ok()) << "the client's certificate is another authority's";
}

TEST_F(EtcdTlsTest, AUserReachesItsOwnKeysAndNoOthers) {
  EnableUsers();
  EtcdOptions options = options_;
  options.user = "tidepool";
  options.password = "a password";
  auto client = Client(options);
  ASSERT_TRUE(client->Put("/mine/a", "1", 0).ok());
  const auto lease = client->Grant(absl::Seconds(30));
  ASSERT_TRUE(lease.ok()) << lease.status();
  ASSERT_TRUE(client->Create("/mine/b", "2", lease->id).ok());
  EXPECT_TRUE(client->KeepAlive(lease->id).ok());
  const auto listed = client->List("/mine/");
  ASSERT_TRUE(listed.ok()) << listed.status();
  EXPECT_EQ(listed->entries.size(), 2u);
  std::atomic<int> events{0};
  EtcdClient::WatchSink sink{
      .on_ready = [] {},
      .on_events = [&](const auto& more, int64_t) { events += static_cast<int>(more.size()); }};
  std::thread watch([&] { (void)client->Watch("/mine/", listed->revision, absl::Seconds(60), sink); });
  EXPECT_TRUE(Eventually([&] { return events > 0; }));
  const absl::Status foreign = client->Put("/others/a", "1", 0).status();
  EXPECT_TRUE(absl::IsPermissionDenied(foreign)) << foreign;
  EXPECT_TRUE(client->Revoke(lease->id).ok());
  client->Stop();
  watch.join();

  options.password = "a guess";
  const absl::Status wrong = Client(options)->Put("/mine/a", "1", 0).status();
  EXPECT_TRUE(absl::IsInvalidArgument(wrong)) << wrong;
  EXPECT_NE(wrong.message().find("etcd refuses the user"), std::string::npos) << wrong;
}

TEST_F(EtcdTlsTest, AUserLogsInAgainAfterEtcdHasForgottenItsToken) {
  EnableUsers();
  EtcdOptions options = options_;
  options.user = "tidepool";
  options.password = "a password";
  auto client = Client(options);
  ASSERT_TRUE(client->Put("/mine/a", "1", 0).ok());
  etcd_->Kill();  // tokens are in its memory
  etcd_->Start();
  ASSERT_TRUE(Eventually([&] { return client->Put("/mine/a", "2", 0).ok(); }));
  EXPECT_EQ(ValueOf(*client, "/mine/a"), "2");
}

}  // namespace
}  // namespace tidepool
