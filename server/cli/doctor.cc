#include "server/cli/doctor.h"

#include <netdb.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "config/address.h"
#include "server/cli/doctor_checks.h"
#include "transport/socket_address.h"

namespace tidepool {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMiB = 1 << 20;

std::string Mib(uint64_t bytes) { return absl::StrCat(bytes / kMiB, " MiB"); }

Finding CheckCpu() {
  __builtin_cpu_init();
  std::vector<std::string> missing, extra;
  if (!__builtin_cpu_supports("avx2")) missing.push_back("avx2");
  if (!__builtin_cpu_supports("fma")) missing.push_back("fma");
  if (!__builtin_cpu_supports("bmi2")) missing.push_back("bmi2");
  if (__builtin_cpu_supports("avx512f")) extra.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bf16")) extra.push_back("avx512bf16");
  if (!missing.empty())
    return Fail("cpu", "lacks " + absl::StrJoin(missing, ", ") + "; x86-64-v3 is the least");
  return Ok("cpu", absl::StrCat("x86-64-v3",
                                extra.empty() ? ", no AVX-512: bfloat16 is computed in float32" : " with ",
                                absl::StrJoin(extra, ", ")));
}

// MemAvailable, or what the control group leaves where that is less.
uint64_t AvailableMemory() {
  uint64_t available = 0;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    if (words.size() >= 2 && words[0] == "MemAvailable:" && absl::SimpleAtoi(words[1], &available))
      available *= 1024;
  }
  uint64_t limit = 0, used = 0;
  std::ifstream("/sys/fs/cgroup/memory.max") >> limit;  // "max" reads as 0
  std::ifstream("/sys/fs/cgroup/memory.current") >> used;
  if (limit > used && limit - used < available) available = limit - used;
  return available;
}

uint64_t WeightBytes(const std::string& dir) {
  uint64_t bytes = 0;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(dir, error)) {
    if (entry.path().extension() == ".safetensors") bytes += entry.file_size(error);
  }
  return bytes;
}

Finding CheckMemory(const Config& config) {
  // Two workers, each with its pool, and the weights in up to twice their bytes (float16 computes in
  // float32).
  const uint64_t needed = 2 * (config.kv.host_bytes + 2 * WeightBytes(config.model.path));
  const uint64_t available = AvailableMemory();
  const std::string detail =
      absl::StrCat(Mib(available), " available, up to ", Mib(needed), " needed by two workers");
  return available >= needed ? Ok("memory", detail) : Fail("memory", detail + "; lower kv.host_bytes");
}

std::vector<Finding> CheckModel(const ModelConfig& model) {
  if (model.path.empty())
    return {Fail("model", "no model.path, and the demo model is not there; give --model DIR")};
  std::vector<Finding> out;
  const fs::path tokenizer_dir = model.tokenizer.empty() ? model.path : model.tokenizer;
  for (const fs::path& file : {fs::path(model.path) / "config.json", tokenizer_dir / "tokenizer.json"}) {
    if (access(file.c_str(), R_OK) != 0)
      out.push_back(Fail("model", file.string() + ": " + std::strerror(errno)));
  }
  const uint64_t weights = WeightBytes(model.path);
  if (weights == 0) out.push_back(Fail("model", model.path + " holds no readable *.safetensors"));
  if (out.empty()) out.push_back(Ok("model", absl::StrCat(model.path, ", weights ", Mib(weights))));
  return out;
}

// Binds and releases; "" where that works.
std::string TryBind(const HostPort& address) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int rc = getaddrinfo(address.host.c_str(), std::to_string(address.port).c_str(), &hints, &found);
  if (rc != 0) return gai_strerror(rc);
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  std::string why;
  // As the servers do: a port in TIME_WAIT is free.
  if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 ||
      bind(fd, found->ai_addr, found->ai_addrlen) != 0 || listen(fd, 1) != 0) {
    why = std::strerror(errno);
  }
  if (fd >= 0) close(fd);
  freeaddrinfo(found);
  return why;
}

Finding CheckPort(const std::string& name, const std::string& text) {
  const auto address = ParseHostPort(text);
  if (!address.ok()) return Fail("port", absl::StrCat(name, ": ", std::string(address.status().message())));
  const std::string why = TryBind(*address);
  if (why.empty()) return Ok("port", absl::StrCat(name, " ", text, " is free"));
  return Fail("port", absl::StrCat(name, " ", text, ": ", why, "; choose another or stop who has it"));
}

Finding CheckTransportPort(const TransportConfig& transport) {
  if (transport.port == 0) return Ok("port", "transport.port is any free one; a firewall wants a fixed one");
  const auto host = FirstAddressOf(transport.net_devices);
  if (!host.ok()) return Fail("port", "transport.port: " + std::string(host.status().message()));
  const bool v6 = host->find(':') != std::string::npos;
  return CheckPort("transport.port", absl::StrCat(v6 ? "[" : "", *host, v6 ? "]:" : ":", transport.port));
}

Finding CheckOpenFiles(const Config& config) {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  // One a connection, and some for gRPC, UCX, weights and logs.
  const uint64_t needed = config.gateway.max_connections + 256;
  const std::string detail =
      absl::StrCat(limit.rlim_cur, " open files allowed, ", needed, " wanted by the gateway");
  return limit.rlim_cur >= needed
             ? Ok("nofile", detail)
             : Warn("nofile", detail + "; raise `ulimit -n` or lower gateway.max_connections");
}

}  // namespace

const char* LevelName(Finding::Level level) {
  return level == Finding::kOk ? "ok" : level == Finding::kWarn ? "warn" : "fail";
}

std::vector<Finding> Diagnose(const Config& config) {
  std::vector<Finding> out = {CheckCpu(), CheckMemory(config)};
  for (Finding& finding : CheckModel(config.model)) out.push_back(std::move(finding));
  out.push_back(CheckPort("gateway.http_listen", config.gateway.http_listen));
  out.push_back(CheckPort("gateway.grpc_listen", config.gateway.grpc_listen));
  if (!config.gateway.metrics_listen.empty()) {
    out.push_back(CheckPort("gateway.metrics_listen", config.gateway.metrics_listen));
  }
  out.push_back(CheckTransportPort(config.transport));
  for (std::vector<Finding> found : {DiagnoseTransport(config.transport),
                                     DiagnoseMemory(config),
                                     DiagnoseClock(),
                                     {DiagnoseDisk(config.kv)}}) {
    for (Finding& finding : found) out.push_back(std::move(finding));
  }
  out.push_back(CheckOpenFiles(config));
  return out;
}

}  // namespace tidepool
