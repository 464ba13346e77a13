#include "kvstore/disk/disk_io.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "base/log.h"
#include "base/status.h"

namespace tidepool {
namespace {

class UringDiskIo final : public DiskIo {
 public:
  static absl::StatusOr<std::unique_ptr<DiskIo>> Make(size_t depth) {
    auto io = std::unique_ptr<UringDiskIo>(new UringDiskIo());
    // One entry more than operations: the one that listens for Wake.
    const int rc = io_uring_queue_init(static_cast<unsigned>(depth + 1), &io->ring_, 0);
    if (rc < 0) return absl::UnavailableError(std::string("io_uring: ") + strerror(-rc));
    io->made_ = true;
    io->wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (io->wake_fd_ < 0) return absl::UnavailableError(std::string("eventfd: ") + strerror(errno));
    io->Listen();
    return io;
  }
  ~UringDiskIo() override {
    if (made_) io_uring_queue_exit(&ring_);
    if (wake_fd_ >= 0) close(wake_fd_);
  }

  void Attach(int fd) override { fd_ = fd; }

  void Submit(const Op& op) override {
    lengths_[op.tag] = op.buffer.size();
    io_uring_sqe* sqe = Sqe();
    const auto bytes = static_cast<unsigned>(op.buffer.size());
    if (op.write) {
      io_uring_prep_write(sqe, fd_, op.buffer.data(), bytes, op.offset);
    } else {
      io_uring_prep_read(sqe, fd_, op.buffer.data(), bytes, op.offset);
    }
    io_uring_sqe_set_data64(sqe, op.tag);
    Push();
  }

  void Wait(absl::Duration timeout, std::vector<Completion>& out) override {
    timespec deadline = absl::ToTimespec(std::max(timeout, absl::ZeroDuration()));
    __kernel_timespec ts{.tv_sec = deadline.tv_sec, .tv_nsec = deadline.tv_nsec};
    io_uring_cqe* cqe = nullptr;
    // A wait of no time would still give the processor away.
    if (timeout > absl::ZeroDuration() && io_uring_peek_cqe(&ring_, &cqe) != 0)
      io_uring_wait_cqe_timeout(&ring_, &cqe, &ts);
    while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
      const uint64_t tag = io_uring_cqe_get_data64(cqe);
      const int result = cqe->res;
      io_uring_cqe_seen(&ring_, cqe);
      if (tag == kNoTag) {
        uint64_t count = 0;
        (void)!read(wake_fd_, &count, sizeof count);
        Listen();
        continue;
      }
      const auto length = lengths_.extract(tag);
      if (length.empty()) continue;  // the library's own timeout
      Completion done{tag, 0};
      if (result < 0) {
        done.error = -result;
      } else if (static_cast<size_t>(result) != length.mapped()) {
        done.error = EIO;
      }
      out.push_back(done);
    }
  }

  void Wake() override {
    const uint64_t one = 1;
    (void)!write(wake_fd_, &one, sizeof one);
  }

  std::string Describe() const override { return "io_uring"; }

 private:
  io_uring_sqe* Sqe() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    while (sqe == nullptr) {  // entries that an earlier Push could not hand over
      Push();
      sqe = io_uring_get_sqe(&ring_);
    }
    return sqe;
  }
  void Push() {
    // A kernel that is out of memory for a moment (EAGAIN, EBUSY) keeps the entries; the next Push takes
    // them.
    io_uring_submit(&ring_);
  }
  void Listen() {
    io_uring_sqe* sqe = Sqe();
    io_uring_prep_poll_add(sqe, wake_fd_, POLLIN);
    io_uring_sqe_set_data64(sqe, kNoTag);
    Push();
  }

  io_uring ring_{};
  bool made_ = false;
  int wake_fd_ = -1;
  int fd_ = -1;
  std::unordered_map<uint64_t, size_t> lengths_;  // of operations under way
};

class ThreadDiskIo final : public DiskIo {
 public:
  ThreadDiskIo(size_t depth, size_t threads)
      : depth_(depth), count_(std::max<size_t>(1, threads)), shared_(std::make_shared<Shared>()) {
    shared_->running = count_;
    for (size_t i = 0; i < count_; ++i) std::thread([shared = shared_] { Run(*shared); }).detach();
  }
  // A disk that hangs must not hold up its user: a thread that does not come back within kPatience is left
  // behind with the state that it shares, and ends when its call does.
  ~ThreadDiskIo() override {
    std::unique_lock lock(shared_->mu);
    shared_->stop = true;
    shared_->ops.clear();
    shared_->work.notify_all();
    shared_->done_cv.wait_for(lock, kPatience, [&] { return shared_->running == 0; });
  }

  void Attach(int fd) override {
    std::lock_guard lock(shared_->mu);
    shared_->fd = fd;
  }
  void Submit(const Op& op) override {
    {
      std::lock_guard lock(shared_->mu);
      TP_CHECK(shared_->ops.size() < depth_);
      shared_->ops.push_back(op);
    }
    shared_->work.notify_one();
  }
  void Wait(absl::Duration timeout, std::vector<Completion>& out) override {
    Shared& s = *shared_;
    std::unique_lock lock(s.mu);
    if (timeout > absl::ZeroDuration()) {
      s.done_cv.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                         [&] { return s.woken || !s.done.empty(); });
    }
    s.woken = false;
    out.insert(out.end(), s.done.begin(), s.done.end());
    s.done.clear();
  }
  void Wake() override {
    {
      std::lock_guard lock(shared_->mu);
      shared_->woken = true;
    }
    shared_->done_cv.notify_one();
  }
  std::string Describe() const override { return std::to_string(count_) + " threads"; }

 private:
  static constexpr std::chrono::seconds kPatience{2};

  struct Shared {
    std::mutex mu;  // guards everything below, but for `stop`
    std::condition_variable work, done_cv;
    std::deque<Op> ops;
    std::vector<Completion> done;
    int fd = -1;
    bool woken = false;
    size_t running = 0;
    std::atomic<bool> stop{false};
  };

  static int Transfer(const Shared& shared, int fd, const Op& op) {
    for (size_t at = 0; at < op.buffer.size();) {
      if (shared.stop) return ECANCELED;  // the file may be another's soon
      const auto offset = static_cast<off_t>(op.offset + at);
      const ssize_t n = op.write ? pwrite(fd, op.buffer.data() + at, op.buffer.size() - at, offset)
                                 : pread(fd, op.buffer.data() + at, op.buffer.size() - at, offset);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return errno;
      if (n == 0) return EIO;
      at += static_cast<size_t>(n);
    }
    return 0;
  }
  static void Run(Shared& s) {
    std::unique_lock lock(s.mu);
    while (true) {
      s.work.wait(lock, [&] { return s.stop || !s.ops.empty(); });
      if (s.stop) break;
      const Op op = s.ops.front();
      s.ops.pop_front();
      const int fd = s.fd;
      lock.unlock();
      const int error = Transfer(s, fd, op);
      lock.lock();
      s.done.push_back({op.tag, error});
      s.done_cv.notify_one();
    }
    --s.running;
    s.done_cv.notify_all();
  }

  const size_t depth_, count_;
  const std::shared_ptr<Shared> shared_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<DiskIo>> MakeUringDiskIo(size_t depth) { return UringDiskIo::Make(depth); }

std::unique_ptr<DiskIo> MakeThreadDiskIo(size_t depth, size_t threads) {
  return std::make_unique<ThreadDiskIo>(depth, threads);
}

absl::StatusOr<std::unique_ptr<DiskIo>> MakeDiskIo(size_t depth) {
  auto ring = MakeUringDiskIo(depth);
  if (ring.ok()) return ring;
  // Enough to keep a disk busy; a thread's stack is touched as far as it is used.
  constexpr size_t kThreadsMax = 8;
  spdlog::info("disk tier: {}; using threads", std::string(ring.status().message()));
  return MakeThreadDiskIo(depth, std::min(depth, kThreadsMax));
}

}  // namespace tidepool
