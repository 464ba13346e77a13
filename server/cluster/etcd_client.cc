#include "server/cluster/etcd_client.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/small_file.h"
#include "base/status.h"
#include "server/rpc/rpc.h"

namespace tidepool {
namespace {

constexpr size_t kPemBytesMax = 1 << 20;
// A membership is small; what is larger is not ours.
constexpr int kMessageBytesMax = 8 << 20;
constexpr int64_t kEntriesMax = 65536;
// etcd's own minimum between pings is 5 s: what pings more often is cut off.
constexpr int kKeepaliveTimeMs = 10'000;
constexpr int kKeepaliveTimeoutMs = 3'000;
constexpr int kReconnectBackoffMsMin = 50;
constexpr int kReconnectBackoffMsMax = 500;
// gRPC's "minimum backoff" is what one attempt to connect may take: a TLS handshake with a busy etcd, too.
constexpr int kConnectMs = 1'000;

// What says of the endpoint, not of the call.
bool TryElsewhere(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
}

// An expired token, or one of an etcd that has restarted since.
bool WantsLogin(const absl::Status& status) {
  return absl::IsUnauthenticated(status) || absl::StrContains(status.message(), "invalid auth token") ||
         absl::StrContains(status.message(), "user name is empty");
}

EtcdEntry FromProto(const mvccpb::KeyValue& kv) {
  return {kv.key(), kv.value(), kv.create_revision(), kv.mod_revision(), kv.lease()};
}

}  // namespace

std::string EtcdPrefixEnd(std::string prefix) {
  while (!prefix.empty() && prefix.back() == '\xff') prefix.pop_back();
  if (prefix.empty()) return std::string(1, '\0');  // etcd: all keys from here on
  prefix.back() = static_cast<char>(static_cast<unsigned char>(prefix.back()) + 1);
  return prefix;
}

class EtcdClient::Call {
 public:
  Call(EtcdClient& client, bool follows) : follows_(follows), client_(client) {
    std::lock_guard lock(client_.mu_);
    client_.calls_.insert(this);
    // A connection comes about while somebody waits for it: calls that failed at once would never get one.
    context_.set_wait_for_ready(true);
    if (client_.stopped_) context_.TryCancel();
    if (!client_.token_.empty()) context_.AddMetadata("token", client_.token_);
  }
  ~Call() {
    std::lock_guard lock(client_.mu_);
    client_.calls_.erase(this);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  grpc::ClientContext& context() { return context_; }
  bool follows() const { return follows_; }

 private:
  const bool follows_;  // ends where another endpoint is asked from now on
  EtcdClient& client_;
  grpc::ClientContext context_;
};

EtcdClient::EtcdClient(EtcdOptions options) : options_(std::move(options)) {}
EtcdClient::~EtcdClient() { Stop(); }

absl::StatusOr<std::unique_ptr<EtcdClient>> EtcdClient::Create(EtcdOptions options) {
  if (options.endpoints.empty()) return absl::InvalidArgumentError("no endpoint of etcd is given");
  std::unique_ptr<EtcdClient> client(new EtcdClient(std::move(options)));
  TP_RETURN_IF_ERROR(client->Connect());
  return client;
}

absl::Status EtcdClient::Connect() {
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (!options_.ca.empty()) {
    grpc::SslCredentialsOptions ssl;
    TP_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadSmallFile(options_.ca, kPemBytesMax));
    if (!options_.cert.empty()) {
      TP_ASSIGN_OR_RETURN(ssl.pem_cert_chain, ReadSmallFile(options_.cert, kPemBytesMax));
      TP_ASSIGN_OR_RETURN(ssl.pem_private_key, ReadSmallFile(options_.key, kPemBytesMax));
    }
    credentials = grpc::SslCredentials(ssl);
  }
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(kMessageBytesMax);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectBackoffMsMin);
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kConnectMs);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kReconnectBackoffMsMax);
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  for (const std::string& address : options_.endpoints) {
    endpoints_.push_back({address, grpc::CreateCustomChannel(address, credentials, args)});
  }
  return absl::OkStatus();
}

void EtcdClient::Stop() {
  std::lock_guard lock(mu_);
  stopped_ = true;
  for (Call* call : calls_) call->context().TryCancel();
}

size_t EtcdClient::current() {
  std::lock_guard lock(mu_);
  return current_;
}

void EtcdClient::MoveOn(size_t from) {
  std::lock_guard lock(mu_);
  if (current_ != from || endpoints_.size() == 1) return;
  current_ = (from + 1) % endpoints_.size();
  spdlog::info("etcd at {} does not answer; asking {}", endpoints_[from].address,
               endpoints_[current_].address);
  // A watch on an endpoint that is silent would be, too.
  for (Call* call : calls_) {
    if (call->follows()) call->context().TryCancel();
  }
}

absl::Status EtcdClient::Login(const Endpoint& endpoint, absl::Time deadline) {
  {
    std::lock_guard lock(mu_);
    token_.clear();
  }
  Call call(*this, /*follows=*/false);
  SetTimeout(call.context(), deadline - Clock::Real().Now());
  etcdserverpb::AuthenticateRequest request;
  request.set_name(options_.user);
  request.set_password(options_.password);
  etcdserverpb::AuthenticateResponse response;
  TP_RETURN_IF_ERROR(Annotate(
      FromGrpc(
          etcdserverpb::Auth::NewStub(endpoint.channel)->Authenticate(&call.context(), request, &response)),
      "etcd refuses the user"));
  std::lock_guard lock(mu_);
  token_ = response.token();
  return absl::OkStatus();
}

absl::Status EtcdClient::OnAny(
    const std::function<absl::Status(grpc::ClientContext&, const Endpoint&)>& body) {
  const absl::Time deadline = Clock::Real().Now() + options_.call_timeout;
  absl::Status status;
  for (size_t left = endpoints_.size(); left > 0; --left) {
    const size_t at = current();
    const Endpoint& endpoint = endpoints_[at];
    // One that hangs leaves the others their share of the time.
    const absl::Time until =
        Clock::Real().Now() + (deadline - Clock::Real().Now()) / static_cast<int64_t>(left);
    for (int logins = options_.user.empty() ? 0 : 2;; --logins) {
      bool logged_in;
      {
        std::lock_guard lock(mu_);
        if (stopped_) return absl::CancelledError("the client of etcd was stopped");
        logged_in = !token_.empty();
      }
      status = absl::OkStatus();
      if (!options_.user.empty() && !logged_in) status = Login(endpoint, until);
      if (status.ok()) {
        Call call(*this, /*follows=*/false);
        SetTimeout(call.context(), until - Clock::Real().Now());
        status = body(call.context(), endpoint);
      }
      if (logins <= 0 || !WantsLogin(status)) break;
      std::lock_guard lock(mu_);
      token_.clear();
    }
    if (!TryElsewhere(status)) return status;
    MoveOn(at);
  }
  return Annotate(status, "etcd");
}

absl::StatusOr<EtcdListing> EtcdClient::Range(const std::string& key, const std::string& range_end) {
  etcdserverpb::RangeRequest request;
  request.set_key(key);
  request.set_range_end(range_end);
  request.set_limit(kEntriesMax);
  etcdserverpb::RangeResponse response;
  TP_RETURN_IF_ERROR(OnAny([&](grpc::ClientContext& context, const Endpoint& endpoint) {
    return FromGrpc(etcdserverpb::KV::NewStub(endpoint.channel)->Range(&context, request, &response));
  }));
  EtcdListing out{.revision = response.header().revision(), .entries = {}};
  for (const mvccpb::KeyValue& kv : response.kvs()) out.entries.push_back(FromProto(kv));
  return out;
}

absl::StatusOr<std::optional<EtcdEntry>> EtcdClient::Get(const std::string& key) {
  TP_ASSIGN_OR_RETURN(EtcdListing listing, Range(key, ""));
  if (listing.entries.empty()) return std::nullopt;
  return std::move(listing.entries[0]);
}

absl::StatusOr<EtcdListing> EtcdClient::List(const std::string& prefix) {
  return Range(prefix, EtcdPrefixEnd(prefix));
}

absl::StatusOr<int64_t> EtcdClient::Put(const std::string& key, const std::string& value, int64_t lease) {
  etcdserverpb::PutRequest request;
  request.set_key(key);
  request.set_value(value);
  request.set_lease(lease);
  etcdserverpb::PutResponse response;
  TP_RETURN_IF_ERROR(OnAny([&](grpc::ClientContext& context, const Endpoint& endpoint) {
    return FromGrpc(etcdserverpb::KV::NewStub(endpoint.channel)->Put(&context, request, &response));
  }));
  return response.header().revision();
}

absl::StatusOr<etcdserverpb::TxnResponse> EtcdClient::Txn(const etcdserverpb::TxnRequest& request) {
  etcdserverpb::TxnResponse response;
  TP_RETURN_IF_ERROR(OnAny([&](grpc::ClientContext& context, const Endpoint& endpoint) {
    return FromGrpc(etcdserverpb::KV::NewStub(endpoint.channel)->Txn(&context, request, &response));
  }));
  return response;
}

absl::StatusOr<EtcdEntry> EtcdClient::Create(const std::string& key, const std::string& value, int64_t lease,
                                             const Along* along) {
  etcdserverpb::TxnRequest request;
  auto* compare = request.add_compare();
  compare->set_target(etcdserverpb::Compare::CREATE);
  compare->set_key(key);
  compare->set_create_revision(0);
  auto* put = request.add_success()->mutable_request_put();
  put->set_key(key);
  put->set_value(value);
  put->set_lease(lease);
  if (along != nullptr) {
    auto* unchanged = request.add_compare();
    unchanged->set_target(etcdserverpb::Compare::MOD);
    unchanged->set_key(along->key);
    unchanged->set_mod_revision(along->mod_revision);
    auto* too = request.add_success()->mutable_request_put();
    too->set_key(along->key);
    too->set_value(along->value);
  }
  request.add_failure()->mutable_request_range()->set_key(key);
  TP_ASSIGN_OR_RETURN(const etcdserverpb::TxnResponse response, Txn(request));
  if (response.succeeded()) {
    const int64_t revision = response.header().revision();
    return EtcdEntry{key, value, revision, revision, lease};
  }
  if (response.responses_size() != 1) {
    return absl::InternalError("etcd answered a transaction without what was asked for");
  }
  const auto& kvs = response.responses(0).response_range().kvs();
  if (kvs.empty()) return absl::AbortedError(along->key + " was changed meanwhile");
  return FromProto(kvs[0]);
}

absl::StatusOr<bool> EtcdClient::Replace(const std::string& key, int64_t mod_revision,
                                         const std::string& value, int64_t lease) {
  etcdserverpb::TxnRequest request;
  auto* compare = request.add_compare();
  compare->set_target(etcdserverpb::Compare::MOD);
  compare->set_key(key);
  compare->set_mod_revision(mod_revision);
  auto* put = request.add_success()->mutable_request_put();
  put->set_key(key);
  put->set_value(value);
  put->set_lease(lease);
  TP_ASSIGN_OR_RETURN(const etcdserverpb::TxnResponse response, Txn(request));
  return response.succeeded();
}

absl::StatusOr<std::optional<int64_t>> EtcdClient::CompareAndPut(
    const std::string& key, int64_t mod_revision,
    const std::vector<std::pair<std::string, std::string>>& puts) {
  etcdserverpb::TxnRequest request;
  auto* compare = request.add_compare();
  compare->set_target(etcdserverpb::Compare::MOD);
  compare->set_key(key);
  compare->set_mod_revision(mod_revision);
  for (const auto& [name, value] : puts) {
    auto* put = request.add_success()->mutable_request_put();
    put->set_key(name);
    put->set_value(value);
  }
  TP_ASSIGN_OR_RETURN(const etcdserverpb::TxnResponse response, Txn(request));
  if (!response.succeeded()) return std::nullopt;
  return response.header().revision();
}

absl::StatusOr<bool> EtcdClient::DeleteOf(const std::string& key, int64_t lease) {
  etcdserverpb::TxnRequest request;
  auto* compare = request.add_compare();
  compare->set_target(etcdserverpb::Compare::LEASE);
  compare->set_key(key);
  compare->set_lease(lease);
  request.add_success()->mutable_request_delete_range()->set_key(key);
  TP_ASSIGN_OR_RETURN(const etcdserverpb::TxnResponse response, Txn(request));
  return response.succeeded() && response.responses_size() == 1 &&
         response.responses(0).response_delete_range().deleted() > 0;
}

absl::Status EtcdClient::Compact(int64_t revision) {
  etcdserverpb::CompactionRequest request;
  request.set_revision(revision);
  request.set_physical(true);
  etcdserverpb::CompactionResponse response;
  return OnAny([&](grpc::ClientContext& context, const Endpoint& endpoint) {
    return FromGrpc(etcdserverpb::KV::NewStub(endpoint.channel)->Compact(&context, request, &response));
  });
}

absl::StatusOr<EtcdLease> EtcdClient::Grant(absl::Duration ttl) {
  etcdserverpb::LeaseGrantRequest request;
  request.set_ttl(std::max<int64_t>(1, absl::ToInt64Seconds(absl::Ceil(ttl, absl::Seconds(1)))));
  etcdserverpb::LeaseGrantResponse response;
  TP_RETURN_IF_ERROR(OnAny([&](grpc::ClientContext& context, const Endpoint& endpoint) {
    return FromGrpc(etcdserverpb::Lease::NewStub(endpoint.channel)->LeaseGrant(&context, request, &response));
  }));
  if (!response.error().empty()) return absl::UnavailableError("etcd grants no lease: " + response.error());
  return EtcdLease{response.id(), absl::Seconds(response.ttl())};
}

absl::StatusOr<absl::Duration> EtcdClient::KeepAlive(int64_t lease) {
  etcdserverpb::LeaseKeepAliveResponse response;
  TP_RETURN_IF_ERROR(OnAny([&](grpc::ClientContext& context, const Endpoint& endpoint) -> absl::Status {
    // A stream for one message: each has a deadline of its own so, and no thread reads between them.
    const auto stream = etcdserverpb::Lease::NewStub(endpoint.channel)->LeaseKeepAlive(&context);
    etcdserverpb::LeaseKeepAliveRequest request;
    request.set_id(lease);
    const bool answered = stream->Write(request) && stream->WritesDone() && stream->Read(&response);
    if (answered) {
      context.TryCancel();
      (void)stream->Finish();
      return absl::OkStatus();
    }
    const absl::Status status = FromGrpc(stream->Finish());
    return status.ok() ? absl::UnavailableError("etcd ended a stream without an answer") : status;
  }));
  if (response.ttl() <= 0) return absl::NotFoundError(absl::StrCat("lease ", absl::Hex(lease), " is over"));
  return absl::Seconds(response.ttl());
}

absl::Status EtcdClient::Revoke(int64_t lease) {
  etcdserverpb::LeaseRevokeRequest request;
  request.set_id(lease);
  etcdserverpb::LeaseRevokeResponse response;
  return OnAny([&](grpc::ClientContext& context, const Endpoint& endpoint) {
    return FromGrpc(
        etcdserverpb::Lease::NewStub(endpoint.channel)->LeaseRevoke(&context, request, &response));
  });
}

absl::Status EtcdClient::Watch(const std::string& prefix, int64_t revision, absl::Duration limit,
                               const WatchSink& sink) {
  const size_t at = current();
  const Endpoint& endpoint = endpoints_[at];
  Call call(*this, /*follows=*/true);
  SetTimeout(call.context(), limit);
  const auto stream = etcdserverpb::Watch::NewStub(endpoint.channel)->Watch(&call.context());
  etcdserverpb::WatchRequest request;
  auto* create = request.mutable_create_request();
  create->set_key(prefix);
  create->set_range_end(EtcdPrefixEnd(prefix));
  create->set_start_revision(revision);
  create->set_progress_notify(true);
  absl::Status status;
  bool created = false;
  // An endpoint that takes calls but keeps no watch (it has lost its cluster, or is about to stop) would be
  // asked for ever: other calls do not notice.
  const auto maybe_elsewhere = [&](const absl::Status& why) {
    if (absl::IsOutOfRange(why) || absl::IsDataLoss(why) || WantsLogin(why)) return;
    if (created && !absl::IsUnavailable(why)) return;
    {
      std::lock_guard lock(mu_);
      if (stopped_) return;
    }
    MoveOn(at);
  };
  if (stream->Write(request)) {
    etcdserverpb::WatchResponse response;
    while (status.ok() && stream->Read(&response)) {
      if (response.compact_revision() > 0) {
        status = absl::OutOfRangeError(absl::StrCat(
            "revision ", revision, " is compacted away; the oldest is ", response.compact_revision()));
      } else if (response.canceled()) {
        status = absl::UnavailableError("etcd ended the watch: " + response.cancel_reason());
      } else if (response.created()) {
        if (response.header().revision() < revision - 1) {
          status = absl::DataLossError(absl::StrCat("etcd is at revision ", response.header().revision(),
                                                    ", before ", revision, ": it lost its data"));
        } else {
          created = true;
          sink.on_ready();
        }
      } else {
        std::vector<WatchEvent> events;
        for (const mvccpb::Event& event : response.events()) {
          events.push_back({event.type() == mvccpb::Event::DELETE, FromProto(event.kv())});
        }
        // A watch that catches up is told older changes in several parts: only an empty one stands for all
        // until its header's revision.
        sink.on_events(events,
                       events.empty() ? response.header().revision() : events.back().entry.mod_revision);
      }
    }
  }
  if (!status.ok()) {
    call.context().TryCancel();
    (void)stream->Finish();
    maybe_elsewhere(status);
    return status;
  }
  status = FromGrpc(stream->Finish());
  if (status.ok()) status = absl::UnavailableError("etcd ended the watch");
  maybe_elsewhere(status);
  if (WantsLogin(status)) {
    std::lock_guard lock(mu_);
    token_.clear();  // the next call logs in
  }
  return status;
}

}  // namespace tidepool
