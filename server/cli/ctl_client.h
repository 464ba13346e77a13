#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "config/loader.h"
#include "nlohmann/json.hpp"
#include "server/cli/supervisor.h"
#include "server/rpc/rpc.h"
#include "tidepool/v1/cluster.grpc.pb.h"
#include "tidepool/v1/kv.grpc.pb.h"

namespace tidepool {

// What every command of `ctl` takes.
struct CtlOptions {
  std::string scheduler;
  std::string timeout = "5s";
  std::string wait = "10m";
  std::string output = "table";
};

// Where to call and with which token.
struct CtlTarget {
  std::string scheduler;
  std::string token;
  absl::Duration timeout;             // of one call
  absl::Duration wait;                // of a long operation
  std::vector<ChildStatus> children;  // of a `serve` on this machine; empty for a cluster
  pid_t serve = 0;                    // its process; 0 for a cluster
  bool serve_reloads = false;         // ServeRuntime::reloads
};

absl::StatusOr<CtlTarget> FindCtlTarget(const CtlOptions& options, const LoadedConfig& loaded);

// CtlClient: the calls of ctl, each with the token and a deadline; errors name who was asked. One thread.
class CtlClient {
 public:
  explicit CtlClient(CtlTarget target) : target_(std::move(target)) {}
  const CtlTarget& target() const { return target_; }

  absl::StatusOr<v1::ClusterReply> Cluster();
  absl::StatusOr<v1::ExplainReply> Explain(const v1::PlaceRequest& request);
  absl::StatusOr<v1::DecisionsReply> Decisions(const v1::DecisionsRequest& request);
  absl::StatusOr<v1::WhereReply> Where(const v1::WhereRequest& request);
  absl::StatusOr<v1::DescribeReply> Describe(const v1::WorkerAddress& worker);
  // `end_process`: when nothing runs there any more, it ends.
  absl::Status Drain(const v1::WorkerAddress& worker, bool end_process);
  absl::StatusOr<v1::SetRoleReply> SetRole(const v1::WorkerAddress& worker, v1::Role role);

  // One call of `service` at host:port `address`, which errors call `peer`: `method` is a member of the stub.
  template <typename Service, typename Method, typename Request, typename Reply>
  absl::Status Unary(const std::string& address, const std::string& peer, Method method,
                     const Request& request, Reply* reply) {
    grpc::ClientContext context;
    AddClusterToken(context, target_.token);
    SetTimeout(context, target_.timeout);
    const auto stub = Service::NewStub(channels_.Get(address));
    return Annotated(FromGrpc((stub.get()->*method)(&context, request, reply)), peer);
  }
  // The same of a stream, each message of which goes to `each` until it returns false. `limit`: of all of it.
  template <typename Service, typename Message, typename Method, typename Request, typename Each>
  absl::Status Stream(const std::string& address, const std::string& peer, Method method,
                      const Request& request, absl::Duration limit, Each each) {
    grpc::ClientContext context;
    AddClusterToken(context, target_.token);
    if (limit < absl::InfiniteDuration()) SetTimeout(context, limit);
    const auto stub = Service::NewStub(channels_.Get(address));
    const auto stream = (stub.get()->*method)(&context, request);
    Message message;
    bool enough = false;
    while (!enough && stream->Read(&message)) enough = !each(message);
    if (enough) context.TryCancel();
    const absl::Status status = FromGrpc(stream->Finish());
    return enough ? absl::OkStatus() : Annotated(status, peer);
  }

 private:
  static absl::Status Annotated(const absl::Status& status, const std::string& peer);

  const CtlTarget target_;
  ChannelCache channels_;
};

// Unreached: of whom a command that asks several workers got no answer. The others' answers are printed as if
// there were no more.
class Unreached {
 public:
  // False: it says more than that nobody answers there, and is the command's own error.
  bool Note(const v1::WorkerAddress& worker, const absl::Status& status);
  bool empty() const { return workers_.empty(); }
  // After the answers: says on stderr who is missing; with -o json as one line, {"unreachable": [{"worker",
  // "reason"}, ...]}, for what is printed on stdout is a list of answers. Unavailable: none of `asked`
  // answered.
  absl::Status Report(const CtlOptions& options, size_t asked) const;
  // "a, b".
  std::string Names() const;

 private:
  std::vector<std::pair<std::string, std::string>> workers_;  // id, why
};

const char* CtlRoleName(v1::Role role);
// Rows as a table, or as JSON.
void CtlPrint(const CtlOptions& options, const nlohmann::ordered_json& rows);
// InvalidArgument lists those there are.
absl::StatusOr<v1::WorkerView> FindWorker(const v1::ClusterReply& cluster, const std::string& worker_id);

}  // namespace tidepool
