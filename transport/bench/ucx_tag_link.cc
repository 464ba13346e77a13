#include "transport/bench/ucx_tag_link.h"

#include <sched.h>
#include <ucp/api/ucp.h>

#include <algorithm>
#include <chrono>
#include <functional>

#include "base/status.h"
#include "transport/ucx_inventory.h"
#include "transport/ucx_status.h"

namespace tidepool {
namespace {

class Link final : public UcxTagLink {
 public:
  ~Link() override {
    if (worker_ != nullptr) ucp_worker_destroy(worker_);
    if (context_ != nullptr) ucp_cleanup(context_);
  }

  absl::Status Init(const std::string& tls, const std::string& net_devices) {
    RouteUcxLog();
    ucp_config_t* config = nullptr;
    TP_RETURN_IF_ERROR(FromUcs(ucp_config_read(nullptr, nullptr, &config), "reading UCX's environment"));
    ucs_status_t s = ucp_config_modify(config, "TLS", tls.c_str());
    if (s == UCS_OK && !net_devices.empty())
      s = ucp_config_modify(config, "NET_DEVICES", net_devices.c_str());
    if (s == UCS_OK) {
      ucp_params_t params{};
      params.field_mask = UCP_PARAM_FIELD_FEATURES;
      params.features = UCP_FEATURE_TAG;
      s = ucp_init(&params, config, &context_);
    }
    ucp_config_release(config);
    TP_RETURN_IF_ERROR(FromUcs(s, "starting UCX"));
    ucp_worker_params_t params{};
    params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    params.thread_mode = UCS_THREAD_MODE_SINGLE;
    TP_RETURN_IF_ERROR(FromUcs(ucp_worker_create(context_, &params, &worker_), "creating a UCX worker"));
    ucp_address_t* address = nullptr;
    size_t bytes = 0;
    TP_RETURN_IF_ERROR(FromUcs(ucp_worker_get_address(worker_, &address, &bytes), "asking for an address"));
    address_.assign(reinterpret_cast<const char*>(address), bytes);
    ucp_worker_release_address(worker_, address);
    return absl::OkStatus();
  }

  std::string Address() const override { return address_; }

  absl::Status Join(const std::string& peer_address) override {
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
    params.address = reinterpret_cast<const ucp_address_t*>(peer_address.data());
    return FromUcs(ucp_ep_create(worker_, &params, &ep_), "creating a UCX endpoint");
  }

  absl::Status Send(std::span<const std::byte> memory, size_t block, size_t in_flight,
                    double timeout_s) override {
    return Move(memory.size() / block, in_flight, timeout_s, [&](size_t i, ucp_request_param_t& param) {
      param.cb.send = [](void* request, ucs_status_t, void* arg) {
        ++*static_cast<size_t*>(arg);
        ucp_request_free(request);
      };
      return ucp_tag_send_nbx(ep_, memory.data() + i * block, block, i, &param);
    });
  }

  absl::Status Receive(std::span<std::byte> memory, size_t block, size_t in_flight,
                       double timeout_s) override {
    return Move(memory.size() / block, in_flight, timeout_s, [&](size_t i, ucp_request_param_t& param) {
      param.cb.recv = [](void* request, ucs_status_t, const ucp_tag_recv_info_t*, void* arg) {
        ++*static_cast<size_t*>(arg);
        ucp_request_free(request);
      };
      return ucp_tag_recv_nbx(worker_, memory.data() + i * block, block, i, ~uint64_t{0}, &param);
    });
  }

 private:
  absl::Status Move(size_t blocks, size_t in_flight, double timeout_s,
                    const std::function<ucs_status_ptr_t(size_t, ucp_request_param_t&)>& post) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
    size_t posted = 0, done = 0;
    while (done < blocks) {
      while (posted < blocks && posted - done < in_flight) {
        ucp_request_param_t param{};
        param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
        param.user_data = &done;
        const ucs_status_ptr_t r = post(posted++, param);
        if (UCS_PTR_IS_ERR(r)) return FromUcs(UCS_PTR_STATUS(r), "moving a tag message");
        done += r == nullptr;
      }
      if (ucp_worker_progress(worker_) == 0) sched_yield();
      if (std::chrono::steady_clock::now() > limit) {
        return absl::DeadlineExceededError("UCX tag messages did not get through in time");
      }
    }
    return absl::OkStatus();
  }

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_ep_h ep_ = nullptr;
  std::string address_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<UcxTagLink>> UcxTagLink::Create(const std::string& tls,
                                                               const std::string& net_devices) {
  auto link = std::make_unique<Link>();
  TP_RETURN_IF_ERROR(link->Init(tls, net_devices));
  return std::unique_ptr<UcxTagLink>(std::move(link));
}

}  // namespace tidepool
