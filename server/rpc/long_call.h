#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace tidepool {

// LongCalls: the threads on which long operations of a gRPC service run, each of which tells how it goes on
// as a stream. Driver: owns `threads` threads and a queue of at most `max_waiting` operations; beyond it a
// call fails with RESOURCE_EXHAUSTED. Thread-safe. The destructor cancels what runs and waits for it: to be
// called before what the operations use goes, and after the server was shut down.
class LongCalls {
 public:
  explicit LongCalls(size_t threads, size_t max_waiting) : max_waiting_(max_waiting) {
    for (size_t i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
  }
  ~LongCalls() { Stop(); }

  // Cancels everything; later calls are refused with UNAVAILABLE.
  void Stop() {
    {
      std::lock_guard lock(mu_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

  // What an operation may ask and say. `report` is cheap: a slow reader gets the latest.
  template <typename Progress>
  struct Handle {
    std::function<bool()> cancelled;
    std::function<void(const Progress&)> report;
  };

  // `operation` runs on one of the threads; its status ends the call, after the last thing it reported was
  // sent.
  template <typename Progress>
  grpc::ServerWriteReactor<Progress>* Start(std::function<grpc::Status(const Handle<Progress>&)> operation) {
    auto state = std::make_shared<State<Progress>>();
    auto* reactor = new Reactor<Progress>(state);
    state->reactor = reactor;
    grpc::Status refused;
    {
      std::lock_guard lock(mu_);
      if (stopping_) {
        refused = {grpc::StatusCode::UNAVAILABLE, "shutting down"};
      } else if (queue_.size() >= max_waiting_) {
        refused = {grpc::StatusCode::RESOURCE_EXHAUSTED,
                   std::to_string(queue_.size()) + " long operations wait already; try again later"};
      } else {
        queue_.push_back([this, state, operation = std::move(operation)] {
          Handle<Progress> handle;
          handle.cancelled = [this, &state] { return stopping_ || state->cancelled; };
          handle.report = [&state](const Progress& progress) { state->Write(progress); };
          state->Close(handle.cancelled() ? grpc::Status::CANCELLED : operation(handle));
        });
      }
    }
    if (refused.ok()) {
      wake_.notify_one();
    } else {
      state->Close(refused);
    }
    return reactor;
  }

  // A call that is over before it began.
  template <typename Progress>
  grpc::ServerWriteReactor<Progress>* Refuse(const grpc::Status& status) {
    auto state = std::make_shared<State<Progress>>();
    auto* reactor = new Reactor<Progress>(state);
    state->reactor = reactor;
    state->Close(status);
    return reactor;
  }

 private:
  template <typename Progress>
  class Reactor;

  // Outlives both the call and the operation.
  template <typename Progress>
  struct State {
    std::mutex mu;
    Reactor<Progress>* reactor = nullptr;  // null once the call is gone
    std::atomic<bool> cancelled{false};

    void Write(const Progress& progress) {
      std::lock_guard lock(mu);
      if (reactor) reactor->Write(progress);
    }
    void Close(const grpc::Status& status) {
      std::lock_guard lock(mu);
      if (reactor) reactor->Close(status);
    }
  };

  // All but the callbacks runs under the state's lock.
  template <typename Progress>
  class Reactor final : public grpc::ServerWriteReactor<Progress> {
   public:
    explicit Reactor(std::shared_ptr<State<Progress>> state) : state_(std::move(state)) {}

    void Write(const Progress& progress) {
      if (status_) return;
      if (writing_) {
        pending_ = progress;
        return;
      }
      writing_ = true;
      in_flight_ = progress;
      this->StartWrite(&in_flight_);
    }
    void Close(const grpc::Status& status) {
      if (status_) return;
      status_ = status;
      if (!writing_) this->Finish(*status_);
    }

   private:
    void OnWriteDone(bool ok) override {
      std::lock_guard lock(state_->mu);
      writing_ = false;
      if (ok && pending_) {
        in_flight_ = std::move(*pending_);
        pending_.reset();
        writing_ = true;
        this->StartWrite(&in_flight_);
        return;
      }
      if (status_) this->Finish(*status_);
    }
    void OnCancel() override { state_->cancelled = true; }
    void OnDone() override {
      {
        std::lock_guard lock(state_->mu);
        state_->reactor = nullptr;
        state_->cancelled = true;
      }
      delete this;
    }

    const std::shared_ptr<State<Progress>> state_;
    Progress in_flight_;
    std::optional<Progress> pending_;
    std::optional<grpc::Status> status_;
    bool writing_ = false;
  };

  void Run() {
    for (;;) {
      std::function<void()> job;
      {
        std::unique_lock lock(mu_);
        wake_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;  // stopping: what waits is told so by its own first look
        job = std::move(queue_.front());
        queue_.pop_front();
      }
      job();
    }
  }

  const size_t max_waiting_;
  std::mutex mu_;
  std::condition_variable wake_;
  std::atomic<bool> stopping_{false};
  std::deque<std::function<void()>> queue_;
  std::vector<std::thread> threads_;
};

}  // namespace tidepool
