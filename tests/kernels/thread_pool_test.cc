#include "kernels/thread_pool.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <atomic>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

namespace tidepool {
namespace {

TEST(ThreadPool, CoversEveryIndexOnceWithAlignedRanges) {
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const int64_t n : {0, 1, 2, 7, 64, 1001}) {
      for (const int64_t grain : {0, 1, 3, 64, 5000}) {
        std::vector<std::atomic<int>> hits(static_cast<size_t>(n));
        pool.ParallelFor(n, grain, [&](int64_t begin, int64_t end, int worker) {
          EXPECT_GE(worker, 0);
          EXPECT_LT(worker, threads);
          EXPECT_EQ(begin % std::max<int64_t>(grain, 1), 0);
          for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
        });
        for (const auto& h : hits) ASSERT_EQ(h.load(), 1) << "n " << n << " grain " << grain;
      }
    }
  }
}

TEST(ThreadPool, ManyShortJobsLoseNothing) {
  ThreadPool pool(3);
  int64_t total = 0;
  for (int job = 0; job < 20000; ++job) {
    std::atomic<int64_t> sum{0};
    pool.ParallelFor(5, 1, [&](int64_t begin, int64_t end, int) { sum += end - begin; });
    total += sum.load();
  }
  EXPECT_EQ(total, 5 * 20000);
}

TEST(ThreadPool, WorkersTakePart) {
  ThreadPool pool(2);
  std::atomic<int> inside{0};
  // Each index waits for the other: this ends only if two threads are inside at once.
  pool.ParallelFor(2, 1, [&](int64_t, int64_t, int) {
    ++inside;
    while (inside.load() < 2) std::this_thread::yield();
  });
  EXPECT_EQ(inside.load(), 2);
}

TEST(ThreadPool, NestedCallRunsInline) {
  ThreadPool pool(3);
  std::atomic<int> sum{0};
  pool.ParallelFor(8, 1, [&](int64_t, int64_t, int worker) {
    pool.ParallelFor(10, 2, [&](int64_t begin, int64_t end, int inner) {
      EXPECT_EQ(inner, worker);
      sum += static_cast<int>(end - begin);
    });
  });
  EXPECT_EQ(sum.load(), 80);
}

TEST(ThreadPool, CallersOnSeveralThreadsTakeTurns) {
  ThreadPool pool(2);
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        pool.ParallelFor(7, 2, [&](int64_t begin, int64_t end, int) { sum += end - begin; });
      }
    });
  }
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(sum.load(), 3 * 500 * 7);
}

TEST(ThreadPool, OpenMpStaysAtOneThreadInsideAndIsRestoredOutside) {
  omp_set_num_threads(2);
  ThreadPool pool(2);
  std::atomic<int> inside{0};
  pool.ParallelFor(2, 1, [&](int64_t, int64_t, int) {
    ++inside;
    while (inside.load() < 2) std::this_thread::yield();
    EXPECT_EQ(omp_get_max_threads(), 1);
  });
  EXPECT_EQ(omp_get_max_threads(), 2);
}

}  // namespace
}  // namespace tidepool
