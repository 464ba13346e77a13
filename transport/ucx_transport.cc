#include "transport/ucx_transport.h"

#include <immintrin.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/log.h"
#include "base/status.h"
#include "transport/probe.h"
#include "transport/socket_address.h"
#include "transport/ucx_inventory.h"
#include "transport/ucx_shm.h"
#include "transport/ucx_status.h"

namespace tidepool {
namespace {

constexpr std::string_view kScheme = "ucx:";
// What follows it is the shared-memory lanes' part of an address.
constexpr std::string_view kShmPart = ";shm=";
constexpr unsigned kControlId = 1;
constexpr unsigned kBulkId = 2;
constexpr size_t kMaxHeaderBytes = 512;
// Over TCP, bulk data that fits one segment comes in one piece and is copied by us, checksum included, out of
// UCX's buffer. By rendezvous UCX copies it itself, and the checksum would be a second pass. A message longer
// than the receiver's segment ends its process (UCX asserts): both ends must have segments of kTcpSegment.
constexpr size_t kOnePieceBytes = 960 << 10;
// From here on what is digested as it lands bypasses the cache on its way to the destination.
constexpr size_t kStreamFrom = 256 << 10;
constexpr const char* kTcpSegment = "1m";

class UcxTransport final : public Transport {
 public:
  explicit UcxTransport(MetricRegistry* metrics) : probe_(metrics, "ucx") {}
  ~UcxTransport() override;
  absl::Status Init(const UcxOptions& options);

  void SetHandler(TransportHandler* handler) override { handler_ = handler; }
  std::string Address() const override { return address_; }
  std::string_view Name() const override { return "ucx"; }
  absl::StatusOr<EndpointId> Connect(std::string_view address) override;
  absl::Status Send(EndpointId to, std::string_view message) override;
  absl::Status SendBulk(EndpointId to, std::string_view header, std::span<const std::byte> payload,
                        std::function<void(absl::Status)> done) override;
  void Close(EndpointId endpoint, std::function<void()> quiesced) override;
  void ShareMemory(int fd, std::span<const std::byte> memory) override {
    if (shm_) shm_->ShareMemory(fd, memory);
  }
  int Progress() override;
  void Wait(int timeout_ms) override;
  void Wake() override;

 private:
  struct Endpoint {
    ucp_ep_h ep = nullptr;
    size_t in_flight = 0;  // sends and receives whose callback is still to run
    bool down = false;
    bool closing = false;
    bool closed = false;  // the close itself is through
    std::function<void()> quiesced;
  };
  // One send, receive or close under way: owns what UCX borrows, freed in its callback.
  struct Op {
    UcxTransport* transport;
    EndpointId endpoint;
    std::string bytes;  // a control message, or a bulk header
    std::function<void(absl::Status)> done;
  };

  static void OnSent(void* request, ucs_status_t status, void* arg);
  static void OnReceived(void* request, ucs_status_t status, size_t length, void* arg);
  static void OnClosed(void* request, ucs_status_t status, void* arg);
  static void OnError(void* arg, ucp_ep_h ep, ucs_status_t status);
  static void OnConnectionRequest(ucp_conn_request_h request, void* arg);
  static ucs_status_t OnControl(void* arg, const void* header, size_t header_length, void* data,
                                size_t length, const ucp_am_recv_param_t* param);
  static ucs_status_t OnBulkData(void* arg, const void* header, size_t header_length, void* data,
                                 size_t length, const ucp_am_recv_param_t* param);

  Op* NewOp(EndpointId endpoint);
  void Completed(Op* op, absl::Status status);
  void QuiesceIfIdle(EndpointId id);
  absl::Status StartNetwork(const UcxOptions& options, const std::string& tls);
  absl::StatusOr<EndpointId> CreateEndpoint(ucp_ep_params_t& params);
  void Accept(ucp_conn_request_h request);
  EndpointId IdOf(const ucp_am_recv_param_t* param) const;
  absl::StatusOr<Endpoint*> Usable(EndpointId id);
  absl::Status Post(Endpoint& endpoint, Op* op, unsigned am_id, std::string_view header,
                    std::span<const std::byte> data, uint32_t flags);

  TransportProbe probe_;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;  // of the network; null where only shared memory is configured
  ucp_listener_h listener_ = nullptr;
  int ucx_fd_ = -1;
  int wake_fd_ = -1;
  bool tcp_only_ = false;
  size_t max_connections_ = 0;
  std::string address_;
  TransportHandler* handler_ = nullptr;
  EndpointId next_id_ = 1;
  std::map<EndpointId, Endpoint> endpoints_;
  absl::flat_hash_map<ucp_ep_h, EndpointId> ids_;  // of endpoints not being closed
  absl::flat_hash_set<Op*> ops_;
  // What UCX told from inside its progress, handed to the handler after it: handlers may then call back.
  std::deque<std::function<void()>> events_;
  std::unique_ptr<UcxShmLanes> shm_;  // null: not configured
  std::vector<pollfd> waited_;
};

absl::Status UcxTransport::Init(const UcxOptions& options) {
  RouteUcxLog();
  max_connections_ = options.max_connections;
  TP_RETURN_IF_ERROR(CheckUcxTransports(options.tls));
  const UcxInventory& ucx = LoadedUcx();
  const std::string memory = absl::StrJoin(ucx.memory_types, ",");
  spdlog::debug("ucx {} offers {}; sends from and into {} memory", ucx.version, ucx.TransportNames(), memory);
  if (options.metrics != nullptr) {
    options.metrics
        ->AddGauge("tidepool_transport_ucx_info",
                   "The loaded UCX and the memory it sends from and into; always 1.",
                   {{"version", ucx.version}, {"memory", memory}})
        .Set(1);
  }
  wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd_ < 0) return absl::ResourceExhaustedError("no file descriptor left for an eventfd");
  const UcxTlsSplit split = SplitUcxTls(options.tls);
  if (split.network.empty() && split.shm.empty()) {
    return absl::InvalidArgumentError("transport.ucx_tls '" + options.tls +
                                      "' reaches nobody; name tcp, rc, ud or shm");
  }
  address_ = kScheme;
  if (!split.network.empty()) TP_RETURN_IF_ERROR(StartNetwork(options, split.network));
  if (!split.shm.empty()) {
    UcxShmLanes::Options shm;
    shm.device = split.shm;
    shm.cma = split.cma;
    shm.map = split.map;
    shm.max_lanes = std::min(options.max_connections, options.max_shm_lanes);
    shm.handler = &handler_;
    shm.events = &events_;
    shm.probe = &probe_;
    TP_ASSIGN_OR_RETURN(shm_, UcxShmLanes::Create(shm));
    address_ += std::string(kShmPart) + shm_->Address();
  }
  return absl::OkStatus();
}

absl::Status UcxTransport::StartNetwork(const UcxOptions& options, const std::string& tls) {
  const std::vector<std::string> names = absl::StrSplit(tls, ',', absl::SkipEmpty());
  tcp_only_ = std::all_of(names.begin(), names.end(),
                          [](const std::string& name) { return name == "tcp" || name == "self"; });
  std::string host = options.listen_host;
  if (host.empty()) {
    TP_ASSIGN_OR_RETURN(host, FirstAddressOf(options.net_devices));
  }
  TP_ASSIGN_OR_RETURN(const SocketAddress bind, MakeSocketAddress(host, options.listen_port));

  ucp_config_t* config = nullptr;
  TP_RETURN_IF_ERROR(FromUcs(ucp_config_read(nullptr, nullptr, &config), "reading UCX's environment"));
  ucs_status_t s = ucp_config_modify(config, "NET_DEVICES", options.net_devices.c_str());
  if (s == UCS_OK) s = ucp_config_modify(config, "TLS", tls.c_str());
  // Rendezvous by active messages: put would be one-sided writes into our memory, and a force-close over TCP
  // does not stop those that are on their way (openucx/ucx#11918).
  if (s == UCS_OK) s = ucp_config_modify(config, "PUT_ENABLE", "n");
  // A piece of a bulk message over TCP, the same at both ends. With 64 KiB, UCX's own, each is a message and
  // a wake-up too many: two thirds of the speed.
  if (s == UCS_OK) s = ucp_config_modify(config, "RX_SEG_SIZE", kTcpSegment);
  if (s == UCS_OK) {
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    s = ucp_init(&params, config, &context_);
  }
  ucp_config_release(config);
  TP_RETURN_IF_ERROR(FromUcs(s, "starting UCX"));

  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SINGLE;
  TP_RETURN_IF_ERROR(FromUcs(ucp_worker_create(context_, &worker, &worker_), "creating a UCX worker"));
  TP_RETURN_IF_ERROR(FromUcs(ucp_worker_get_efd(worker_, &ucx_fd_), "getting UCX's event descriptor"));
  for (auto [id, callback] : {std::pair{kControlId, &OnControl}, std::pair{kBulkId, &OnBulkData}}) {
    ucp_am_handler_param_t am{};
    am.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                    UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    am.id = id;
    am.flags = UCP_AM_FLAG_WHOLE_MSG;
    am.cb = callback;
    am.arg = this;
    TP_RETURN_IF_ERROR(FromUcs(ucp_worker_set_am_recv_handler(worker_, &am), "setting an AM handler"));
  }

  ucp_listener_params_t listen{};
  listen.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
  listen.sockaddr.addr = bind.get();
  listen.sockaddr.addrlen = bind.size;
  listen.conn_handler.cb = &OnConnectionRequest;
  listen.conn_handler.arg = this;
  TP_RETURN_IF_ERROR(FromUcs(ucp_listener_create(worker_, &listen, &listener_), "UCX cannot listen"));
  ucp_listener_attr_t attr{};
  attr.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
  TP_RETURN_IF_ERROR(FromUcs(ucp_listener_query(listener_, &attr), "querying the UCX listener"));
  const auto* bound = reinterpret_cast<const sockaddr*>(&attr.sockaddr);
  const uint16_t port = PortOf(bound);
  address_ = std::string(kScheme) + HostOf(bound) + ":" + std::to_string(port);
  return absl::OkStatus();
}

UcxTransport::~UcxTransport() {
  shm_.reset();
  probe_.connections.Add(-static_cast<double>(endpoints_.size()));
  if (worker_ != nullptr) {
    handler_ = nullptr;
    std::vector<EndpointId> open;
    for (auto& [id, endpoint] : endpoints_) {
      if (!endpoint.closing) open.push_back(id);
    }
    for (EndpointId id : open) Close(id, [] {});
    // Each endpoint leaves the map from its own `quiesced`; one that does not is torn down with the worker.
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(1);
    while (!endpoints_.empty() && std::chrono::steady_clock::now() < limit) {
      ucp_worker_progress(worker_);
      std::erase_if(endpoints_, [](const auto& e) { return e.second.closed && e.second.in_flight == 0; });
    }
    if (listener_ != nullptr) ucp_listener_destroy(listener_);
    ucp_worker_destroy(worker_);
  }
  for (Op* op : ops_) delete op;
  if (context_ != nullptr) ucp_cleanup(context_);
  if (wake_fd_ >= 0) close(wake_fd_);
}

UcxTransport::Op* UcxTransport::NewOp(EndpointId endpoint) {
  Op* op = new Op{this, endpoint, {}, {}};
  ops_.insert(op);
  return op;
}

// The op is over: its `done` runs in the next Progress, before a `quiesced` that waited for it.
void UcxTransport::Completed(Op* op, absl::Status status) {
  if (op->done) {
    events_.push_back([done = std::move(op->done), status = std::move(status)] { done(status); });
  }
  const EndpointId id = op->endpoint;
  ops_.erase(op);
  delete op;
  auto it = endpoints_.find(id);
  if (it == endpoints_.end()) return;
  --it->second.in_flight;
  QuiesceIfIdle(id);
}

void UcxTransport::QuiesceIfIdle(EndpointId id) {
  auto it = endpoints_.find(id);
  if (it == endpoints_.end() || !it->second.closed || it->second.in_flight > 0 || !it->second.quiesced)
    return;
  events_.push_back([this, id, quiesced = std::exchange(it->second.quiesced, nullptr)] {
    if (endpoints_.erase(id) > 0) probe_.connections.Add(-1);
    quiesced();
  });
}

absl::StatusOr<EndpointId> UcxTransport::CreateEndpoint(ucp_ep_params_t& params) {
  params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLER | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = &OnError;
  params.err_handler.arg = this;
  ucp_ep_h ep = nullptr;
  TP_RETURN_IF_ERROR(FromUcs(ucp_ep_create(worker_, &params, &ep), "creating a UCX endpoint"));
  const EndpointId id = next_id_++;
  endpoints_[id].ep = ep;
  probe_.connections.Add(1);
  ids_[ep] = id;
  return id;
}

absl::StatusOr<EndpointId> UcxTransport::Connect(std::string_view address) {
  const size_t shm_at = address.find(kShmPart);
  const std::string_view network = address.substr(0, shm_at);
  if (shm_at != std::string_view::npos) {
    const std::string_view shm = address.substr(shm_at + kShmPart.size());
    TP_RETURN_IF_ERROR(UcxShmLanes::CheckAddress(shm));
    absl::Status why = absl::UnavailableError("the peer is on another host");
    const bool network_too = network != kScheme && worker_ != nullptr;
    if (shm_ && shm_->Reaches(shm) && network_too && shm_->TurnedAway(shm)) {
      why = absl::UnavailableError("the peer takes no more shared-memory lanes");
    } else if (shm_ && shm_->Reaches(shm)) {
      auto lane = shm_->Connect(shm);
      if (lane.ok()) return lane;
      why = lane.status();
    }
    if (network == kScheme) return why;
  }
  TP_ASSIGN_OR_RETURN(const SocketAddress peer, ParseTransportAddress(kScheme, network));
  if (worker_ == nullptr) {
    return absl::UnavailableError(
        "the peer is on another host, and transport.ucx_tls names no network transport");
  }
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR;
  params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
  params.sockaddr.addr = peer.get();
  params.sockaddr.addrlen = peer.size;
  return CreateEndpoint(params);
}

void UcxTransport::OnConnectionRequest(ucp_conn_request_h request, void* arg) {
  auto* self = static_cast<UcxTransport*>(arg);
  self->events_.push_back([self, request] { self->Accept(request); });
}

void UcxTransport::Accept(ucp_conn_request_h request) {
  if (endpoints_.size() >= max_connections_) {
    spdlog::warn("ucx connection rejected: there are {}, the limit", endpoints_.size());
    probe_.Refused(RefusedReason::kLimit).Add();
    ucp_listener_reject(listener_, request);
    return;
  }
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST;
  params.conn_request = request;
  if (auto id = CreateEndpoint(params); !id.ok()) {
    spdlog::warn("ucx connection not accepted: {}", std::string(id.status().message()));
  }
}

void UcxTransport::OnError(void* arg, ucp_ep_h ep, ucs_status_t status) {
  auto* self = static_cast<UcxTransport*>(arg);
  auto it = self->ids_.find(ep);
  if (it == self->ids_.end()) return;
  const EndpointId id = it->second;
  self->endpoints_[id].down = true;
  self->events_.push_back([self, id, status] {
    auto endpoint = self->endpoints_.find(id);
    if (endpoint == self->endpoints_.end() || endpoint->second.closing) return;
    self->handler_->OnEndpointDown(id, FromUcs(status, "connection lost"));
  });
}

absl::StatusOr<UcxTransport::Endpoint*> UcxTransport::Usable(EndpointId id) {
  auto it = endpoints_.find(id);
  if (it == endpoints_.end() || it->second.closing || it->second.down) {
    return absl::UnavailableError("the endpoint is down");
  }
  return &it->second;
}

absl::Status UcxTransport::Post(Endpoint& endpoint, Op* op, unsigned am_id, std::string_view header,
                                std::span<const std::byte> data, uint32_t flags) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = flags | UCP_AM_SEND_FLAG_REPLY;  // tells the receiver which connection it came from
  param.cb.send = &OnSent;
  param.user_data = op;
  ++endpoint.in_flight;
  const ucs_status_ptr_t r =
      ucp_am_send_nbx(endpoint.ep, am_id, header.data(), header.size(), data.data(), data.size(), &param);
  if (UCS_PTR_IS_ERR(r)) {
    op->done = nullptr;  // the status returned says it
    Completed(op, absl::OkStatus());
    return FromUcs(UCS_PTR_STATUS(r), "sending");
  }
  if (r == nullptr) Completed(op, absl::OkStatus());
  return absl::OkStatus();
}

absl::Status UcxTransport::Send(EndpointId to, std::string_view message) {
  if (message.size() > kMaxMessageBytes) {
    return absl::InvalidArgumentError("message of " + std::to_string(message.size()) +
                                      " bytes exceeds the limit of " + std::to_string(kMaxMessageBytes));
  }
  if ((to & UcxShmLanes::kLaneBit) != 0 && shm_) return shm_->Send(to, message);
  TP_ASSIGN_OR_RETURN(Endpoint * endpoint, Usable(to));
  probe_.sent_control.Add(message.size());
  Op* op = NewOp(to);
  op->bytes = std::string(message);
  return Post(*endpoint, op, kControlId, {}, std::as_bytes(std::span(op->bytes)), UCP_AM_SEND_FLAG_EAGER);
}

absl::Status UcxTransport::SendBulk(EndpointId to, std::string_view header,
                                    std::span<const std::byte> payload,
                                    std::function<void(absl::Status)> done) {
  if (header.size() > kMaxHeaderBytes) return absl::InvalidArgumentError("bulk header exceeds 512 bytes");
  if ((to & UcxShmLanes::kLaneBit) != 0 && shm_) {
    return shm_->SendBulk(to, header, payload, std::move(done));
  }
  TP_ASSIGN_OR_RETURN(Endpoint * endpoint, Usable(to));
  probe_.sent_bulk.Add(payload.size());
  Op* op = NewOp(to);
  op->bytes = std::string(header);
  op->done = std::move(done);
  const bool one_piece = tcp_only_ && payload.size() <= kOnePieceBytes;
  return Post(*endpoint, op, kBulkId, op->bytes, payload, one_piece ? UCP_AM_SEND_FLAG_EAGER : 0);
}

void UcxTransport::OnSent(void* request, ucs_status_t status, void* arg) {
  ucp_request_free(request);
  auto* op = static_cast<Op*>(arg);
  op->transport->Completed(op, FromUcs(status, "sending"));
}

void UcxTransport::OnReceived(void* request, ucs_status_t status, size_t, void* arg) {
  ucp_request_free(request);
  auto* op = static_cast<Op*>(arg);
  op->transport->Completed(op, FromUcs(status, "receiving"));
}

EndpointId UcxTransport::IdOf(const ucp_am_recv_param_t* param) const {
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) == 0) return 0;
  auto it = ids_.find(param->reply_ep);
  return it == ids_.end() ? 0 : it->second;
}

ucs_status_t UcxTransport::OnControl(void* arg, const void*, size_t, void* data, size_t length,
                                     const ucp_am_recv_param_t* param) {
  auto* self = static_cast<UcxTransport*>(arg);
  const EndpointId from = self->IdOf(param);
  const bool rendezvous = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  // Ours are always eager and within the limit.
  if (from == 0 || rendezvous || length > kMaxMessageBytes) return UCS_OK;
  self->probe_.received_control.Add(length);
  self->events_.push_back([self, from, message = std::string(static_cast<const char*>(data), length)] {
    auto endpoint = self->endpoints_.find(from);
    if (endpoint == self->endpoints_.end() || endpoint->second.closing) return;
    self->handler_->OnMessage(from, message);
  });
  return UCS_OK;
}

ucs_status_t UcxTransport::OnBulkData(void* arg, const void* header, size_t header_length, void* data,
                                      size_t length, const ucp_am_recv_param_t* param) {
  auto* self = static_cast<UcxTransport*>(arg);
  const EndpointId from = self->IdOf(param);
  // Dropped: to the sender it is as good as sent.
  if (from == 0 || self->handler_ == nullptr) return UCS_OK;
  BulkSink sink = self->handler_->OnBulk(from, {static_cast<const char*>(header), header_length}, length);
  TP_CHECK(sink.dst.empty() || sink.dst.size() == length);
  if (!sink.dst.empty()) self->probe_.received_bulk.Add(length);
  if (sink.dst.empty() && length > 0) {
    if (sink.done) {
      self->events_.push_back([done = std::move(sink.done)] { done(absl::CancelledError("dropped")); });
    }
    return UCS_OK;
  }
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0) {
    if (sink.digest != nullptr) {
      sink.digest->Copy(sink.dst.data(), {static_cast<const std::byte*>(data), length},
                        length >= kStreamFrom);
      _mm_sfence();
    } else if (length > 0) {
      std::memcpy(sink.dst.data(), data, length);
    }
    // One of no bytes that is dropped has none.
    if (sink.done) self->events_.push_back([done = std::move(sink.done)] { done(absl::OkStatus()); });
    return UCS_OK;
  }
  Op* op = self->NewOp(from);
  op->done = std::move(sink.done);
  ++self->endpoints_[from].in_flight;
  ucp_request_param_t receive{};
  receive.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  receive.cb.recv_am = &OnReceived;
  receive.user_data = op;
  const ucs_status_ptr_t r = ucp_am_recv_data_nbx(self->worker_, data, sink.dst.data(), length, &receive);
  if (UCS_PTR_IS_ERR(r)) {
    self->Completed(op, FromUcs(UCS_PTR_STATUS(r), "receiving"));
  } else if (r == nullptr) {
    self->Completed(op, absl::OkStatus());
  }
  return UCS_INPROGRESS;  // UCX keeps its descriptor for the receive
}

void UcxTransport::Close(EndpointId id, std::function<void()> quiesced) {
  if ((id & UcxShmLanes::kLaneBit) != 0 && shm_) return shm_->Close(id, std::move(quiesced));
  auto it = endpoints_.find(id);
  if (it == endpoints_.end() || it->second.closing) {
    events_.push_back(std::move(quiesced));
    return;
  }
  Endpoint& endpoint = it->second;
  endpoint.closing = true;
  endpoint.quiesced = std::move(quiesced);
  ids_.erase(endpoint.ep);
  Op* op = NewOp(id);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  param.cb.send = &OnClosed;
  param.user_data = op;
  ++endpoint.in_flight;
  const ucs_status_ptr_t r = ucp_ep_close_nbx(endpoint.ep, &param);
  if (r != nullptr && !UCS_PTR_IS_ERR(r)) return;
  if (UCS_PTR_IS_ERR(r)) {
    // With the force flag UCX refuses only a misuse; without its word that nothing moves, `quiesced` stays
    // out, and the layer above quarantines.
    spdlog::error("ucx endpoint cannot be closed: {}", ucs_status_string(UCS_PTR_STATUS(r)));
  } else {
    endpoint.closed = true;
  }
  Completed(op, absl::OkStatus());
}

void UcxTransport::OnClosed(void* request, ucs_status_t status, void* arg) {
  ucp_request_free(request);
  auto* op = static_cast<Op*>(arg);
  if (status != UCS_OK) spdlog::debug("ucx endpoint closed with {}", ucs_status_string(status));
  auto it = op->transport->endpoints_.find(op->endpoint);
  if (it != op->transport->endpoints_.end()) it->second.closed = true;
  op->transport->Completed(op, absl::OkStatus());
}

int UcxTransport::Progress() {
  int handled = 0;
  // Bounded, so that a flood of traffic does not keep the driver from its timers.
  for (int i = 0; i < 64; ++i) {
    int moved = worker_ != nullptr ? static_cast<int>(ucp_worker_progress(worker_)) : 0;
    // A round of a busy lane moves megabytes.
    if (shm_ && i < 8) moved += shm_->Progress();
    handled += moved;
    // What the handlers cause in turn waits for the next round.
    for (size_t n = events_.size(); n > 0; --n) {
      auto event = std::move(events_.front());
      events_.pop_front();
      event();
      ++handled;
    }
    if (moved == 0 && events_.empty()) break;
  }
  return handled;
}

void UcxTransport::Wait(int timeout_ms) {
  if (!events_.empty()) return;
  waited_.clear();
  waited_.push_back({wake_fd_, POLLIN, 0});
  if (shm_ && !shm_->Arm(waited_, timeout_ms)) return;
  if (worker_ != nullptr) {
    // Busy: something came since the last progress.
    if (ucp_worker_arm(worker_) != UCS_OK) return;
    waited_.push_back({ucx_fd_, POLLIN, 0});
  }
  poll(waited_.data(), waited_.size(), timeout_ms);
  if ((waited_[0].revents & POLLIN) != 0) {
    uint64_t count;
    [[maybe_unused]] const ssize_t n = read(wake_fd_, &count, sizeof count);
  }
}

void UcxTransport::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(wake_fd_, &one, sizeof one);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(const UcxOptions& options) {
  auto transport = std::make_unique<UcxTransport>(options.metrics);
  TP_RETURN_IF_ERROR(transport->Init(options));
  return std::unique_ptr<Transport>(std::move(transport));
}

}  // namespace tidepool
