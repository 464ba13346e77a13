#include "kernels/thread_pool.h"

#include <immintrin.h>
#include <omp.h>

#include <algorithm>

#include "base/status.h"

namespace tidepool {
namespace {

constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kInsideMask = kOpen - 1;
// About 20 us of pauses on current server cores: longer than the gap between two ops of a decode step,
// shorter than what a sleep and a wake-up cost.
constexpr int kSpins = 1000;

uint32_t EpochOf(uint64_t state) { return static_cast<uint32_t>(state >> 32); }

// The pool and worker index that this thread is working for now: nested calls run inline.
thread_local const ThreadPool* current_pool = nullptr;
thread_local int current_worker = 0;

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int w = 1; w < threads; ++w) {
    workers_.emplace_back([this, w] { WorkerLoop(w); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  {
    std::lock_guard lock(sleep_mu_);
    work_cv_.notify_all();
  }
  for (std::thread& t : workers_) t.join();
}

void ThreadPool::ParallelFor(int64_t n, int64_t grain, absl::FunctionRef<void(int64_t, int64_t, int)> fn) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (current_pool == this) {
    fn(0, n, current_worker);
    return;
  }
  std::lock_guard turn(caller_mu_);
  // A nested call on another pool restores these at its end.
  const ThreadPool* outer_pool = current_pool;
  const int outer_worker = current_worker;
  current_pool = this;
  current_worker = 0;
  // OpenMP's setting is per thread: whoever calls must not fan out from inside fn.
  const int omp_threads = omp_get_max_threads();
  if (omp_threads != 1) omp_set_num_threads(1);

  const int64_t chunks = (n + grain - 1) / grain;
  if (workers_.empty() || chunks == 1) {
    fn(0, n, 0);
  } else {
    job_ = {&fn, n, grain};
    next_.store(0, std::memory_order_relaxed);
    const uint64_t epoch = EpochOf(state_.load(std::memory_order_relaxed)) + uint64_t{1};
    state_.store((epoch << 32) | kOpen);  // seq_cst: ordered before the look at sleepers_
    if (sleepers_.load() > 0) {
      std::lock_guard lock(sleep_mu_);
      if (chunks > 2) {
        work_cv_.notify_all();
      } else {
        work_cv_.notify_one();
      }
    }
    RunChunks(0);
    // Closed: a worker that has not joined yet never will, so a slow wake-up costs the caller nothing.
    uint64_t state = state_.fetch_and(~kOpen) & ~kOpen;
    for (int spin = 0; (state & kInsideMask) != 0; ++spin) {
      if (spin < kSpins) {
        _mm_pause();
      } else {
        // Bounded by what the workers inside still have to compute.
        std::unique_lock lock(sleep_mu_);
        caller_asleep_.store(true);
        done_cv_.wait(lock, [&] { return (state_.load() & kInsideMask) == 0; });
        caller_asleep_.store(false);
      }
      state = state_.load();
    }
  }
  if (omp_threads != 1) omp_set_num_threads(omp_threads);
  current_pool = outer_pool;
  current_worker = outer_worker;
}

void ThreadPool::RunChunks(int worker) {
  const Job job = job_;
  for (;;) {
    const int64_t begin = next_.fetch_add(job.grain, std::memory_order_relaxed);
    if (begin >= job.n) return;
    (*job.fn)(begin, std::min(begin + job.grain, job.n), worker);
  }
}

bool ThreadPool::TryJoin(uint32_t& seen) {
  uint64_t state = state_.load();
  while ((state & kOpen) != 0 && EpochOf(state) != seen) {
    if (state_.compare_exchange_weak(state, state + 1)) {
      seen = EpochOf(state);
      return true;
    }
  }
  return false;
}

void ThreadPool::WorkerLoop(int worker) {
  omp_set_num_threads(1);
  current_pool = this;
  current_worker = worker;
  uint32_t seen = 0;
  while (!stopping_.load(std::memory_order_relaxed)) {
    bool joined = false;
    for (int spin = 0; spin < kSpins && !joined; ++spin) {
      joined = TryJoin(seen);
      if (!joined) _mm_pause();
    }
    if (!joined) {
      std::unique_lock lock(sleep_mu_);
      sleepers_.fetch_add(1);  // before the last look at state_, as the caller looks in the other order
      work_cv_.wait(lock, [&] { return stopping_.load() || (joined = TryJoin(seen)); });
      sleepers_.fetch_sub(1);
      if (!joined) return;
    }
    RunChunks(worker);
    const uint64_t left = state_.fetch_sub(1) - 1;
    if ((left & kInsideMask) == 0 && (left & kOpen) == 0 && caller_asleep_.load()) {
      std::lock_guard lock(sleep_mu_);
      done_cv_.notify_one();
    }
  }
}

}  // namespace tidepool
