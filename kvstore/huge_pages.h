#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>

#include "absl/time/time.h"
#include "base/probe.h"

namespace tidepool {

constexpr size_t kHugePageBytes = 2 << 20;

// Whether this kernel makes huge pages of shared memory when asked to (MADV_COLLAPSE, Linux 6.1). Tries it.
bool MakesHugePages();

// HugePagePlan: which 2 MiB of an arena are next put on a huge page. Core. An arena is used from its start;
// what lies next beyond the part in use comes first, so that a request finds its pages there and huge; what
// was used before its turn came follows later.
class HugePagePlan {
 public:
  struct Options {
    size_t ranges = 0;  // of kHugePageBytes
    // Committed beyond what is in use; at most this much memory is taken that nobody asked for.
    size_t ahead = 0;
    // What was used first is likely still being written to: a thread that touches it while it is moved waits.
    absl::Duration settle = absl::Seconds(1);
    // Something has its pages pinned (a transfer, a registration): tried again after retry, 2 retry, ...
    absl::Duration retry = absl::Seconds(1);
    uint32_t attempts = 6;  // for one range, and without memory in a row
  };
  enum class Outcome {
    kMade,
    kBusy,        // pages are pinned or locked just now
    kNoMemory,    // no huge page is free, or no room in the cgroup
    kImpossible,  // not here, and never
  };
  struct Step {
    std::optional<size_t> range;  // to try now
    absl::Time due;               // else: nothing before that, unless more comes into use
    bool finished = false;        // nothing ever again
  };

  explicit HugePagePlan(const Options& options) : options_(options) {}

  // The first `ranges` are in use from now on (and those that were before).
  void OnUsed(size_t ranges, absl::Time now);
  Step Next(absl::Time now);
  // What came of the range that Next gave.
  void OnTried(size_t range, Outcome outcome, absl::Time now);

 private:
  struct Later {
    size_t range;
    uint32_t attempts;  // so far
  };
  void Again(size_t range, uint32_t attempts, absl::Time due) { later_.emplace(due, Later{range, attempts}); }

  const Options options_;
  size_t used_ = 0;
  size_t ahead_ = 0;  // those before it were tried, or are in later_, or are trying_
  std::multimap<absl::Time, Later> later_;
  uint32_t trying_ = 0;  // attempts at the range that Next gave
  size_t made_ = 0;
  uint32_t without_memory_ = 0;  // tries in a row
  absl::Time not_before_ = absl::InfinitePast();
  bool stopped_ = false;
};

// HugePageProbe: metrics of the host tier's pages.
struct HugePageProbe {
  explicit HugePageProbe(MetricRegistry& metrics);

  Gauge& bytes;  // known to be on huge pages
  Counter& made;
  Counter& busy;
  Counter& no_memory;
  Counter& impossible;
};

// HugePageMaker: puts an arena on huge pages as it comes into use, where the kernel gives them only to those
// who ask for each. Driver: owns a thread, which ends when nothing is left to do. A range that is in use is
// moved by copying; who reads or writes there meanwhile (process_vm_readv too) waits and goes on with the new
// page: contents and addresses stay, and mappings in other processes get the huge page at their next touch. A
// range takes 1 to 8 ms, most of it where a virtual machine has not had the memory before. Thread-safe.
class HugePageMaker {
 public:
  // `memory`: shared, mapped at a multiple of kHugePageBytes; outlives this. A remainder stays as it is.
  HugePageMaker(std::span<std::byte> memory, MetricRegistry& metrics);
  // Waits for one range at most.
  ~HugePageMaker();
  HugePageMaker(const HugePageMaker&) = delete;
  HugePageMaker& operator=(const HugePageMaker&) = delete;

  // The first `bytes` of the memory are in use. A comparison, unless another range begins.
  void OnUsed(size_t bytes) {
    if (bytes > used_.load(std::memory_order_relaxed)) Use(bytes);
  }

 private:
  void Use(size_t bytes);
  void Loop();
  // On the thread; false: nothing is left to do. Holds mu.
  bool Turn(std::unique_lock<std::mutex>& lock);

  const std::span<std::byte> memory_;
  HugePageProbe probe_;
  std::atomic<size_t> used_{0};  // up to the end of a range

  std::mutex mu_;  // guards what follows
  HugePagePlan plan_;
  bool stop_ = false;
  std::condition_variable wake_;
  std::thread thread_;
};

}  // namespace tidepool
