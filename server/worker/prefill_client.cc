#include "server/worker/prefill_client.h"

namespace tidepool {

std::shared_ptr<grpc::ClientContext> PrefillClient::Start(ChannelCache& channels, const std::string& address,
                                                          const std::string& cluster_token,
                                                          const TraceContext& trace, absl::Duration timeout,
                                                          v1::PrefillRequest request, OnEvent on_event,
                                                          OnEnd on_end) {
  auto* client = new PrefillClient(std::move(request), std::move(on_event), std::move(on_end));
  auto context = std::make_shared<grpc::ClientContext>();
  client->context_ = context;
  AddClusterToken(*context, cluster_token);
  AddTrace(*context, trace);
  SetTimeout(*context, timeout);
  client->stub_ = v1::Worker::NewStub(channels.Get(address));
  client->stub_->async()->Prefill(context.get(), &client->request_, client);
  client->StartRead(&client->event_);
  client->StartCall();
  return context;
}

}  // namespace tidepool
