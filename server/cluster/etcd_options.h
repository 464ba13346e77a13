#pragma once

#include <string>

#include "config/config.h"
#include "server/cluster/etcd_client.h"

namespace tidepool {

// How the configuration says that etcd is reached.
EtcdOptions EtcdOptionsOf(const ClusterConfig& config);

// cluster.etcd_prefix, ending in /.
std::string EtcdPrefix(const ClusterConfig& config);

}  // namespace tidepool
