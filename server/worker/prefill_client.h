#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "server/rpc/rpc.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {

// PrefillClient: one remote prefill, as the decode worker sees it (Handle of one gRPC call; deletes itself
// when the call is over). Callbacks run on gRPC's threads, `on_end` last and exactly once.
class PrefillClient final : public grpc::ClientReadReactor<v1::PrefillEvent> {
 public:
  using OnEvent = std::function<void(const v1::PrefillEvent&)>;
  using OnEnd = std::function<void(const absl::Status&)>;

  // The context by which the call is cancelled; it stays valid as long as somebody holds it.
  static std::shared_ptr<grpc::ClientContext> Start(ChannelCache& channels, const std::string& address,
                                                    const std::string& cluster_token,
                                                    const TraceContext& trace, absl::Duration timeout,
                                                    v1::PrefillRequest request, OnEvent on_event,
                                                    OnEnd on_end);

 private:
  PrefillClient(v1::PrefillRequest request, OnEvent on_event, OnEnd on_end)
      : request_(std::move(request)), on_event_(std::move(on_event)), on_end_(std::move(on_end)) {}

  void OnReadDone(bool ok) override {
    if (!ok) return;
    on_event_(event_);
    StartRead(&event_);
  }
  void OnDone(const grpc::Status& status) override {
    on_end_(FromGrpc(status));
    delete this;
  }

  const v1::PrefillRequest request_;
  const OnEvent on_event_;
  const OnEnd on_end_;
  std::shared_ptr<grpc::ClientContext> context_;
  std::unique_ptr<v1::Worker::Stub> stub_;
  v1::PrefillEvent event_;
};

}  // namespace tidepool
