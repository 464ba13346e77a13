#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace tidepool {

// ThreadPool: the compute threads of one engine (Handle: owns them; not copyable, not movable).
// `threads` counts the calling thread, so ThreadPool(1) starts none and runs everything inline. Workers
// spin for some tens of microseconds after a job (the gap between two ops of a step) and then sleep.
// OpenMP inside any participating thread is held at one thread, so that libraries built on it (oneDNN)
// never start threads of their own: this pool is the only source of parallelism.
class ThreadPool {
 public:
  // threads >= 1 (clamped); more than the machine's cores only costs time.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs fn(begin, end, worker) over disjoint ranges that cover [0, n), and returns when all have run.
  // Every begin is a multiple of `grain` (>= 1, clamped); an end is one too, or n. worker is in
  // [0, threads()), held by one thread at a time: an index for per-worker scratch. n <= 0 is a no-op.
  // Thread-safe: callers on several threads take turns. A call from inside fn runs inline on that thread,
  // with the worker index of that thread. fn must not throw.
  void ParallelFor(int64_t n, int64_t grain, absl::FunctionRef<void(int64_t, int64_t, int)> fn);

 private:
  struct Job {
    const absl::FunctionRef<void(int64_t, int64_t, int)>* fn = nullptr;
    int64_t n = 0;
    int64_t grain = 1;
  };

  void WorkerLoop(int worker);
  void RunChunks(int worker);
  // Joins the open job unless it is the one with epoch `seen`; updates `seen`.
  bool TryJoin(uint32_t& seen);

  std::mutex caller_mu_;  // held for the length of one ParallelFor

  Job job_;                         // written while the job is closed and nobody is in it
  std::atomic<int64_t> next_{0};    // first index that no thread has taken
  std::atomic<uint64_t> state_{0};  // epoch << 32 | open bit | number of workers inside the job
  std::atomic<bool> stopping_{false};

  std::mutex sleep_mu_;
  std::condition_variable work_cv_;
  std::condition_variable done_cv_;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_asleep_{false};

  std::vector<std::thread> workers_;
};

}  // namespace tidepool
