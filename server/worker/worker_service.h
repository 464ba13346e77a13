#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

#include "server/worker/role_change.h"
#include "server/worker/worker_context.h"

namespace tidepool {

// WorkerService: the gRPC face of a worker: makes a GenerateCall or a PrefillCall of every call, and counts
// them. Thread-safe.
class WorkerService final : public v1::Worker::CallbackService {
 public:
  // Borrowed: `roles`, what this worker takes, and `scheduler`, whose orders it obeys.
  WorkerService(WorkerContext& context, RoleChange& roles, SchedulerLocator& scheduler,
                v1::DescribeReply description);

  grpc::ServerWriteReactor<v1::WorkerGenerateEvent>* Generate(
      grpc::CallbackServerContext* rpc, const v1::WorkerGenerateRequest* request) override;
  grpc::ServerWriteReactor<v1::PrefillEvent>* Prefill(grpc::CallbackServerContext* rpc,
                                                      const v1::PrefillRequest* request) override;
  grpc::ServerUnaryReactor* Describe(grpc::CallbackServerContext* rpc, const v1::DescribeRequest* request,
                                     v1::DescribeReply* reply) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* rpc, const v1::DrainRequest* request,
                                  v1::DrainReply* reply) override;
  grpc::ServerUnaryReactor* SetRole(grpc::CallbackServerContext* rpc, const v1::SetRoleRequest* request,
                                    v1::SetRoleReply* reply) override;

  void BeginDrain();
  bool draining() const { return draining_; }
  // Whoever drained it wants the process to end when nothing runs any more.
  bool end_process() const { return end_process_; }
  // Requests whose outcome is open.
  uint32_t active() const;
  RoleChange::Active active_by_kind() const;
  // True once none is; false after `timeout`.
  bool WaitIdle(absl::Duration timeout) const;

 private:
  template <typename Call, typename Event, typename Request>
  grpc::ServerWriteReactor<Event>* StartCall(grpc::CallbackServerContext* rpc, const Request* request,
                                             void (*merge)(Event&, Event&&), uint32_t& active,
                                             absl::Status admitted);
  absl::Status Admit(const grpc::CallbackServerContext& rpc, bool role_fits, const char* what) const;

  WorkerContext& context_;
  RoleChange& roles_;
  SchedulerLocator& scheduler_;
  const v1::DescribeReply description_;
  std::atomic<bool> draining_{false}, end_process_{false};
  mutable std::mutex mu_;
  mutable std::condition_variable idle_;
  RoleChange::Active active_;
};

}  // namespace tidepool
