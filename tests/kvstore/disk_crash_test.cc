// What kill -9, flipped bits, truncated and missing files do to the disk tier: blocks may be gone, bytes are
// never wrong, what was erased stays erased, and the tier works on.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <iostream>
#include <memory>
#include <thread>

#include "kvstore/disk/disk_tier.h"
#include "tests/kvstore/disk_test_util.h"

extern char** environ;

namespace tidepool {
namespace {

namespace fs = std::filesystem;

constexpr char kChildEnv[] = "TIDEPOOL_DISK_CRASH_CHILD";  // DIRECTORY:SEED
constexpr uint64_t kKeys = 240;
constexpr size_t kExtents = 64;
constexpr int kWrongBytes = 3;

// What the child promises, in a file that both map: it outlives the child.
struct Expected {
  // 1: its erasure was acknowledged and no store of it began since.
  std::atomic<uint8_t> erased[kKeys];
  std::atomic<uint64_t> stores, erasures, loads, compressions;
};

class ExpectedFile {
 public:
  explicit ExpectedFile(const std::string& path) {
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0 && ftruncate(fd, sizeof(Expected)) == 0) {
      void* p = mmap(nullptr, sizeof(Expected), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      if (p != MAP_FAILED) expected_ = static_cast<Expected*>(p);
    }
    if (fd >= 0) close(fd);
  }
  ~ExpectedFile() {
    if (expected_ != nullptr) munmap(expected_, sizeof(Expected));
  }
  Expected* operator->() const { return expected_; }
  bool ok() const { return expected_ != nullptr; }

 private:
  Expected* expected_ = nullptr;
};

DiskTierOptions CrashOptions(const std::string& path, MetricRegistry& metrics) {
  DiskTierOptions o = SmallOptions(path, metrics, kExtents);
  o.layout = NumbersLayout();
  o.bytes = BytesFor(o.layout, kExtents);
  o.slow_op = absl::Seconds(20);  // a busy machine is no fault of the disk
  o.lock_wait = absl::Seconds(20);
  o.max_tiers = 1;
  return o;
}

// Half of the blocks can be encoded: records of several sizes take each other's places.
std::vector<std::byte> CrashBytes(uint64_t n) {
  const size_t bytes = NumbersLayout().block_bytes();
  return n % 2 == 0 ? NumbersOf(n, bytes) : BytesOf(n, bytes);
}

// Not a test of its own: what the crash test kills. Each thread has the keys of one session.
TEST(DiskCrash, DISABLED_Child) {
  const char* arg = getenv(kChildEnv);
  ASSERT_NE(arg, nullptr);
  const std::string text = arg;
  const size_t colon = text.rfind(':');
  const std::string dir = text.substr(0, colon);
  const uint64_t seed = std::stoull(text.substr(colon + 1));
  const ExpectedFile expected(dir + "/expected");
  ASSERT_TRUE(expected.ok());
  MetricRegistry metrics;
  DiskTierOptions options = CrashOptions(dir + "/tier", metrics);
  options.compress = seed % 3 == 0;
  auto tier = MustOpen(options);
  std::vector<std::vector<std::byte>> bytes;
  for (uint64_t n = 0; n < kKeys; ++n) bytes.push_back(CrashBytes(n));
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(seed * 3 + t);
      while (true) {
        const uint64_t n = rng.Below(kKeys / 3) * 3 + t;  // InfoOf(n).session == t + 1
        const uint64_t what = rng.Below(1000);
        if (what < 450) {
          expected->erased[n] = 0;
          (void)Store(*tier, n, bytes[n]);
          ++expected->stores;
        } else if (what < 550) {
          if (Forget(*tier, n).ok()) expected->erased[n] = 1;
          ++expected->erasures;
        } else if (what < 552) {
          const auto erased = AwaitAnswer<absl::StatusOr<uint64_t>>(
              [&](BlockTier::CountDone d) { tier->EraseIf(BlocksOfSession(t + 1), std::move(d)); });
          for (uint64_t k = t; erased.ok() && k < kKeys; k += 3) expected->erased[k] = 1;
        } else if (what < 650) {
          (void)Compress(*tier, n);
          ++expected->compressions;
        } else {
          if (WrongBytes(Load(*tier, n, bytes[n]))) _exit(kWrongBytes);
          ++expected->loads;
        }
      }
    });
  }
  for (std::thread& t : threads) t.join();
}

pid_t StartChild(const std::string& dir, uint64_t seed) {
  std::string filter = "--gtest_filter=DiskCrash.DISABLED_Child",
              disabled = "--gtest_also_run_disabled_tests";
  std::string self = "/proc/self/exe";
  char* argv[] = {self.data(), filter.data(), disabled.data(), nullptr};
  std::string child = std::string(kChildEnv) + "=" + dir + ":" + std::to_string(seed);
  std::vector<char*> env;
  for (char** e = environ; *e != nullptr; ++e) env.push_back(*e);
  env.push_back(child.data());
  env.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
  pid_t pid = -1;
  EXPECT_EQ(posix_spawn(&pid, self.c_str(), &actions, nullptr, argv, env.data()), 0);
  posix_spawn_file_actions_destroy(&actions);
  return pid;
}

// TIDEPOOL_CRASH_SECONDS sets its length.
TEST(DiskCrash, KillNineAtAnyTimeLeavesNothingWrongAndNothingErased) {
  const char* length = getenv("TIDEPOOL_CRASH_SECONDS");
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(length ? std::stoi(length) : 5);
  TempDir dir;
  const ExpectedFile expected(dir.path() + "/expected");
  ASSERT_TRUE(expected.ok());
  Rng rng(1);
  uint64_t kills = 0, hits = 0, misses = 0;
  while (std::chrono::steady_clock::now() < end) {
    const pid_t child = StartChild(dir.path(), kills);
    ASSERT_GT(child, 0);
    // From before the tier is open to thousands of operations later.
    std::this_thread::sleep_for(std::chrono::milliseconds(5 + rng.Below(rng.Chance(0.2) ? 60 : 400)));
    kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the child ended by itself with " << WEXITSTATUS(status) << " ("
                                     << kWrongBytes << ": wrong bytes)";
    ++kills;
    MetricRegistry metrics;
    auto tier = MustOpen(CrashOptions(dir.path() + "/tier", metrics));
    for (uint64_t n = 0; n < kKeys; ++n) {
      const absl::Status loaded = Load(*tier, n, CrashBytes(n));
      ASSERT_FALSE(WrongBytes(loaded)) << "kill " << kills << ", block " << n;
      ASSERT_TRUE(loaded.ok() || absl::IsNotFound(loaded) || absl::IsDataLoss(loaded)) << loaded;
      ASSERT_FALSE(loaded.ok() && expected->erased[n] == 1) << "kill " << kills << ", erased block " << n;
      ++(loaded.ok() ? hits : misses);
    }
  }
  std::cout << kills << " kills, " << expected->stores << " stores, " << expected->erasures << " erasures, "
            << expected->compressions << " compressions, " << expected->loads
            << " loads by the children; after the kills " << hits << " hits, " << misses << " misses\n";
  RecordProperty("kills", std::to_string(kills));
  EXPECT_GT(kills, 0u);
  EXPECT_GT(hits, kills);  // it does keep what it can
}

class DiskDamageTest : public testing::Test {
 protected:
  static constexpr uint64_t kBlocks = 32;

  void SetUp() override {
    MetricRegistry metrics;
    // Twice: the first run leaves a log, the second makes a table of it.
    for (uint64_t run = 0; run < 2; ++run) {
      auto tier = MustOpen(SmallOptions(sound(), metrics, kBlocks));
      for (uint64_t n = run; n < kBlocks; n += 2) ASSERT_TRUE(Store(*tier, n).ok());
    }
  }
  std::string sound() const { return dir_.path() + "/sound"; }
  std::string damaged() const { return dir_.path() + "/damaged"; }
  void Restore() {
    fs::remove_all(damaged());
    fs::copy(sound(), damaged(), fs::copy_options::recursive);
  }
  std::vector<fs::path> Files() {
    std::vector<fs::path> out;
    for (const auto& e : fs::recursive_directory_iterator(damaged())) {
      if (e.is_regular_file()) out.push_back(e.path());
    }
    std::ranges::sort(out);
    return out;
  }
  // Opens what was damaged, reads everything, works on. Returns how many blocks were still there.
  size_t Survivors(const std::string& what) {
    MetricRegistry metrics;
    auto tier = MustCreate(SmallOptions(damaged(), metrics, kBlocks));
    EXPECT_EQ(tier->WaitOpened(absl::Seconds(20)), (TierHealth{TierState::kOn, ""})) << what;
    size_t hits = 0;
    for (uint64_t n = 0; n < kBlocks; ++n) {
      const absl::Status loaded = Load(*tier, n);
      EXPECT_FALSE(WrongBytes(loaded)) << what << ", block " << n;
      hits += loaded.ok();
    }
    EXPECT_TRUE(Store(*tier, 1000).ok()) << what;
    EXPECT_TRUE(Load(*tier, 1000).ok()) << what;
    return hits;
  }

  TempDir dir_;
};

TEST_F(DiskDamageTest, EightyFlippedBitsGiveNoWrongBytes) {
  Rng rng(2);
  size_t lost = 0;
  for (int i = 0; i < 80; ++i) {
    Restore();
    std::vector<fs::path> files = Files();
    std::erase_if(files, [](const fs::path& f) { return fs::file_size(f) == 0; });
    const fs::path& file = files[rng.Below(files.size())];
    const uint64_t offset = rng.Below(fs::file_size(file));
    FlipBit(file.string(), offset, static_cast<int>(rng.Below(8)));
    lost += kBlocks - Survivors(file.filename().string() + " at " + std::to_string(offset));
  }
  std::cout << lost << " of " << 80 * kBlocks << " blocks lost to 80 flipped bits\n";
  EXPECT_LT(lost, 80 * kBlocks / 2);
}

TEST_F(DiskDamageTest, EveryFlippedBitOfARecordIsNoticed) {
  // Each block once, anywhere in what is read of its record.
  Restore();
  const std::string blocks = damaged() + "/worker/blocks";
  const size_t header = RecordHeaderBytes(SmallLayout().block_tokens);
  Rng rng(3);
  for (uint64_t n = 0; n < kBlocks; ++n) {
    FlipBit(blocks, kDiskPageBytes + n * kDiskPageBytes + rng.Below(header + SmallLayout().block_bytes()),
            static_cast<int>(rng.Below(8)));
  }
  EXPECT_EQ(Survivors("every record"), 0u);
}

TEST_F(DiskDamageTest, TruncatedAndMissingFilesGiveNoWrongBytes) {
  Restore();
  const size_t files = Files().size();
  for (size_t i = 0; i < files; ++i) {
    for (const double keep : {0.5, 0.0, -1.0}) {
      Restore();
      const fs::path file = Files()[i];
      if (keep < 0) {
        fs::remove(file);
      } else {
        fs::resize_file(file, static_cast<uintmax_t>(static_cast<double>(fs::file_size(file)) * keep));
      }
      Survivors(file.filename().string() + (keep < 0 ? " removed" : " cut"));
    }
  }
}

TEST_F(DiskDamageTest, ExtentsOfAnotherTimeGiveNoWrongBytes) {
  // The index of before with the extents of later, and the other way round: what a backup tool may do.
  Restore();
  {
    MetricRegistry metrics;
    auto tier = MustOpen(SmallOptions(damaged(), metrics, kBlocks));
    for (uint64_t n = 100; n < 100 + kBlocks; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  }
  fs::remove_all(damaged() + "/worker/index");
  fs::copy(sound() + "/worker/index", damaged() + "/worker/index", fs::copy_options::recursive);
  EXPECT_EQ(Survivors("old index, new extents"), 0u);
  Restore();
  {
    MetricRegistry metrics;
    auto tier = MustOpen(SmallOptions(damaged(), metrics, kBlocks));
    for (uint64_t n = 100; n < 100 + kBlocks; ++n) ASSERT_TRUE(Store(*tier, n).ok());
  }
  fs::copy_file(sound() + "/worker/blocks", damaged() + "/worker/blocks",
                fs::copy_options::overwrite_existing);
  EXPECT_EQ(Survivors("new index, old extents"), 0u);
}

}  // namespace
}  // namespace tidepool
