#include "server/engine/mask_worker.h"

#include <utility>

namespace tidepool {

ConstraintRun::ConstraintRun(std::unique_ptr<TokenConstraint> constraint, std::vector<int32_t> stop_tokens,
                             uint32_t vocab)
    : constraint_(std::move(constraint)),
      stop_tokens_(std::move(stop_tokens)),
      mask_((size_t{vocab} + 31) / 32) {}

void ConstraintRun::ComputeMask() {
  status_ = constraint_->FillMask(mask_);
  if (!status_.ok() || !constraint_->CanEnd()) return;
  for (int32_t id : stop_tokens_) {
    mask_[static_cast<size_t>(id) / 32] |= uint32_t{1} << (static_cast<uint32_t>(id) % 32);
  }
}

MaskWorker::MaskWorker(size_t queue_max, Histogram& seconds, std::function<void()> on_ready)
    : queue_max_(queue_max), seconds_(seconds), on_ready_(std::move(on_ready)), thread_([this] { Loop(); }) {}

MaskWorker::~MaskWorker() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

bool MaskWorker::Submit(std::shared_ptr<ConstraintRun> run) {
  {
    std::lock_guard lock(mu_);
    if (queue_.size() + slow_queue_.size() >= queue_max_) {
      // Those whose sequences have ended make room.
      for (Queue* queue : {&queue_, &slow_queue_}) {
        std::erase_if(*queue, [](const auto& waiting) { return waiting.use_count() == 1; });
      }
      if (queue_.size() + slow_queue_.size() >= queue_max_) return false;
    }
    run->pending_ = true;
    Queue& queue = run->slow_ ? slow_queue_ : queue_;
    queue.push_back(std::move(run));
  }
  wake_.notify_one();
  return true;
}

bool MaskWorker::Ready(const ConstraintRun& run) const {
  std::lock_guard lock(mu_);
  return !run.pending_;
}

bool MaskWorker::WaitReady(const ConstraintRun& run, std::chrono::steady_clock::time_point deadline) const {
  std::unique_lock lock(mu_);
  return done_.wait_until(lock, deadline, [&] { return !run.pending_; });
}

std::chrono::nanoseconds MaskWorker::Computing(const ConstraintRun& run) const {
  std::lock_guard lock(mu_);
  if (run.taken_up_ == std::chrono::steady_clock::time_point{}) return {};
  return std::chrono::steady_clock::now() - run.taken_up_;
}

std::shared_ptr<ConstraintRun> MaskWorker::Take() {
  const bool slow = queue_.empty() || (!slow_queue_.empty() && ++turns_ >= kSlowEvery);
  if (slow) turns_ = 0;
  Queue& queue = slow ? slow_queue_ : queue_;
  std::shared_ptr<ConstraintRun> run = std::move(queue.front());
  queue.pop_front();
  return run;
}

void MaskWorker::Loop() {
  std::unique_lock lock(mu_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || !queue_.empty() || !slow_queue_.empty(); });
    if (stop_) return;
    const std::shared_ptr<ConstraintRun> run = Take();
    const auto begin = std::chrono::steady_clock::now();
    run->taken_up_ = begin;
    lock.unlock();
    std::chrono::nanoseconds took{};
    // Nobody reads it any more: its sequence has ended.
    const bool wanted = run.use_count() > 1;
    if (wanted) {
      run->ComputeMask();
      took = std::chrono::steady_clock::now() - begin;
      seconds_.Observe(std::chrono::duration<double>(took).count());
    }
    lock.lock();
    run->slow_ = took > kSlow;
    run->taken_up_ = {};
    run->pending_ = false;
    done_.notify_all();
    lock.unlock();
    on_ready_();
    lock.lock();
  }
}

}  // namespace tidepool
