#include <errno.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <thread>

#include "kvstore/disk/disk_tier.h"
#include "tests/kvstore/disk_test_util.h"
#include "tests/kvstore/faulty_disk_io.h"
#include "tests/kvstore/tier_log.h"

namespace tidepool {
namespace {

using SteadyClock = std::chrono::steady_clock;

// Where an index hangs that is told to; shared with its thread.
class IndexGate {
 public:
  void Hang() {
    std::lock_guard lock(mu_);
    hang_ = true;
  }
  void GoOn() {
    {
      std::lock_guard lock(mu_);
      hang_ = false;
    }
    changed_.notify_all();
  }
  // For DiskTierOptions::before_index_change.
  void Pass() {
    std::unique_lock lock(mu_);
    inside_ = hang_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return !hang_; });
  }
  void AwaitInside() {
    std::unique_lock lock(mu_);
    changed_.wait(lock, [&] { return inside_; });
  }

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  bool hang_ = false, inside_ = false;
};

// How often this process has `file` open.
size_t TimesOpen(const std::string& file) {
  size_t n = 0;
  for (const auto& fd : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    n += std::filesystem::read_symlink(fd.path(), gone) == file;
  }
  return n;
}

class DiskFaultTest : public testing::TestWithParam<bool> {  // io_uring, or threads
 protected:
  DiskTierOptions Options(size_t records = 8) {
    DiskTierOptions o = SmallOptions(dir_.path(), metrics_, records);
    o.make_io = [this](size_t depth) -> absl::StatusOr<std::unique_ptr<DiskIo>> {
      std::unique_ptr<DiskIo> real;
      if (GetParam()) {
        auto ring = MakeUringDiskIo(depth);
        if (!ring.ok()) return ring.status();
        real = *std::move(ring);
      } else {
        real = MakeThreadDiskIo(depth, 4);
      }
      return std::make_unique<FaultyDiskIo>(std::move(real), faults_);
    };
    return o;
  }
  void SetUp() override {
    if (GetParam() && !MakeUringDiskIo(1).ok()) GTEST_SKIP() << "the kernel refuses io_uring";
  }
  uint64_t Faults(const char* reason) {
    return CounterOf(metrics_, "tidepool_pool_faults_total", {{"tier", "disk"}, {"reason", reason}});
  }
  static double MillisecondsOf(const std::function<void()>& call) {
    const auto start = SteadyClock::now();
    call();
    return std::chrono::duration<double, std::milli>(SteadyClock::now() - start).count();
  }

  TempDir dir_;
  MetricRegistry metrics_;
  std::shared_ptr<DiskFaults> faults_ = std::make_shared<DiskFaults>();
};

INSTANTIATE_TEST_SUITE_P(Io, DiskFaultTest, testing::Bool(),
                         [](const auto& i) { return i.param ? "Uring" : "Threads"; });

TEST_P(DiskFaultTest, SoundDiskWorks) {
  auto tier = MustOpen(Options());
  for (uint64_t n = 0; n < 20; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  EXPECT_TRUE(Load(*tier, 19).ok());
}

TEST_P(DiskFaultTest, NoSpaceSwitchesOffAndComesBackWhenThereIsRoom) {
  auto tier = MustOpen(Options());
  TierLog log;
  tier->SetObserver(&log);
  ASSERT_TRUE(Store(*tier, 1).ok());
  faults_->write_error = ENOSPC;
  EXPECT_EQ(Store(*tier, 2).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(tier->health().state, TierState::kOff);
  EXPECT_THAT(tier->health().reason, testing::HasSubstr("no space"));
  EXPECT_FALSE(tier->Contains(KeyOf(1)));
  EXPECT_LT(MillisecondsOf([&] { EXPECT_EQ(Load(*tier, 1).code(), absl::StatusCode::kUnavailable); }), 1000);
  EXPECT_LT(MillisecondsOf([&] { EXPECT_EQ(Store(*tier, 3).code(), absl::StatusCode::kUnavailable); }), 1000);
  // Looked at several times, and still off.
  while (Faults("no_space") < 3) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(tier->health().state, TierState::kOff);
  faults_->write_error = 0;
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  EXPECT_TRUE(Load(*tier, 1).ok());
  for (uint64_t n = 2; n < 12; ++n) EXPECT_TRUE(Store(*tier, n).ok());  // no extent was lost
  EXPECT_EQ(tier->stats().blocks, 8u);
  tier->SetObserver(nullptr);
  const auto health = log.health();
  ASSERT_EQ(health.size(), 2u);
  EXPECT_EQ(health[0].state, TierState::kOff);
  EXPECT_EQ(health[1].state, TierState::kOn);
}

TEST_P(DiskFaultTest, ReadErrorIsUnavailableThenAMissAndTheRestStays) {
  auto tier = MustOpen(Options());
  for (uint64_t n = 0; n < 4; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  faults_->read_error = EIO;
  EXPECT_EQ(Load(*tier, 2).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(tier->health().state, TierState::kOff);
  faults_->read_error = 0;
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  EXPECT_EQ(Load(*tier, 2).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(Load(*tier, 1).ok());
  EXPECT_GE(Faults("io_error"), 1u);
}

TEST_P(DiskFaultTest, AnExtentWhereWritingFailedIsNotUsedAgain) {
  auto tier = MustOpen(Options(8));
  faults_->write_error = EIO;
  EXPECT_EQ(Store(*tier, 1).code(), absl::StatusCode::kUnavailable);
  faults_->write_error = 0;
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  for (uint64_t n = 0; n < 10; ++n) EXPECT_TRUE(Store(*tier, n).ok());
  EXPECT_EQ(tier->stats().blocks, 7u);
}

TEST_P(DiskFaultTest, SlowDiskIsOffWithinTwoSecondsAndComesBack) {
  DiskTierOptions o = Options();
  o.slow_op = absl::Milliseconds(800);  // the product's
  o.read_timeout = absl::Seconds(10);
  auto tier = MustOpen(o);
  ASSERT_TRUE(Store(*tier, 1).ok());
  faults_->delay_ms = 1000;
  const double ms = MillisecondsOf([&] { EXPECT_EQ(Load(*tier, 1).code(), absl::StatusCode::kUnavailable); });
  EXPECT_LT(ms, 2000);
  EXPECT_EQ(tier->health().state, TierState::kOff);
  EXPECT_LT(MillisecondsOf([&] { EXPECT_EQ(Load(*tier, 1).code(), absl::StatusCode::kUnavailable); }), 500);
  EXPECT_GE(Faults("slow"), 1u);
  faults_->delay_ms = 0;
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  EXPECT_TRUE(Load(*tier, 1).ok());
}

TEST_P(DiskFaultTest, HungDiskAnswersEverybodyAndTouchesNoBufferLater) {
  auto tier = MustOpen(Options());
  for (uint64_t n = 0; n < 4; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  faults_->hang = true;
  std::vector<std::vector<std::byte>> dst(4, std::vector<std::byte>(256));
  std::atomic<int> unavailable = 0;
  for (uint64_t n = 0; n < 4; ++n) {
    tier->Read(KeyOf(n), {}, dst[n], absl::Seconds(10),
               [&](absl::StatusOr<BlockTier::Record> r) { unavailable += absl::IsUnavailable(r.status()); });
  }
  EXPECT_EQ(Store(*tier, 9).code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(AwaitState(*tier, TierState::kOff));
  while (unavailable < 4) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  for (auto& d : dst) std::ranges::fill(d, std::byte{0xee});
  // It stays off as long as it hangs.
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_EQ(tier->health().state, TierState::kOff);
  faults_->hang = false;
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  for (auto& d : dst) EXPECT_EQ(d, std::vector<std::byte>(256, std::byte{0xee}));
  for (uint64_t n = 0; n < 4; ++n) EXPECT_TRUE(Load(*tier, n).ok());
  EXPECT_EQ(unavailable, 4);
}

TEST_P(DiskFaultTest, ADiskThatHangsForEverDoesNotKeepTheTierFromEnding) {
  auto tier = MustOpen(Options());
  ASSERT_TRUE(Store(*tier, 1).ok());
  faults_->hang = true;
  std::vector<std::byte> dst(256);
  std::atomic<int> answers = 0;
  tier->Read(KeyOf(1), {}, dst, absl::Seconds(10), [&](absl::StatusOr<BlockTier::Record>) { ++answers; });
  while (faults_->reads == 0) std::this_thread::yield();  // it is at the disk
  const std::string file = tier->directory() + "/blocks";
  EXPECT_LT(MillisecondsOf([&] { tier.reset(); }), 5000);
  EXPECT_EQ(answers, 1);
  EXPECT_EQ(TimesOpen(file), 1u) << "what hangs may go on in it";
}

TEST_P(DiskFaultTest, ATierThatEndsWellLeavesNothingOpen) {
  auto tier = MustOpen(Options());
  ASSERT_TRUE(Store(*tier, 1).ok());
  const std::string file = tier->directory() + "/blocks";
  EXPECT_EQ(TimesOpen(file), 1u);
  tier.reset();
  EXPECT_EQ(TimesOpen(file), 0u);
}

TEST_P(DiskFaultTest, WhereTheWholeDiskHangsWhoWaitsForTheIndexIsAnsweredToo) {
  auto gate = std::make_shared<IndexGate>();
  DiskTierOptions o = Options();
  o.slow_op = absl::Milliseconds(100);
  o.before_index_change = [gate] { gate->Pass(); };
  auto tier = MustOpen(o);
  ASSERT_TRUE(Store(*tier, 1).ok());
  ASSERT_TRUE(Store(*tier, 2).ok());
  ASSERT_TRUE(tier->WaitIdle(absl::Seconds(10)));
  gate->Hang();
  std::promise<absl::Status> erased, cleared;
  tier->Erase(KeyOf(1), [&](absl::Status s) { erased.set_value(s); });
  gate->AwaitInside();
  tier->EraseIf(BlocksOfTenant("nobody"),
                [&](const absl::StatusOr<uint64_t>& s) { cleared.set_value(s.status()); });
  // What is read is late long before the index is: the tier is off when that is judged.
  faults_->hang = true;
  EXPECT_EQ(Load(*tier, 2).code(), absl::StatusCode::kUnavailable);
  for (auto* answer : {&erased, &cleared}) {
    auto future = answer->get_future();
    ASSERT_EQ(future.wait_for(std::chrono::seconds(20)), std::future_status::ready);
    EXPECT_EQ(future.get().code(), absl::StatusCode::kUnavailable);
  }
  faults_->hang = false;
  gate->GoOn();
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  EXPECT_TRUE(Load(*tier, 2).ok());
  EXPECT_TRUE(Forget(*tier, 2).ok());
}

TEST_P(DiskFaultTest, AnIndexThatHangsForEverDoesNotKeepTheTierFromEnding) {
  auto gate = std::make_shared<IndexGate>();
  DiskTierOptions o = Options();
  o.close_wait = absl::Milliseconds(300);
  o.before_index_change = [gate] { gate->Pass(); };
  const int before = DiskTiersLeftBehind();
  auto tier = MustOpen(o);
  ASSERT_TRUE(Store(*tier, 1).ok());
  ASSERT_TRUE(tier->WaitIdle(absl::Seconds(10)));
  gate->Hang();
  std::atomic<int> erased = 0, cleared = 0;
  tier->Erase(KeyOf(1), [&](absl::Status s) { erased += absl::IsUnavailable(s) ? 1 : 100; });
  gate->AwaitInside();
  tier->EraseIf(EveryBlock(), [&](absl::StatusOr<uint64_t> s) { cleared += s.ok() ? 100 : 1; });
  EXPECT_LT(MillisecondsOf([&] { tier.reset(); }), 5000);
  EXPECT_EQ(erased, 1);
  EXPECT_EQ(cleared, 1);
  EXPECT_EQ(DiskTiersLeftBehind(), before + 1);
  o = DiskTierOptions();
  gate->GoOn();
  // The thread ends, and what it held on to goes with it.
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (gate.use_count() > 1 && std::chrono::steady_clock::now() < end)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(gate.use_count(), 1);
}

TEST_P(DiskFaultTest, ReadEndsAtItsDeadlineWhateverTheDiskDoes) {
  DiskTierOptions o = Options();
  o.slow_op = absl::Seconds(30);
  auto tier = MustOpen(o);
  ASSERT_TRUE(Store(*tier, 1).ok());
  faults_->hang = true;
  std::vector<std::byte> dst(256);
  absl::Status status;
  const double ms = MillisecondsOf([&] {
    status = AwaitAnswer<absl::StatusOr<BlockTier::Record>>([&](BlockTier::ReadDone d) {
               tier->Read(KeyOf(1), {}, dst, absl::Milliseconds(100), std::move(d));
             }).status();
  });
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_LT(ms, 1000);
  faults_->hang = false;
  EXPECT_TRUE(Load(*tier, 1).ok());
}

TEST_P(DiskFaultTest, CancelledReadIsAnsweredAtOnceAndItsBufferIsFree) {
  auto tier = MustOpen(Options());
  ASSERT_TRUE(Store(*tier, 1).ok());
  faults_->delay_ms = 50;
  std::vector<std::byte> dst(256, std::byte{0xee});
  absl::Status status;
  const auto id = tier->Read(KeyOf(1), {}, dst, absl::Seconds(10),
                             [&](absl::StatusOr<BlockTier::Record> r) { status = r.status(); });
  EXPECT_TRUE(tier->CancelRead(id));
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
  EXPECT_FALSE(tier->CancelRead(id));
  EXPECT_TRUE(Load(*tier, 1).ok());  // after it, on the same disk
  EXPECT_EQ(dst, std::vector<std::byte>(256, std::byte{0xee}));
}

TEST_P(DiskFaultTest, ReadsBeyondTheLimitAreRefusedAtOnce) {
  DiskTierOptions o = Options();
  o.max_reads = 2;
  auto tier = MustOpen(o);
  ASSERT_TRUE(Store(*tier, 1).ok());
  faults_->delay_ms = 100;
  std::vector<std::byte> a(256), b(256), c(256);
  std::atomic<int> ok = 0;
  absl::Status third;
  const auto count = [&](absl::StatusOr<BlockTier::Record> r) { ok += r.ok(); };
  tier->Read(KeyOf(1), {}, a, absl::Seconds(10), count);
  tier->Read(KeyOf(1), {}, b, absl::Seconds(10), count);
  tier->Read(KeyOf(1), {}, c, absl::Seconds(10),
             [&](absl::StatusOr<BlockTier::Record> r) { third = r.status(); });
  EXPECT_EQ(third.code(), absl::StatusCode::kResourceExhausted);
  faults_->delay_ms = 0;
  tier.reset();
}

TEST_P(DiskFaultTest, StoresWaitWhileThereAreLoads) {
  DiskTierOptions o = Options(64);
  o.read_depth = 2;
  o.write_share = 0;
  o.read_quiet = absl::Seconds(1);  // longer than a busy machine keeps the reader waiting
  o.write_wait = absl::Milliseconds(300);
  auto tier = MustOpen(o);
  ASSERT_TRUE(Store(*tier, 1).ok());
  faults_->delay_ms = 5;
  std::atomic<bool> stop = false;
  std::thread reader([&] {
    while (!stop) (void)Load(*tier, 1);
  });
  while (faults_->reads < 3) std::this_thread::yield();
  const uint64_t before = faults_->writes;
  EXPECT_EQ(Store(*tier, 50).code(), absl::StatusCode::kResourceExhausted);  // it waited in vain
  EXPECT_EQ(faults_->writes, before);
  stop = true;
  reader.join();
  const auto end = SteadyClock::now() + std::chrono::seconds(20);
  absl::Status later = Store(*tier, 51);
  while (!later.ok() && SteadyClock::now() < end) later = Store(*tier, 51);
  EXPECT_TRUE(later.ok()) << later;  // the disk has been quiet for long enough
}

TEST_P(DiskFaultTest, ErasureReachesAStoreUnderWay) {
  auto tier = MustOpen(Options());
  faults_->delay_ms = 100;
  const auto bytes = BytesOf(1), more = BytesOf(2);
  std::promise<absl::Status> first, second;
  tier->Write(InfoOf(1), bytes, [&](absl::Status s) { first.set_value(s); });
  tier->Write(InfoOf(2), more, [&](absl::Status s) { second.set_value(s); });
  const auto erased = AwaitAnswer<absl::StatusOr<uint64_t>>(
      [&](BlockTier::CountDone d) { tier->EraseIf(BlocksOfTenant("odd"), std::move(d)); });
  EXPECT_TRUE(erased.ok());
  EXPECT_EQ(first.get_future().get().code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(second.get_future().get().ok());
  EXPECT_FALSE(tier->Contains(KeyOf(1)));
  EXPECT_TRUE(tier->Contains(KeyOf(2)));
  faults_->delay_ms = 0;
  EXPECT_TRUE(Store(*tier, 1).ok());
}

TEST_P(DiskFaultTest, ABlockIsNotEvictedUnderItsReader) {
  DiskTierOptions o = Options(4);
  o.write_share = 10;  // stores may go beside loads
  auto tier = MustOpen(o);
  for (uint64_t n = 0; n < 4; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  faults_->delay_ms = 30;
  std::vector<std::byte> dst(256);
  std::promise<absl::Status> read;
  tier->Read(KeyOf(0), {}, dst, absl::Seconds(10),
             [&](absl::StatusOr<BlockTier::Record> r) { read.set_value(r.status()); });
  for (uint64_t n = 10; n < 16; ++n) EXPECT_TRUE(Store(*tier, n).ok());
  EXPECT_TRUE(read.get_future().get().ok());
  EXPECT_EQ(dst, BytesOf(0));
}

TEST_P(DiskFaultTest, RandomFaultsNeverGiveWrongBytesAndItRecovers) {
  DiskTierOptions o = Options(16);
  o.slow_op = absl::Milliseconds(50);
  auto tier = MustOpen(o);
  std::atomic<bool> stop = false;
  std::atomic<int> wrong = 0, hits = 0, unexpected = 0;
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(t);
      while (!stop) {
        const uint64_t n = rng.Below(40);
        const absl::Status status = rng.Chance(0.5) ? Load(*tier, n) : Store(*tier, n);
        wrong += WrongBytes(status);
        hits += status.ok();
        unexpected += absl::IsInternal(status) || absl::IsDataLoss(status);
      }
    });
  }
  Rng rng(99);
  for (int i = 0; i < 30; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    faults_->write_error = rng.Chance(0.2) ? ENOSPC : rng.Chance(0.1) ? EIO : 0;
    faults_->read_error = rng.Chance(0.1) ? EIO : 0;
    faults_->delay_ms = rng.Chance(0.2) ? 80 : 0;
    faults_->hang = rng.Chance(0.1);
  }
  faults_->write_error = 0;
  faults_->read_error = 0;
  faults_->delay_ms = 0;
  faults_->hang = false;
  stop = true;
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(unexpected, 0);
  EXPECT_GT(hits, 0);
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  EXPECT_EQ(tier->stats().reads_waiting + tier->stats().writes_waiting, 0u);
}

// A file system of a few MiB of the test's own.
class FullDiskTest : public testing::Test {
 protected:
  void SetUp() override {
    if (mount("tmpfs", dir_.path().c_str(), "tmpfs", 0, "size=48m") != 0)
      GTEST_SKIP() << "mounting a tmpfs needs root: " << strerror(errno);
    mounted_ = true;
  }
  void TearDown() override {
    if (mounted_) umount2(dir_.path().c_str(), MNT_DETACH);
  }
  void Fill() {
    const int fd = open((dir_.path() + "/filler").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    const std::vector<char> junk(1 << 16, 'x');
    while (write(fd, junk.data(), junk.size()) > 0) {
    }
    for (char c = 'x'; write(fd, &c, 1) > 0;) {
    }
    close(fd);
  }
  void MakeRoom() { std::filesystem::remove(dir_.path() + "/filler"); }

  TempDir dir_;
  MetricRegistry metrics_;
  bool mounted_ = false;
};

TEST_F(FullDiskTest, TierWithoutRoomForItsFileIsOffUntilThereIs) {
  Fill();
  DiskTierOptions o = SmallOptions(dir_.path(), metrics_);
  auto tier = MustCreate(o);
  const TierHealth health = tier->WaitOpened(absl::Seconds(20));
  EXPECT_EQ(health.state, TierState::kOff);
  EXPECT_EQ(Load(*tier, 1).code(), absl::StatusCode::kUnavailable);
  MakeRoom();
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  EXPECT_TRUE(Store(*tier, 1).ok());
}

TEST_F(FullDiskTest, BudgetLargerThanTheDiskSaysHowMuchIsFree) {
  DiskTierOptions o = SmallOptions(dir_.path(), metrics_);
  o.bytes = 100 << 20;
  auto tier = MustCreate(o);
  const TierHealth health = tier->WaitOpened(absl::Seconds(20));
  EXPECT_EQ(health.state, TierState::kOff);
  EXPECT_THAT(health.reason, testing::HasSubstr("no room for kv.disk.bytes"));
  EXPECT_THAT(health.reason, testing::HasSubstr("MiB are free"));
}

TEST_F(FullDiskTest, DiskThatFillsUpSwitchesOffAndComesBackWithItsBlocks) {
  DiskTierOptions o = SmallOptions(dir_.path(), metrics_, 64);
  o.layout.layers = 512;  // 64 KiB a block: larger than what may be left in corners
  o.bytes = BytesFor(o.layout, 64);
  o.preallocate = false;
  auto tier = MustOpen(o);
  for (uint64_t n = 0; n < 8; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  ASSERT_TRUE(tier->WaitIdle(absl::Seconds(10)));
  Fill();
  const auto start = SteadyClock::now();
  // Extents that hold something may still be written; new ones may not.
  uint64_t n = 100;
  while (tier->health().state == TierState::kOn && n < 200) (void)Store(*tier, n++);
  EXPECT_EQ(tier->health().state, TierState::kOff);
  EXPECT_LT(SteadyClock::now() - start, std::chrono::seconds(2));
  EXPECT_EQ(Load(*tier, 1).code(), absl::StatusCode::kUnavailable);
  MakeRoom();
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  EXPECT_TRUE(Load(*tier, 1).ok());
  EXPECT_TRUE(Store(*tier, 300).ok());
  EXPECT_TRUE(tier->WaitIdle(absl::Seconds(20)));
  tier.reset();
  tier = MustOpen(o);
  EXPECT_TRUE(Load(*tier, 1).ok());
  EXPECT_TRUE(Load(*tier, 300).ok());
}

TEST_F(FullDiskTest, IndexWithoutRoomSwitchesOffAndComesBack) {
  DiskTierOptions o = SmallOptions(dir_.path(), metrics_, 64);
  auto tier = MustOpen(o);  // the extents have their room: only the index has none
  for (uint64_t n = 0; n < 8; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  ASSERT_TRUE(tier->WaitIdle(absl::Seconds(10)));
  Fill();
  // RocksDB sets room aside for its log: it shows when the log is full.
  uint64_t n = 100;
  while (tier->health().state == TierState::kOn && n < 200'000) {
    const absl::Status status = Store(*tier, n++);
    EXPECT_TRUE(status.ok() || absl::IsUnavailable(status)) << status;
  }
  EXPECT_EQ(tier->health().state, TierState::kOff);
  EXPECT_THAT(tier->health().reason, testing::HasSubstr("index"));
  MakeRoom();
  EXPECT_TRUE(AwaitState(*tier, TierState::kOn));
  EXPECT_TRUE(Store(*tier, 6000).ok());
  EXPECT_TRUE(Forget(*tier, 6000).ok());
  for (uint64_t k = 0; k < 8; ++k) EXPECT_FALSE(WrongBytes(Load(*tier, k)));
}

}  // namespace
}  // namespace tidepool
