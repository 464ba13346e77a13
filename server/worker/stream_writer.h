#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <mutex>
#include <optional>
#include <utility>

namespace tidepool {

// StreamWriter: a server-streaming reactor that merges what is written while a write is in flight, so that
// a slow reader costs one pending message however many events there are. Handle of one gRPC call: deletes
// itself in OnDone. Thread-safe until Close was called and OnDone may have run; owners keep a StreamPort.
//
// `merge(pending, next)` folds `next` into `pending`.
template <typename Message>
class StreamWriter final : public grpc::ServerWriteReactor<Message> {
 public:
  using Merge = void (*)(Message& pending, Message&& next);
  StreamWriter(Merge merge, std::function<void()> on_cancel, std::function<void()> on_done)
      : merge_(merge), on_cancel_(std::move(on_cancel)), on_done_(std::move(on_done)) {}

  void Write(Message&& message) {
    std::lock_guard lock(mu_);
    if (closed_) return;
    if (writing_) {
      if (pending_) {
        merge_(*pending_, std::move(message));
      } else {
        pending_ = std::move(message);
      }
      return;
    }
    StartLocked(std::move(message));
  }

  // Ends the call once everything written is out. Later calls do nothing.
  void Close(grpc::Status status) {
    std::lock_guard lock(mu_);
    if (closed_) return;
    closed_ = true;
    status_ = std::move(status);
    if (!writing_) FinishLocked();
  }

 private:
  void OnWriteDone(bool ok) override {
    std::lock_guard lock(mu_);
    writing_ = false;
    if (!ok) {
      pending_.reset();  // the call is cancelled: OnCancel tells the owner
    } else if (pending_) {
      Message next = std::move(*pending_);
      pending_.reset();
      StartLocked(std::move(next));
      return;
    }
    if (closed_) FinishLocked();
  }
  void OnCancel() override { on_cancel_(); }
  void OnDone() override {
    on_done_();
    delete this;
  }

  void StartLocked(Message&& message) {
    in_flight_ = std::move(message);
    writing_ = true;
    this->StartWrite(&in_flight_);
  }
  void FinishLocked() {
    if (!finished_) {
      finished_ = true;
      this->Finish(status_);
    }
  }

  const Merge merge_;
  const std::function<void()> on_cancel_;
  const std::function<void()> on_done_;
  std::mutex mu_;
  Message in_flight_;
  std::optional<Message> pending_;
  bool writing_ = false;
  bool closed_ = false;
  bool finished_ = false;
  grpc::Status status_;
};

// StreamPort: how the request writes to its stream; safe to use after the call is gone. Thread-safe.
template <typename Message>
class StreamPort {
 public:
  void Attach(StreamWriter<Message>* writer) {
    std::lock_guard lock(mu_);
    writer_ = writer;
  }
  void Detach() {
    std::lock_guard lock(mu_);
    writer_ = nullptr;
  }
  void Write(Message&& message) {
    std::lock_guard lock(mu_);
    if (writer_) writer_->Write(std::move(message));
  }
  void Close(grpc::Status status) {
    std::lock_guard lock(mu_);
    if (writer_) writer_->Close(std::move(status));
  }

 private:
  std::mutex mu_;
  StreamWriter<Message>* writer_ = nullptr;
};

}  // namespace tidepool
