#include <ifaddrs.h>
#include <sys/statvfs.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/cli/doctor_checks.h"
#include "server/worker/transport_options.h"
#include "transport/bench/transport_bench.h"
#include "transport/tls_context.h"
#include "transport/ucx_inventory.h"
#include "transport/ucx_shm.h"

namespace tidepool {
namespace {

constexpr uint64_t kMiB = 1 << 20;

Finding CheckInterfaces(const TransportConfig& transport) {
  ifaddrs* list = nullptr;
  std::set<std::string> known;
  if (getifaddrs(&list) == 0) {
    for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next)
      known.insert(entry->ifa_name);
    freeifaddrs(list);
  }
  std::vector<std::string> missing;
  for (const std::string& device :
       std::vector<std::string>(absl::StrSplit(transport.net_devices, ',', absl::SkipEmpty()))) {
    // mlx5_0:1 and the like are no network interfaces.
    if (device != "all" && device.find(':') == std::string::npos && known.count(device) == 0) {
      missing.push_back(device);
    }
  }
  if (missing.empty()) return Ok("interfaces", transport.net_devices);
  return Fail("interfaces", absl::StrCat("transport.net_devices names ", absl::StrJoin(missing, ", "),
                                         "; there are ", absl::StrJoin(known, ", ")));
}

std::vector<Finding> CheckUcx(const TransportConfig& transport) {
  const UcxInventory& ucx = LoadedUcx();
  std::map<std::string, std::set<std::string>> devices;
  for (const auto& resource : ucx.resources) devices[resource.transport].insert(resource.device);
  std::vector<std::string> seen;
  for (const auto& [name, on] : devices) {
    seen.push_back(name == "self" || on.contains("memory")
                       ? name
                       : absl::StrCat(name, " (", absl::StrJoin(on, ", "), ")"));
  }
  std::vector<Finding> out;
  const std::string detail = absl::StrCat("UCX ", ucx.version, " sees ", absl::StrJoin(seen, ", "));
  if (const absl::Status offered = CheckUcxTransports(transport.ucx_tls); !offered.ok()) {
    out.push_back(Fail("ucx", std::string(offered.message())));
  } else {
    out.push_back(Ok("ucx", detail));
  }
  out.push_back(Ok("ucx memory", absl::StrCat(absl::StrJoin(ucx.memory_types, ", "),
                                              ucx.HasMemory("cuda")
                                                  ? ": a GPU's KV goes out of its memory directly"
                                                  : ": no cuda, a GPU's KV is staged through host memory")));
  if (!SplitUcxTls(transport.ucx_tls).network.empty() && transport.net_devices != "lo") {
    out.push_back(Warn("ucx network",
                       absl::StrCat("UCX listens on ", transport.net_devices,
                                    " and trusts whoever reaches it: let a firewall pass only the cluster's "
                                    "machines, or set transport.kind to tls")));
  }
  return out;
}

// Lanes of UCX's shared memory take a few MiB each.
Finding CheckSharedMemory(const TransportConfig& transport) {
  if (transport.kind != "ucx" || SplitUcxTls(transport.ucx_tls).shm.empty()) {
    return Ok("shm", "not used by transport.ucx_tls");
  }
  struct statvfs fs {};
  if (statvfs("/dev/shm", &fs) != 0) {
    return Warn("shm", absl::StrCat("/dev/shm: ", std::strerror(errno), "; KV blocks then go over TCP"));
  }
  const uint64_t free = uint64_t{fs.f_bavail} * fs.f_frsize;
  const std::string detail = absl::StrCat(free / kMiB, " MiB free in /dev/shm");
  return free >= 32 * kMiB ? Ok("shm", detail) : Warn("shm", detail + "; mount it with 64 MiB or more");
}

Finding CheckCertificates(const TransportConfig& transport) {
  const auto days = CertificateDaysLeft(transport.tls_cert, transport.tls_key, transport.tls_ca);
  if (!days.ok()) return Fail("certificate", "transport." + std::string(days.status().message()));
  const std::string detail = absl::StrCat(transport.tls_cert, " is valid for ", *days, " more days");
  if (*days < 0) return Fail("certificate", transport.tls_cert + " has expired; issue a new one");
  return *days < 14 ? Warn("certificate", detail + "; issue a new one, it is taken without a restart")
                    : Ok("certificate", detail);
}

}  // namespace

std::vector<Finding> DiagnoseTransport(const TransportConfig& transport) {
  std::vector<Finding> out = {CheckInterfaces(transport)};
  if (transport.kind == "tls") {
    out.push_back(CheckCertificates(transport));
  } else {
    for (Finding& finding : CheckUcx(transport)) out.push_back(std::move(finding));
  }
  out.push_back(CheckSharedMemory(transport));
  return out;
}

Finding MeasureTransport(const TransportConfig& transport) {
  TransportBenchOptions options;
  options.pass_bytes = 64 * kMiB;
  options.rounds = 2;
  options.timeout = absl::Seconds(30);
  TransportBenchOptions::Subject subject{.name = "transport"};
  subject.transport = TransportOptionsOf(transport, "doctor", nullptr);
  // Two processes of this machine, and a worker may be running beside them; neither is a worker by name.
  subject.transport.ucx.listen_port = 0;
  subject.transport.tls.listen_port = 0;
  subject.transport.tls.check_name = false;
  const bool shm = transport.kind == "ucx" && !SplitUcxTls(transport.ucx_tls).shm.empty();
  subject.against_memcpy = shm || transport.kind != "ucx";
  options.subjects = {subject};
  const auto rows = RunTransportBench(options);
  if (!rows.ok()) return Fail("bandwidth", std::string(rows.status().message()));
  const BenchRow& row = rows->front();
  char text[240];
  std::snprintf(text, sizeof text, "%.2f GB/s between two processes over %s%s; %s: %.2f GB/s", row.value,
                transport.kind.c_str(), shm ? "'s shared memory" : "", row.reference_name.c_str(),
                row.reference);
  // 10 Mbit/s: something is very wrong, or it was limited so.
  if (row.value < 0.00125 && transport.max_bytes_per_second == 0) {
    return Warn("bandwidth",
                std::string(text) + "; look at the processor's load and at transport.net_devices");
  }
  return Ok("bandwidth", text);
}

}  // namespace tidepool
