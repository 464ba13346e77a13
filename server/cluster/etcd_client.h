#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "etcd/etcdserverpb.grpc.pb.h"

namespace tidepool {

struct EtcdOptions {
  std::vector<std::string> endpoints;  // host:port, at least one
  std::string user, password;          // empty: etcd asks for none
  // PEM files. `ca` empty: plaintext; `cert` and `key`, both or neither: who we are.
  std::string ca, cert, key;
  absl::Duration call_timeout = absl::Seconds(2);  // of one call, all endpoints that are tried included
};

struct EtcdEntry {
  std::string key;
  std::string value;
  int64_t create_revision = 0;
  int64_t mod_revision = 0;
  int64_t lease = 0;  // 0: none
};

// All keys of a prefix, as they were at `revision`.
struct EtcdListing {
  int64_t revision = 0;
  std::vector<EtcdEntry> entries;
};

struct EtcdLease {
  int64_t id = 0;
  absl::Duration ttl;  // at least what was asked for
};

// EtcdClient: etcd's v3 API, as far as a cluster's membership needs it. Every call blocks its caller for at
// most call_timeout (a watch: as long as its caller wants), and goes to the next endpoint where one does not
// answer; the one that answered last is asked first. Thread-safe.
//
// Errors of all calls: Unavailable and DeadlineExceeded (no endpoint answered, or etcd has no quorum),
// Cancelled (after Stop), PermissionDenied and InvalidArgument (user, password or their rights).
class EtcdClient {
 public:
  // Connects to nobody yet. InvalidArgument: no endpoint, or a PEM file that cannot be read.
  static absl::StatusOr<std::unique_ptr<EtcdClient>> Create(EtcdOptions options);
  ~EtcdClient();

  // nullopt: there is no such key.
  absl::StatusOr<std::optional<EtcdEntry>> Get(const std::string& key);
  absl::StatusOr<EtcdListing> List(const std::string& prefix);

  // Returns its revision. NotFound: there is no such lease (any more).
  absl::StatusOr<int64_t> Put(const std::string& key, const std::string& value, int64_t lease);
  // A key that is put along with another, which is put only where this one was not changed since.
  struct Along {
    std::string key, value;
    int64_t mod_revision = 0;  // 0: it did not exist
  };
  // Puts the key unless it exists; returns what stands there then. It is the caller's own where its lease is
  // `lease`, also where an earlier try succeeded without an answer. NotFound: as Put. Aborted: `along` was
  // changed.
  absl::StatusOr<EtcdEntry> Create(const std::string& key, const std::string& value, int64_t lease,
                                   const Along* along = nullptr);
  // Puts the key where it was not changed since `mod_revision`. False: it was.
  absl::StatusOr<bool> Replace(const std::string& key, int64_t mod_revision, const std::string& value,
                               int64_t lease);
  // Puts all of `puts` where `key` was not changed since `mod_revision` (0: it does not exist). Their
  // revision; nullopt: it was changed, also where an earlier try succeeded without an answer.
  absl::StatusOr<std::optional<int64_t>> CompareAndPut(
      const std::string& key, int64_t mod_revision,
      const std::vector<std::pair<std::string, std::string>>& puts);
  // Deletes the key where it is of that lease still. False: it is not.
  absl::StatusOr<bool> DeleteOf(const std::string& key, int64_t lease);
  // Forgets what was before `revision`.
  absl::Status Compact(int64_t revision);

  absl::StatusOr<EtcdLease> Grant(absl::Duration ttl);
  // Returns what it has now. NotFound: it is over, and its keys are gone.
  absl::StatusOr<absl::Duration> KeepAlive(int64_t lease);
  absl::Status Revoke(int64_t lease);

  // What a watch gives. All calls come from within Watch.
  struct WatchEvent {
    bool deleted = false;
    EtcdEntry entry;  // of a deleted one: key and mod_revision
  };
  struct WatchSink {
    // Etcd watches from here on: what comes is all there is.
    std::function<void()> on_ready;
    // Every change, in order. `revision`: a watch that goes on after it begins at the next.
    std::function<void(const std::vector<WatchEvent>& events, int64_t revision)> on_events;
  };
  // Watches a prefix from `revision` on, for at most `limit`. OutOfRange: that revision is compacted away;
  // list again. DataLoss: etcd has lost it, and maybe all else; list again. DeadlineExceeded: `limit` is
  // over; go on. Other errors: this endpoint is gone; go on.
  absl::Status Watch(const std::string& prefix, int64_t revision, absl::Duration limit,
                     const WatchSink& sink);

  // Ends the calls under way, and all later ones, with Cancelled.
  void Stop();

 private:
  struct Endpoint {
    std::string address;
    std::shared_ptr<grpc::Channel> channel;
  };
  // A call that Stop can end; a watch, also a change of the endpoint.
  class Call;

  explicit EtcdClient(EtcdOptions options);
  absl::Status Connect();
  // Runs `body` against endpoints until one answers.
  absl::Status OnAny(const std::function<absl::Status(grpc::ClientContext&, const Endpoint&)>& body);
  absl::Status Login(const Endpoint& endpoint, absl::Time deadline);
  absl::StatusOr<EtcdListing> Range(const std::string& key, const std::string& range_end);
  absl::StatusOr<etcdserverpb::TxnResponse> Txn(const etcdserverpb::TxnRequest& request);
  void MoveOn(size_t from);
  size_t current();

  const EtcdOptions options_;
  std::vector<Endpoint> endpoints_;

  std::mutex mu_;
  size_t current_ = 0;
  std::string token_;  // of the user; empty: none, or not logged in
  bool stopped_ = false;
  std::set<Call*> calls_;
};

// The end of the range of all keys that begin with `prefix`.
std::string EtcdPrefixEnd(std::string prefix);

}  // namespace tidepool
