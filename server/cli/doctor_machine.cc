#include <fcntl.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/timex.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <memory>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/small_file.h"
#include "kvstore/huge_pages.h"
#include "server/cli/doctor_checks.h"

namespace tidepool {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMiB = 1 << 20;
constexpr size_t kProbeBlock = 2 * kMiB;
constexpr size_t kProbeBlocks = 64;
constexpr auto kProbeTime = std::chrono::seconds(2);  // of each direction
// Below, loading a block from the disk is hardly ever faster than computing it.
constexpr double kSlowDiskGbs = 0.2;

std::string Mib(uint64_t bytes) { return absl::StrCat(bytes / kMiB, " MiB"); }

Finding CheckMemlock(const Config& config) {
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  if (limit.rlim_cur == RLIM_INFINITY) return Ok("memlock", "unlimited");
  const std::string detail = Mib(limit.rlim_cur) + " may be locked";
  // TCP and shared memory lock nothing; InfiniBand registers (and so locks) the whole pool.
  bool rdma = false;
  for (const std::string& name :
       std::vector<std::string>(absl::StrSplit(config.transport.ucx_tls, ',', absl::SkipEmpty()))) {
    rdma |= name.starts_with("rc") || name.starts_with("ud") || name.starts_with("dc") || name == "ib";
  }
  const bool needed = (rdma && config.transport.kind == "ucx") || config.kv.lock_memory;
  if (needed && limit.rlim_cur < config.kv.host_bytes) {
    return Fail("memlock", absl::StrCat(detail, ", ", rdma ? "RDMA" : "kv.lock_memory",
                                        " needs kv.host_bytes (", Mib(config.kv.host_bytes),
                                        "); set LimitMEMLOCK=infinity or `ulimit -l unlimited`"));
  }
  return Ok("memlock", detail + (needed ? "" : "; without RDMA and kv.lock_memory nothing is"));
}

// The word in brackets of "always [madvise] never"; empty where the file is not there.
std::string Chosen(const char* path) {
  const auto text = ReadSmallFile(path, 4096);
  if (!text.ok()) return "";
  const size_t open = text->find('['), close = text->find(']');
  if (open == std::string::npos || close == std::string::npos || close < open) return "";
  return text->substr(open + 1, close - open - 1);
}

uint64_t MeminfoBytes(const std::string& name) {
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    uint64_t value = 0;
    if (words.size() >= 2 && words[0] == name + ":" && absl::SimpleAtoi(words[1], &value)) {
      return words.size() > 2 ? value * 1024 : value;
    }
  }
  return 0;
}

Finding CheckHugePages(const KvConfig& kv) {
  if (kv.huge_pages == "off") return Ok("huge pages", "not wanted (kv.huge_pages is off)");
  const uint64_t reserved = MeminfoBytes("HugePages_Free") * MeminfoBytes("Hugepagesize");
  const std::string shmem = Chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  const std::string detail = absl::StrCat(
      Mib(reserved),
      " reserved and free, transparent ones for shared memory: ", shmem.empty() ? "unknown" : shmem);
  if (reserved >= kv.host_bytes) return Ok("huge pages", detail);
  const std::string fix = absl::StrCat(
      "; reserve them (`sysctl vm.nr_hugepages=", (kv.host_bytes + kProbeBlock - 1) / kProbeBlock,
      "` for one worker) or set /sys/kernel/mm/transparent_hugepage/shmem_enabled to advise");
  if (kv.huge_pages == "on") return Fail("huge pages", detail + ", kv.huge_pages is on" + fix);
  if (shmem == "always" || shmem == "within_size" || shmem == "advise" || shmem == "force") {
    return Ok("huge pages", detail);
  }
  if (MakesHugePages()) return Ok("huge pages", detail + "; made on demand in the background");
  // Small pools live without; large ones pay for every page of 4 KiB.
  if (kv.host_bytes < 1024 * kMiB) return Ok("huge pages", detail + "; a pool this small does without");
  return Warn("huge pages", detail + fix);
}

timespec Read(clockid_t clock) {
  timespec out{};
  clock_gettime(clock, &out);
  return out;
}
double Seconds(const timespec& t) {
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// A directory's nearest ancestor that exists: the tier makes the rest.
fs::path Existing(fs::path path) {
  std::error_code error;
  while (!path.empty() && path != path.root_path() && !fs::exists(path, error)) path = path.parent_path();
  return path;
}

struct FreeBuffer {
  void operator()(void* p) const { std::free(p); }
};

struct Probe {
  double gbs = 0;
  std::string problem;
};

// Moves blocks with `move(offset)` until all are through or the time is over.
template <typename Move>
Probe Time(const Move& move) {
  const auto start = std::chrono::steady_clock::now();
  size_t done = 0;
  while (done < kProbeBlocks && std::chrono::steady_clock::now() - start < kProbeTime) {
    errno = 0;
    if (move(static_cast<off_t>(done * kProbeBlock)) != static_cast<ssize_t>(kProbeBlock)) {
      return {0, errno != 0 ? std::strerror(errno) : "a short transfer"};
    }
    ++done;
  }
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return {static_cast<double>(done * kProbeBlock) / took / 1e9, ""};
}

Finding CheckDiskSpeed(const fs::path& where) {
  std::string name = (where / "tidepool-doctor-XXXXXX").string();
  const int plain = mkstemp(name.data());
  if (plain < 0) {
    return Fail("disk speed", absl::StrCat(where.string(), ": ", std::strerror(errno),
                                           "; the disk tier needs a directory it may write to"));
  }
  const int direct = open(name.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
  unlink(name.c_str());  // gone with the descriptors, whatever happens
  const int fd = direct >= 0 ? direct : plain;
  const std::unique_ptr<void, FreeBuffer> buffer(std::aligned_alloc(4096, kProbeBlock));
  std::memset(buffer.get(), 0x5a, kProbeBlock);
  const Probe write = Time([&](off_t at) { return pwrite(fd, buffer.get(), kProbeBlock, at); });
  fdatasync(fd);
  const Probe read = write.problem.empty() ? Time([&](off_t at) {
    const ssize_t n = pread(fd, buffer.get(), kProbeBlock, at);
    return n == 0 ? pread(fd, buffer.get(), kProbeBlock, 0) : n;  // less was written than is read
  })
                                           : Probe{};
  if (direct >= 0) close(direct);
  close(plain);
  for (const Probe* probe : {&write, &read}) {
    if (!probe->problem.empty()) {
      return Fail("disk speed", absl::StrCat(where.string(), ": ", probe->problem));
    }
  }
  char text[160];
  std::snprintf(text, sizeof text, "writes %.2f GB/s, reads %.2f GB/s, one block of 2 MiB at a time",
                write.gbs, read.gbs);
  if (direct < 0) {
    return Warn("disk speed", absl::StrCat(where.string(), ": ", text,
                                           ", through the page cache: the file system has no direct I/O"));
  }
  if (read.gbs < kSlowDiskGbs) {
    return Warn(
        "disk speed",
        absl::StrCat(where.string(), ": ", text,
                     "; so slow that prefixes are rather computed again: put kv.disk.path on an SSD"));
  }
  return Ok("disk speed", absl::StrCat(where.string(), ": ", text));
}

}  // namespace

std::vector<Finding> DiagnoseMemory(const Config& config) {
  return {CheckMemlock(config), CheckHugePages(config.kv)};
}

std::vector<Finding> DiagnoseClock() {
  std::vector<Finding> out;
  // Deadlines and leases run on the monotonic clock; certificates and logs on the other.
  timespec last = Read(CLOCK_MONOTONIC);
  const timespec mono = last, real = Read(CLOCK_REALTIME);
  bool backwards = false;
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
  while (std::chrono::steady_clock::now() < until) {
    const timespec now = Read(CLOCK_MONOTONIC);
    backwards |= now.tv_sec < last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec);
    last = now;
  }
  const double passed = Seconds(Read(CLOCK_MONOTONIC)) - Seconds(mono);
  const double real_passed = Seconds(Read(CLOCK_REALTIME)) - Seconds(real);
  if (backwards) {
    out.push_back(
        Fail("clock", "CLOCK_MONOTONIC went backwards: no deadline can be trusted on this machine"));
  } else if (std::abs(real_passed - passed) > 0.01) {
    out.push_back(Warn("clock", absl::StrCat("the wall clock was stepped by ",
                                             static_cast<int>((real_passed - passed) * 1000),
                                             " ms while it was watched; let NTP slew it")));
  } else if (real.tv_sec < 1735689600) {  // 2025: this program is younger
    out.push_back(Fail("clock", "the wall clock is before 2025: certificates will not verify; set it"));
  } else {
    out.push_back(Ok("clock", "monotonic and wall clock run evenly"));
  }
  timex state{};
  const int rc = adjtimex(&state);
  if (rc < 0) {
    out.push_back(Warn("ntp", absl::StrCat("adjtimex: ", std::strerror(errno))));
  } else if (rc == TIME_ERROR || (state.status & STA_UNSYNC) != 0) {
    out.push_back(
        Warn("ntp", "the kernel holds its clock for unsynchronised; in a cluster run chrony or timesyncd"));
  } else {
    out.push_back(Ok("ntp", absl::StrCat("synchronised, error at most ", state.maxerror / 1000, " ms")));
  }
  return out;
}

Finding DiagnoseDisk(const KvConfig& kv) {
  if (kv.disk.path.empty()) return Ok("disk", "no disk tier (kv.disk.path is empty)");
  const fs::path where = Existing(kv.disk.path);
  struct statvfs space {};
  if (statvfs(where.c_str(), &space) != 0 || access(where.c_str(), W_OK | X_OK) != 0) {
    return Fail("disk", absl::StrCat("kv.disk.path ", where.string(), ": ", std::strerror(errno),
                                     "; give a directory that this user may write to"));
  }
  // What earlier runs allocated there is reused.
  uint64_t used = 0;
  std::error_code error;
  for (const auto& entry :
       fs::recursive_directory_iterator(kv.disk.path, fs::directory_options::skip_permission_denied, error)) {
    if (entry.is_regular_file(error)) used += entry.file_size(error);
  }
  const uint64_t room = uint64_t{space.f_bavail} * space.f_frsize + used;
  const std::string detail = absl::StrCat(where.string(), ": ", Mib(room), " free or ours, kv.disk.bytes is ",
                                          Mib(kv.disk.bytes), " for each worker");
  if (room < kv.disk.bytes) return Fail("disk", detail + "; lower kv.disk.bytes or make room");
  if (room < 2 * kv.disk.bytes) {
    return Warn("disk", detail + ", and `serve` has two: the second would have no disk tier");
  }
  return Ok("disk", detail);
}

Finding MeasureDisk(const KvConfig& kv) { return CheckDiskSpeed(Existing(kv.disk.path)); }

}  // namespace tidepool
