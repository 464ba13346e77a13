#include "kvstore/huge_pages.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/shared_memory.h"
#include "kvstore/block_pool.h"

namespace tidepool {
namespace {

using Outcome = HugePagePlan::Outcome;

const absl::Time kStart = absl::UnixEpoch();

// What the plan has tried now, in order, each with that outcome.
std::vector<size_t> TryAll(HugePagePlan& plan, Outcome outcome, absl::Time now) {
  std::vector<size_t> out;
  while (const auto range = plan.Next(now).range) {
    out.push_back(*range);
    plan.OnTried(*range, outcome, now);
  }
  return out;
}

TEST(HugePagePlan, StaysAheadOfWhatIsInUse) {
  HugePagePlan plan({.ranges = 10, .ahead = 3});
  EXPECT_THAT(TryAll(plan, Outcome::kMade, kStart), testing::ElementsAre(0, 1, 2));
  plan.OnUsed(2, kStart);
  EXPECT_THAT(TryAll(plan, Outcome::kMade, kStart), testing::ElementsAre(3, 4));
  EXPECT_FALSE(plan.Next(kStart).finished);
  plan.OnUsed(100, kStart);
  plan.OnUsed(1, kStart);
  EXPECT_THAT(TryAll(plan, Outcome::kMade, kStart), testing::IsEmpty()) << "in use before their turn came";
  EXPECT_THAT(TryAll(plan, Outcome::kMade, kStart + absl::Seconds(1)), testing::ElementsAre(5, 6, 7, 8, 9));
  EXPECT_TRUE(plan.Next(kStart).finished);
}

TEST(HugePagePlan, WhatWasUsedBeforeItsTurnComesAfterWhatLiesAhead) {
  HugePagePlan plan({.ranges = 10, .ahead = 2, .settle = absl::Seconds(3)});
  plan.OnUsed(4, kStart);
  EXPECT_THAT(TryAll(plan, Outcome::kMade, kStart), testing::ElementsAre(4, 5));
  EXPECT_EQ(plan.Next(kStart).due, kStart + absl::Seconds(3));
  EXPECT_THAT(TryAll(plan, Outcome::kMade, kStart + absl::Seconds(3)), testing::ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(plan.Next(kStart).due, absl::InfiniteFuture());
}

TEST(HugePagePlan, PinnedRangesAreTriedAgainEverLessOftenAndThenLeft) {
  HugePagePlan plan({.ranges = 1, .ahead = 1, .attempts = 4});
  absl::Time now = kStart;
  std::vector<int64_t> waited;
  for (;;) {
    const auto step = plan.Next(now);
    if (step.finished) break;
    if (step.range) {
      plan.OnTried(*step.range, Outcome::kBusy, now);
    } else {
      waited.push_back(absl::ToInt64Seconds(step.due - now));
      now = step.due;
    }
  }
  EXPECT_THAT(waited, testing::ElementsAre(1, 2, 4));
}

TEST(HugePagePlan, WithoutMemoryAllWaitsAndInTheEndNothingIsTried) {
  HugePagePlan plan({.ranges = 10, .ahead = 10, .attempts = 3});
  EXPECT_THAT(TryAll(plan, Outcome::kNoMemory, kStart), testing::ElementsAre(0));
  EXPECT_EQ(plan.Next(kStart).due, kStart + absl::Seconds(1));
  absl::Time now = kStart + absl::Seconds(1);
  plan.OnTried(*plan.Next(now).range, Outcome::kMade, now);  // there is some again: counted from the start
  for (int k = 0; k < 3; ++k) {
    const auto step = plan.Next(now);
    ASSERT_TRUE(step.range);
    plan.OnTried(*step.range, Outcome::kNoMemory, now);
    now += absl::Hours(1);
  }
  EXPECT_TRUE(plan.Next(now).finished);
}

TEST(HugePagePlan, ARangeThatHadNoMemoryGetsItsTurn) {
  HugePagePlan plan({.ranges = 3, .ahead = 3});
  EXPECT_THAT(TryAll(plan, Outcome::kNoMemory, kStart), testing::ElementsAre(0));
  EXPECT_THAT(TryAll(plan, Outcome::kMade, kStart + absl::Seconds(1)),
              testing::UnorderedElementsAre(0, 1, 2));
}

TEST(HugePagePlan, AKernelThatCannotIsAskedOnce) {
  HugePagePlan plan({.ranges = 10, .ahead = 10});
  EXPECT_THAT(TryAll(plan, Outcome::kImpossible, kStart), testing::ElementsAre(0));
  EXPECT_TRUE(plan.Next(kStart).finished);
  HugePagePlan other({.ranges = 3, .ahead = 3});
  other.OnTried(*other.Next(kStart).range, Outcome::kMade, kStart);
  EXPECT_THAT(TryAll(other, Outcome::kImpossible, kStart), testing::ElementsAre(1, 2))
      << "one that succeeded shows that the kernel can";
}

// --- with this kernel ---

// Bytes of the mapping at `at` that its page table has as huge pages.
uint64_t MappedHuge(const std::byte* at) {
  std::ifstream smaps("/proc/self/smaps");
  const std::string start = absl::StrCat(absl::Hex(reinterpret_cast<uintptr_t>(at)), "-");
  bool inside = false;
  uint64_t bytes = 0;
  for (std::string line; std::getline(smaps, line);) {
    if (absl::StartsWith(line, start)) inside = true;
    if (inside && (absl::StartsWith(line, "ShmemPmdMapped:") || absl::StartsWith(line, "FilePmdMapped:"))) {
      const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
      uint64_t kib = 0;
      if (words.size() > 1 && absl::SimpleAtoi(words[1], &kib)) bytes += kib << 10;
    }
    if (inside && absl::StartsWith(line, "VmFlags:")) break;
  }
  return bytes;
}

class HugePageMakerTest : public testing::Test {
 protected:
  static constexpr size_t kRanges = 4;
  static constexpr size_t kBytes = kRanges * kHugePageBytes;

  void SetUp() override {
    if (!MakesHugePages()) GTEST_SKIP() << "this kernel makes no huge pages on demand";
    auto made = SharedMemory::Create("test", kBytes, /*peer_writes=*/false);
    ASSERT_TRUE(made.ok()) << made.status();
    memory_.emplace(std::move(made->first));
    fd_.emplace(std::move(made->second));
  }
  std::span<std::byte> memory() const { return {memory_->data(), memory_->size()}; }
  double Value(const char* name) { return metrics_.AddGauge(name, "", {{"tier", "host"}}).value(); }
  uint64_t Tries(const char* result) {
    return metrics_.AddCounter("tidepool_pool_huge_pages_total", "", {{"tier", "host"}, {"result", result}})
        .value();
  }
  static bool Eventually(const std::function<bool()>& holds) {
    for (int k = 0; k < 20000; ++k) {
      if (holds()) return true;
      usleep(1000);
    }
    return holds();
  }
  bool AllHuge() {
    return Eventually([&] { return Value("tidepool_pool_huge_page_bytes") == kBytes; });
  }

  MetricRegistry metrics_;
  std::optional<SharedMemory> memory_;
  std::optional<FileDescriptor> fd_;
};

TEST_F(HugePageMakerTest, MemoryIsHugeBeforeItIsUsedAndReadersNeedDoNothing) {
  auto reader = SharedMemory::Open(fd_->get(), kBytes, /*writable=*/false);
  ASSERT_TRUE(reader.ok()) << reader.status();
  // Its page table knows the small pages of this one already.
  memory()[kHugePageBytes] = std::byte(7);
  ASSERT_EQ(reader->data()[kHugePageBytes], std::byte(7));
  HugePageMaker maker(memory(), metrics_);
  ASSERT_TRUE(AllHuge()) << Tries("busy") << " busy, " << Tries("no-memory") << " without memory";
  EXPECT_EQ(MappedHuge(memory().data()), kBytes);
  EXPECT_EQ(reader->data()[kHugePageBytes], std::byte(7));
  for (size_t at = 0; at < kBytes; at += kHugePageBytes)
    EXPECT_EQ(reader->data()[at + 4096], std::byte(0)) << "what nobody wrote is zero";
  EXPECT_EQ(MappedHuge(reader->data()), kBytes);
}

TEST_F(HugePageMakerTest, WritersAndReadersGoOnWhileTheirMemoryMoves) {
  auto reader = SharedMemory::Open(fd_->get(), kBytes, /*writable=*/false);
  ASSERT_TRUE(reader.ok()) << reader.status();
  std::memset(memory().data(), 0, kBytes);
  constexpr size_t kStep = 4096 + 64;
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> rounds{0};
  const auto word = [&](std::byte* base, size_t at) {
    return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(base + at / 8 * 8));
  };
  std::thread writer([&] {
    for (uint64_t round = 1; !stop.load(); ++round) {
      for (size_t at = 0; at < kBytes; at += kStep) word(memory().data(), at).store(round);
      rounds.store(round);
    }
  });
  std::thread other([&] {
    std::vector<std::byte> got(64 << 10);
    while (!stop.load()) {
      for (size_t at = 0; at + got.size() <= kBytes; at += got.size()) {
        const uint64_t least = rounds.load();
        // As a peer reads it with cma.
        iovec to{got.data(), got.size()}, from{reader->data() + at, got.size()};
        ASSERT_EQ(process_vm_readv(getpid(), &to, 1, &from, 1, 0), static_cast<ssize_t>(got.size()));
        const size_t first = (at + kStep - 1) / kStep * kStep;
        if (first / 8 * 8 + 8 > at + got.size()) continue;
        uint64_t value;
        std::memcpy(&value, got.data() + (first / 8 * 8 - at), sizeof value);
        ASSERT_GE(value, least) << "a write was lost at " << first;
      }
    }
  });
  {
    HugePageMaker maker(memory(), metrics_);
    EXPECT_TRUE(Eventually([&] { return Tries("made") > 0; })) << Tries("busy") << " busy";
  }
  EXPECT_TRUE(Eventually([&, now = rounds.load()] { return rounds.load() > now + 2; }));
  stop = true;
  writer.join();
  other.join();
  for (size_t at = 0; at < kBytes; at += kStep) ASSERT_GE(word(memory().data(), at).load(), rounds.load());
}

TEST_F(HugePageMakerTest, APinnedPageIsWaitedFor) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  memory()[0] = std::byte(1);
  iovec page{memory().data(), 4096};
  ASSERT_EQ(vmsplice(ends[1], &page, 1, 0), 4096);
  HugePageMaker maker(memory(), metrics_);
  EXPECT_TRUE(Eventually([&] { return Tries("busy") > 0; }));
  EXPECT_TRUE(Eventually([&] { return Tries("made") == kRanges - 1; }));
  EXPECT_EQ(Tries("impossible") + Tries("no-memory"), 0u);
  std::vector<std::byte> got(4096);
  EXPECT_EQ(read(ends[0], got.data(), got.size()), 4096);
  EXPECT_EQ(got[0], std::byte(1));
  EXPECT_TRUE(AllHuge());
  close(ends[0]);
  close(ends[1]);
}

TEST_F(HugePageMakerTest, EndsWithoutFinishing) {
  for (int k = 0; k < 20; ++k) {
    auto large = SharedMemory::Create("test", size_t{1} << 30, /*peer_writes=*/false);
    ASSERT_TRUE(large.ok()) << large.status();
    HugePageMaker maker({large->first.data(), large->first.size()}, metrics_);
    maker.OnUsed(size_t{1} << 29);
  }
  EXPECT_LT(Tries("made"), 20u * 32) << "it does not go on when it is to end";
}

TEST_F(HugePageMakerTest, ThePoolsMemoryIsPutOnHugePages) {
  auto pool = BlockPool::Create({.layout = {.layers = 8, .kv_heads = 8, .head_dim = 64, .block_tokens = 32},
                                 .slots = 16,
                                 .metrics = &metrics_});
  ASSERT_TRUE(pool.ok()) << pool.status();
  auto slots = (*pool)->Reserve(16);
  ASSERT_TRUE(slots.ok());
  for (BlockLease& slot : *slots) std::memset(slot.data().data(), 3, slot.data().size());
  ASSERT_EQ((*pool)->arena().bytes(), kBytes);
  EXPECT_TRUE(AllHuge());
  for (BlockLease& slot : *slots) EXPECT_EQ(slot.data().back(), std::byte(3));
}

}  // namespace
}  // namespace tidepool
