#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

#include "server/worker/worker_context.h"

namespace tidepool {

// WorkerService: the gRPC face of a worker: makes a GenerateCall or a PrefillCall of every call, and counts
// them. Thread-safe.
class WorkerService final : public v1::Worker::CallbackService {
 public:
  WorkerService(WorkerContext& context, v1::DescribeReply description);

  grpc::ServerWriteReactor<v1::WorkerGenerateEvent>* Generate(
      grpc::CallbackServerContext* rpc, const v1::WorkerGenerateRequest* request) override;
  grpc::ServerWriteReactor<v1::PrefillEvent>* Prefill(grpc::CallbackServerContext* rpc,
                                                      const v1::PrefillRequest* request) override;
  grpc::ServerUnaryReactor* Describe(grpc::CallbackServerContext* rpc, const v1::DescribeRequest* request,
                                     v1::DescribeReply* reply) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* rpc, const v1::DrainRequest* request,
                                  v1::DrainReply* reply) override;

  void BeginDrain();
  bool draining() const { return draining_; }
  // Requests whose outcome is open.
  uint32_t active() const;
  // True once none is; false after `timeout`.
  bool WaitIdle(absl::Duration timeout) const;

 private:
  template <typename Call, typename Event, typename Request>
  grpc::ServerWriteReactor<Event>* StartCall(grpc::CallbackServerContext* rpc, const Request* request,
                                             void (*merge)(Event&, Event&&), absl::Status admitted);
  absl::Status Admit(const grpc::CallbackServerContext& rpc, bool role_fits, const char* what) const;

  WorkerContext& context_;
  const v1::DescribeReply description_;
  std::atomic<bool> draining_{false};
  mutable std::mutex mu_;
  mutable std::condition_variable idle_;
  uint32_t active_ = 0;
};

}  // namespace tidepool
