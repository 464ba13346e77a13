#include "kvstore/huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>

#include "base/clock.h"
#include "base/log.h"
#include "base/shared_memory.h"
#include "base/status.h"

// Newer than Debian 12's headers.
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace tidepool {
namespace {

using Outcome = HugePagePlan::Outcome;

constexpr size_t kPage = 4096;
constexpr size_t kPagesOfHuge = kHugePageBytes / kPage;
// What is made ahead of use: an eighth of the arena, and not less than this, as a request may come with a
// few hundred MiB at once.
constexpr size_t kAheadBytesMin = size_t{64} << 20;
// Rests so many times as long as it worked: a quarter of one core while an arena fills.
constexpr int kRest = 3;

HugePagePlan::Options PlanOf(size_t bytes) {
  const size_t ahead = std::max(kAheadBytesMin, bytes / 8);
  return {.ranges = bytes / kHugePageBytes, .ahead = ahead / kHugePageBytes};
}

Outcome OutcomeOf(int error) {
  switch (error) {
    case 0:
      return Outcome::kMade;
    case EAGAIN:
      return Outcome::kBusy;
    case ENOMEM:  // no huge page is free
    case EBUSY:   // the cgroup's limit
      return Outcome::kNoMemory;
    default:
      return Outcome::kImpossible;
  }
}

// One range; errno is set unless kMade.
Outcome MakeHuge(std::byte* range, size_t number) {
  // A range of which nothing is there cannot be collapsed, and the node of what is there is taken for all of
  // it, so the NUMA policy decides by one page. Interleaving goes by the page's number: not always the same.
  if (madvise(range + number % kPagesOfHuge * kPage, kPage, MADV_POPULATE_READ) != 0) {
    return errno == EINVAL ? Outcome::kImpossible : Outcome::kNoMemory;
  }
  return OutcomeOf(madvise(range, kHugePageBytes, MADV_COLLAPSE) == 0 ? 0 : errno);
}

Counter& Tries(MetricRegistry& m, const char* result) {
  return m.AddCounter("tidepool_pool_huge_pages_total",
                      "Times that 2 MiB of the host tier were to be put on a huge page, by outcome.",
                      {{"tier", "host"}, {"result", result}});
}

void Count(HugePageProbe& probe, Outcome outcome) {
  switch (outcome) {
    case Outcome::kMade:
      probe.made.Add();
      return probe.bytes.Add(kHugePageBytes);
    case Outcome::kBusy:
      return probe.busy.Add();
    case Outcome::kNoMemory:
      return probe.no_memory.Add();
    case Outcome::kImpossible:
      return probe.impossible.Add();
  }
}

}  // namespace

bool MakesHugePages() {
  auto memory = SharedMemory::Create("tidepool-probe", kHugePageBytes, /*peer_writes=*/false);
  return memory.ok() && MakeHuge(memory->first.data(), 0) == Outcome::kMade;
}

// --- HugePagePlan ---

void HugePagePlan::OnUsed(size_t ranges, absl::Time now) {
  used_ = std::max(used_, std::min(ranges, options_.ranges));
  for (; ahead_ < used_; ++ahead_) Again(ahead_, 0, now + options_.settle);
}

HugePagePlan::Step HugePagePlan::Next(absl::Time now) {
  if (stopped_) return {.range = std::nullopt, .due = absl::InfiniteFuture(), .finished = true};
  if (now < not_before_) return {.range = std::nullopt, .due = not_before_};
  if (ahead_ < std::min(used_ + options_.ahead, options_.ranges)) {
    trying_ = 0;
    return {.range = ahead_++, .due = now};
  }
  if (later_.empty()) {
    return {.range = std::nullopt, .due = absl::InfiniteFuture(), .finished = ahead_ == options_.ranges};
  }
  const auto first = later_.begin();
  if (first->first > now) return {.range = std::nullopt, .due = first->first};
  const Later next = first->second;
  later_.erase(first);
  trying_ = next.attempts;
  return {.range = next.range, .due = now};
}

void HugePagePlan::OnTried(size_t range, Outcome outcome, absl::Time now) {
  if (outcome != Outcome::kNoMemory) without_memory_ = 0;
  switch (outcome) {
    case Outcome::kMade:
      ++made_;
      return;
    case Outcome::kBusy:
      if (trying_ + 1 < options_.attempts)
        Again(range, trying_ + 1, now + options_.retry * (1 << std::min(trying_, 20u)));
      return;
    case Outcome::kNoMemory:
      // Memory is in pieces, or used up: each further try makes the kernel search it all.
      if (++without_memory_ == options_.attempts) stopped_ = true;
      not_before_ = now + options_.retry * (1 << std::min(without_memory_ - 1, 20u));
      Again(range, trying_, not_before_);
      return;
    case Outcome::kImpossible:
      // One that succeeded proves that the kernel can; this range is left as it is then.
      if (made_ == 0) stopped_ = true;
      return;
  }
}

// --- HugePageMaker ---

HugePageProbe::HugePageProbe(MetricRegistry& m)
    : bytes(m.AddGauge("tidepool_pool_huge_page_bytes",
                       "Bytes of the host tier that are known to lie on huge pages.", {{"tier", "host"}})),
      made(Tries(m, "made")),
      busy(Tries(m, "busy")),
      no_memory(Tries(m, "no-memory")),
      impossible(Tries(m, "impossible")) {}

HugePageMaker::HugePageMaker(std::span<std::byte> memory, MetricRegistry& metrics)
    : memory_(memory), probe_(metrics), plan_(PlanOf(memory.size())) {
  TP_CHECK(reinterpret_cast<uintptr_t>(memory.data()) % kHugePageBytes == 0);
  thread_ = std::thread([this] { Loop(); });
}

HugePageMaker::~HugePageMaker() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void HugePageMaker::Use(size_t bytes) {
  const size_t all = memory_.size() / kHugePageBytes;
  const size_t ranges = std::min((bytes + kHugePageBytes - 1) / kHugePageBytes, all);
  {
    std::lock_guard lock(mu_);
    // The remainder begins no range.
    const size_t up_to = ranges == all ? SIZE_MAX : ranges * kHugePageBytes;
    if (up_to <= used_.load(std::memory_order_relaxed)) return;
    used_.store(up_to, std::memory_order_relaxed);
    plan_.OnUsed(ranges, Clock::Real().Now());
  }
  wake_.notify_all();
}

bool HugePageMaker::Turn(std::unique_lock<std::mutex>& lock) {
  const Clock& clock = Clock::Real();
  const absl::Time start = clock.Now();
  const HugePagePlan::Step step = plan_.Next(start);
  if (step.finished) return false;
  if (!step.range) {
    if (step.due == absl::InfiniteFuture()) {
      wake_.wait(lock);
    } else {
      wake_.wait_for(lock, absl::ToChronoNanoseconds(step.due - start));
    }
    return true;
  }
  lock.unlock();
  const Outcome outcome = MakeHuge(memory_.data() + *step.range * kHugePageBytes, *step.range);
  Count(probe_, outcome);
  const absl::Time end = clock.Now();
  lock.lock();
  plan_.OnTried(*step.range, outcome, end);
  wake_.wait_for(lock, absl::ToChronoNanoseconds(kRest * (end - start)), [&] { return stop_; });
  return true;
}

void HugePageMaker::Loop() {
  std::unique_lock lock(mu_);
  while (!stop_) {
    if (!Turn(lock)) break;
  }
  spdlog::debug("host tier: {} bytes on huge pages", probe_.bytes.value());
}

}  // namespace tidepool
