#include "server/cluster/etcd_options.h"

#include <algorithm>

#include "absl/strings/match.h"

namespace tidepool {
namespace {

constexpr absl::Duration kCallTimeoutMin = absl::Milliseconds(500);

}  // namespace

EtcdOptions EtcdOptionsOf(const ClusterConfig& config) {
  EtcdOptions options;
  options.endpoints = config.etcd;
  options.user = config.etcd_user;
  options.password = config.etcd_password;
  options.ca = config.etcd_ca;
  options.cert = config.etcd_cert;
  options.key = config.etcd_key;
  // A lease is renewed after a third of it: a call that hangs leaves time for another.
  options.call_timeout = std::max(kCallTimeoutMin, config.lease / 3);
  return options;
}

std::string EtcdPrefix(const ClusterConfig& config) {
  return absl::EndsWith(config.etcd_prefix, "/") ? config.etcd_prefix : config.etcd_prefix + "/";
}

}  // namespace tidepool
