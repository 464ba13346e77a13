// Sharing an arena between two processes, either of which dies at any moment.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <sstream>

#include "tests/kvstore/arena_test_util.h"

extern char** environ;

namespace tidepool {
namespace {

// Another process, spoken to line by line.
class Peer {
 public:
  explicit Peer(std::vector<std::string> args) {
    int in[2], out[2];
    EXPECT_EQ(pipe2(in, O_CLOEXEC), 0);
    EXPECT_EQ(pipe2(out, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    args.insert(args.begin(), ARENA_PEER);
    std::vector<char*> argv;
    for (std::string& a : args) argv.push_back(a.data());
    argv.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, ARENA_PEER, &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    to_ = FileDescriptor(in[1]);
    from_ = fdopen(out[0], "r");
  }
  ~Peer() {
    Kill();
    if (from_ != nullptr) fclose(from_);
  }
  void Kill() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }
  void Stop() {
    kill(pid_, SIGSTOP);
    waitpid(pid_, nullptr, WUNTRACED);  // until it does stand still
  }
  void Continue() { kill(pid_, SIGCONT); }
  std::string Line() {
    char line[512] = {};
    do {
      if (fgets(line, sizeof line, from_) == nullptr) return "";
    } while (line[0] == '[');  // its log
    return std::string(line, strcspn(line, "\n"));
  }
  void Tell(const std::string& command) {
    const std::string line = command + "\n";
    EXPECT_EQ(write(to_.get(), line.data(), line.size()), static_cast<ssize_t>(line.size()));
  }
  // The number in its answer.
  int Ask(const std::string& command) {
    Tell(command);
    const std::string answer = Line();
    int n = -1;
    EXPECT_EQ(sscanf(answer.c_str(), "ok %d", &n), 1) << command << " → " << answer;
    return n;
  }

 private:
  pid_t pid_ = -1;
  FileDescriptor to_;
  FILE* from_ = nullptr;
};

class ReaderDies : public testing::Test {
 protected:
  void SetUp() override {
    owner_.Publish(1000, 1);
    reader_ = std::make_unique<Peer>(std::vector<std::string>{"reader", owner_.peer().arena});
    ASSERT_EQ(reader_->Ask("take map 1000 1"), 1);
    ASSERT_EQ(reader_->Ask("drop"), 0);
    ASSERT_TRUE(EventuallyTrue([&] { return owner_.server->held_blocks() == 0; }));
  }
  void DieAndExpectIdle() {
    reader_->Kill();
    EXPECT_TRUE(EventuallyTrue([&] { return owner_.server->connections() == 0; }));
    owner_.offers->Clear();
    EXPECT_TRUE(EventuallyTrue([&] { return owner_.Idle(); })) << owner_.pool->stats().leased;
  }

  ArenaOwner owner_;
  std::unique_ptr<Peer> reader_;
};

TEST_F(ReaderDies, WithNothing) { DieAndExpectIdle(); }

TEST_F(ReaderDies, WhileItReadsWhatIsOnOffer) {
  owner_.Offer("r", 1, 50);
  ASSERT_EQ(reader_->Ask("take r 1 50"), 50);
  DieAndExpectIdle();
}

TEST_F(ReaderDies, WhileItReadsWhatIsNoLongerOnOffer) {
  owner_.Offer("r", 1, 50);
  ASSERT_EQ(reader_->Ask("take r 1 50"), 50);
  ASSERT_EQ(reader_->Ask("done r"), 1);
  ASSERT_TRUE(EventuallyTrue([&] { return owner_.server->held_blocks() == 50; }));
  ASSERT_EQ(reader_->Ask("check"), 50);
  DieAndExpectIdle();
}

TEST_F(ReaderDies, WhileItReadsWhatItWasGranted) {
  owner_.Publish(1, 50);
  ASSERT_EQ(reader_->Ask("take r 1 50"), 50);
  EXPECT_EQ(owner_.leases(LeaseKind::kPeer), 50u);
  DieAndExpectIdle();
}

TEST_F(ReaderDies, WhileItWaitsForAGrowingOffer) {
  owner_.Offer("r", 1, 5, /*layers=*/1);
  ASSERT_EQ(reader_->Ask("wait r 1 5"), 0);
  DieAndExpectIdle();
}

TEST_F(ReaderDies, NotYetOnlyStopped) {
  owner_.Offer("r", 1, 50);
  ASSERT_EQ(reader_->Ask("take r 1 50"), 50);
  reader_->Stop();
  owner_.offers->Release("r");
  // However long it stands still, it may go on reading: nothing but its end frees.
  EXPECT_EQ(owner_.server->held_blocks(), 50u);
  EXPECT_FALSE(owner_.pool->Reserve(owner_.pool->stats().slots - 49).ok());
  DieAndExpectIdle();
}

TEST_F(ReaderDies, AnotherReaderIsNotConcerned) {
  owner_.Offer("r", 1, 50);
  Peer other({"reader", owner_.peer().arena});
  ASSERT_EQ(other.Ask("take r 1 50"), 50);
  ASSERT_EQ(reader_->Ask("take r 1 50"), 50);
  owner_.offers->Release("r");
  reader_->Kill();
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.server->connections() == 1; }));
  EXPECT_EQ(owner_.server->held_blocks(), 50u);
  EXPECT_EQ(other.Ask("check"), 50);
  EXPECT_EQ(other.Ask("drop"), 0);
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.Idle(); }));
}

// Killed at a random moment of what it does, over and over.
TEST_F(ReaderDies, AtAnyMoment) {
  Rng rng(9);
  for (int round = 0; round < 25; ++round) {
    Peer reader({"reader", owner_.peer().arena});
    owner_.Offer("r", 1, 20);
    for (int i = 0; i < 8; ++i) {
      const char* commands[] = {"take r 1 20", "take r 5 3", "drop", "done r", "take s 1000 1", "check"};
      reader.Tell(commands[rng.Below(6)]);
    }
    const absl::Time when = Clock::Real().Now() + absl::Microseconds(rng.Below(15'000));
    while (Clock::Real().Now() < when) std::this_thread::yield();
    reader.Kill();
    owner_.offers->Release("r");
  }
  DieAndExpectIdle();
}

class OwnerDies : public testing::Test {
 protected:
  void SetUp() override {
    peer_ = {owner_.Line(), "boot"};
    ASSERT_EQ(owner_.Ask("publish x 1000 1"), 0);
    ASSERT_TRUE(TakeNow(*client_, peer_, "map", 1000, 1).status.ok());
  }

  Peer owner_{std::vector<std::string>{"owner"}};
  ArenaClient::Peer peer_;
  MetricRegistry metrics_;
  std::unique_ptr<ArenaClient> client_ = MakeArenaClient(&metrics_);
};

TEST_F(OwnerDies, WhileItsBlocksAreRead) {
  ASSERT_EQ(owner_.Ask("offer r 1 50"), 0);
  auto taken = client_->TryTake(peer_, "r", TestKeys(1, 50));
  auto granted = TakeNow(*client_, peer_, "s", 1000, 1);
  ASSERT_TRUE(taken.has_value() && granted.status.ok());
  owner_.Kill();
  EXPECT_TRUE(EventuallyTrue([&] { return client_->peers() == 0; }));
  ExpectHolds(taken->blocks, 1, 50);
  ExpectHolds(granted.blocks, 1000, 1);
  EXPECT_FALSE(client_->TryTake(peer_, "r", TestKeys(1, 50)).has_value());
  EXPECT_FALSE(client_->Reaches(peer_)) << "the transport is told of it next";
  EXPECT_FALSE(client_->Done(peer_, "r"));
}

TEST_F(OwnerDies, WhileItIsAsked) {
  ASSERT_EQ(owner_.Ask("grow r 1 5"), 0);
  std::thread killer([&] {
    EXPECT_TRUE(EventuallyTrue([&] { return client_->active() == 1; }));
    owner_.Kill();
  });
  EXPECT_TRUE(absl::IsUnavailable(TakeNow(*client_, peer_, "r", 1, 5).status));
  killer.join();
}

TEST_F(OwnerDies, BeforeItIsAsked) {
  owner_.Kill();
  EXPECT_TRUE(absl::IsUnavailable(TakeNow(*client_, peer_, "r", 1, 5).status));
}

TEST_F(OwnerDies, OnlyStoppedItIsWaitedForUntilTheDeadline) {
  owner_.Stop();
  EXPECT_TRUE(absl::IsDeadlineExceeded(TakeNow(*client_, peer_, "r", 1, 5, absl::Milliseconds(50)).status));
  // Not even connected to: given up soon, for there is the transport.
  auto fresh = MakeArenaClient(&metrics_, {.hello_timeout = absl::Milliseconds(50)});
  EXPECT_TRUE(absl::IsUnavailable(TakeNow(*fresh, peer_, "r", 1, 5).status));
}

// More is let go of than the connection has room for, and nothing happens here after that.
TEST_F(OwnerDies, OnlyStoppedItHearsLaterOfAllThatWasLetGo) {
  constexpr size_t kGrants = 1000;
  std::vector<BlockRun> held;
  for (size_t i = 0; i < kGrants; ++i) {
    auto taken = TakeNow(*client_, peer_, "s", 1000, 1);
    ASSERT_TRUE(taken.status.ok() && taken.blocks.size() == 1) << i;
    held.push_back(std::move(taken.blocks));
  }
  ASSERT_EQ(owner_.Ask("held"), static_cast<int>(kGrants));
  owner_.Stop();
  held.clear();
  owner_.Continue();
  EXPECT_TRUE(EventuallyTrue([&] { return owner_.Ask("held") == 0; }));
}

}  // namespace
}  // namespace tidepool
