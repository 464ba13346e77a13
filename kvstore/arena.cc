#include "kvstore/arena.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <optional>
#include <system_error>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/log.h"
#include "base/shared_memory.h"
#include "base/status.h"
#include "kvstore/huge_pages.h"

namespace tidepool {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kPage = 4096;
// What the kernel takes in one bit mask of nodes here.
constexpr uint32_t kMaxNodes = 1024;
constexpr const char* kHugePool = "/sys/kernel/mm/hugepages/hugepages-2048kB/";

std::string Errno() { return std::generic_category().message(errno); }

std::string Line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

uint64_t Number(const std::string& path) {
  uint64_t n = 0;
  return absl::SimpleAtoi(Line(path), &n) ? n : 0;
}

// "0-3,8" as the kernel lists CPUs and nodes.
std::vector<uint32_t> List(const std::string& text) {
  std::vector<uint32_t> out;
  for (absl::string_view range : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    const std::vector<std::string> ends = absl::StrSplit(range, '-');
    uint32_t first = 0, last = 0;
    if (!absl::SimpleAtoi(ends.front(), &first) || !absl::SimpleAtoi(ends.back(), &last)) continue;
    for (uint32_t n = first; n <= last && n < 1 << 16; ++n) out.push_back(n);
  }
  return out;
}

std::vector<uint32_t> Nodes() { return List(Line("/sys/devices/system/node/online")); }

std::vector<uint32_t> NodesOfThisProcess(const std::vector<uint32_t>& nodes) {
  std::vector<uint32_t> out;
  cpu_set_t mine;
  CPU_ZERO(&mine);
  if (sched_getaffinity(0, sizeof mine, &mine) != 0) return nodes;
  for (uint32_t node : nodes) {
    const auto cpus = List(Line(absl::StrCat("/sys/devices/system/node/node", node, "/cpulist")));
    if (std::any_of(cpus.begin(), cpus.end(),
                    [&](uint32_t c) { return c < CPU_SETSIZE && CPU_ISSET(c, &mine); }))
      out.push_back(node);
  }
  return out;
}

absl::Status BadOption(std::string_view field, std::string_view value, std::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat("host tier: kv.", std::string(field), " is '",
                                                 std::string(value), "'; it may be ", std::string(allowed)));
}

struct NumaPolicy {
  int mode = MPOL_DEFAULT;
  std::vector<uint32_t> nodes;
};

absl::StatusOr<NumaPolicy> NumaPolicyOf(const std::string& option) {
  uint32_t node = 0;
  const bool numbered = absl::SimpleAtoi(option, &node);
  if (!numbered && option != "auto" && option != "interleave") {
    return BadOption("numa_node", option, "auto, interleave or the number of a node");
  }
  const std::vector<uint32_t> all = Nodes();
  if (numbered && !all.empty() && std::find(all.begin(), all.end(), node) == all.end()) {
    return BadOption("numa_node", option,
                     absl::StrCat("one of this machine's nodes: ", Line("/sys/devices/system/node/online")));
  }
  if (all.size() < 2 || all.back() >= kMaxNodes) return NumaPolicy{};
  if (numbered) return NumaPolicy{MPOL_PREFERRED, {node}};
  if (option == "interleave") return NumaPolicy{MPOL_INTERLEAVE, all};
  std::vector<uint32_t> mine = NodesOfThisProcess(all);
  if (mine.size() == 1) return NumaPolicy{MPOL_PREFERRED, mine};
  return NumaPolicy{MPOL_INTERLEAVE, mine.empty() ? all : mine};
}

void Apply(const NumaPolicy& policy, void* base, size_t bytes) {
  if (policy.mode == MPOL_DEFAULT) return;
  unsigned long mask[kMaxNodes / (8 * sizeof(unsigned long))] = {};
  for (uint32_t n : policy.nodes) mask[n / (8 * sizeof *mask)] |= 1ul << n % (8 * sizeof *mask);
  if (syscall(SYS_mbind, base, bytes, policy.mode, mask, kMaxNodes, 0) != 0)
    spdlog::warn("host tier: no NUMA policy: mbind: {}", Errno());
}

struct Memory {
  void* base = MAP_FAILED;
  size_t bytes = 0;
  int fd = -1;
  std::string_view pages = "4 KiB";
  bool reserved_huge = false;
  bool ask_for_huge = false;
};

// Whether the kernel gives huge pages to shared memory that asks by madvise: it answers yes also where not.
bool TransparentForShared() {
  const std::string choice = Line("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  return !choice.empty() && !absl::StrContains(choice, "[never]") && !absl::StrContains(choice, "[deny]");
}

// Memory that other processes can be given to read.
absl::StatusOr<Memory> MapShared(size_t bytes, bool huge) {
  if (huge) bytes = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  TP_ASSIGN_OR_RETURN(auto shared, SharedMemory::Create("tidepool-kv", bytes, /*peer_writes=*/false, huge));
  return Memory{.base = shared.first.Release(),
                .bytes = bytes,
                .fd = shared.second.Release(),
                .pages = huge ? "2 MiB, reserved" : "4 KiB",
                .reserved_huge = huge};
}

bool EnoughReserved(size_t bytes) {
  const std::string pool = kHugePool;
  const uint64_t free = Number(pool + "free_hugepages"), promised = Number(pool + "resv_hugepages");
  return free > promised && (free - promised) >= (bytes + kHugePageBytes - 1) / kHugePageBytes;
}

absl::StatusOr<Memory> Allocate(size_t bytes, const std::string& huge_pages) {
  if (huge_pages != "on" && huge_pages != "off" && huge_pages != "auto")
    return BadOption("huge_pages", huge_pages, "auto, on or off");
  if (huge_pages == "on" || (huge_pages == "auto" && EnoughReserved(bytes))) {
    absl::StatusOr<Memory> m = MapShared(bytes, /*huge=*/true);
    if (m.ok()) return m;
    if (huge_pages == "on") {
      return absl::ResourceExhaustedError(absl::StrCat(
          "host tier: kv.huge_pages is on, but ", bytes, " bytes of reserved huge pages cannot be had (",
          m.status().message(), "); write at least ", (bytes + kHugePageBytes - 1) / kHugePageBytes, " to ",
          kHugePool, "nr_hugepages, or set kv.huge_pages: auto"));
    }
  }
  absl::StatusOr<Memory> shared = MapShared(bytes, /*huge=*/false);
  Memory m;
  if (shared.ok()) {
    m = *shared;
  } else {
    m.bytes = bytes;
    m.base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m.base == MAP_FAILED) {
      return absl::ResourceExhaustedError(absl::StrCat("cannot map ", bytes, " bytes: ", Errno()));
    }
    spdlog::warn("host tier: anonymous memory, which processes of this host cannot share: {}",
                 std::string(shared.status().message()));
  }
  if (huge_pages == "auto") {
    // Kernels that have none for this kind of memory answer EINVAL, and 4 KiB pages work as well.
    const bool advised = madvise(m.base, m.bytes, MADV_HUGEPAGE) == 0;
    if (advised && (m.fd < 0 || TransparentForShared())) m.pages = "transparent";
    m.ask_for_huge = advised && m.fd >= 0 && m.bytes >= kHugePageBytes;
  } else {
    madvise(m.base, m.bytes, MADV_NOHUGEPAGE);
  }
  return m;
}

}  // namespace

absl::StatusOr<SlotArena> SlotArena::Map(size_t slot_bytes, uint32_t slots, const ArenaOptions& options) {
  const auto too_big = [&](std::string_view why) {
    return absl::ResourceExhaustedError(absl::StrCat("host tier: cannot map ", slots, " slots of ",
                                                     slot_bytes, " bytes: ", std::string(why),
                                                     "; lower kv.host_bytes"));
  };
  const size_t align = slot_bytes >= kPage ? kPage : kCacheLine;
  SlotArena arena;
  arena.slot_bytes_ = slot_bytes;
  size_t bytes = 0;
  if (__builtin_add_overflow(slot_bytes, align - 1, &arena.stride_)) return too_big("overflow");
  arena.stride_ = arena.stride_ / align * align;
  if (__builtin_mul_overflow(arena.stride_, size_t{slots}, &bytes)) return too_big("overflow");
  if (bytes > size_t{1} << 62) return too_big("overflow");
  TP_ASSIGN_OR_RETURN(const NumaPolicy policy, NumaPolicyOf(options.numa_node));

  absl::StatusOr<Memory> memory = Allocate(bytes, options.huge_pages);
  if (!memory.ok()) {
    const absl::Status status = options.huge_pages == "on" || absl::IsInvalidArgument(memory.status())
                                    ? memory.status()
                                    : too_big(std::string(memory.status().message()));
    spdlog::error("{}", status.ToString());
    return status;
  }
  arena.base_ = static_cast<std::byte*>(memory->base);
  arena.bytes_ = memory->bytes;
  arena.fd_ = memory->fd;
  arena.pages_ = memory->pages;
  arena.reserved_huge_ = memory->reserved_huge;
  arena.ask_for_huge_ = memory->ask_for_huge;
  Apply(policy, memory->base, memory->bytes);
  madvise(memory->base, memory->bytes, MADV_DONTDUMP);  // a core file of it all would help nobody
  // On fault: what is not used yet stays uncommitted.
  if (options.lock_memory && syscall(SYS_mlock2, memory->base, memory->bytes, MLOCK_ONFAULT) != 0) {
    spdlog::warn("host tier: kv.lock_memory: mlock2 of {} bytes: {}; raise the limit of locked memory", bytes,
                 Errno());
  }
  spdlog::debug("host tier: {} bytes, {} pages", arena.bytes_, arena.pages_);
  return arena;
}

SlotArena::SlotArena(SlotArena&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)),
      bytes_(other.bytes_),
      stride_(other.stride_),
      slot_bytes_(other.slot_bytes_),
      fd_(std::exchange(other.fd_, -1)),
      pages_(other.pages_),
      reserved_huge_(other.reserved_huge_),
      ask_for_huge_(std::exchange(other.ask_for_huge_, false)) {}

SlotArena::~SlotArena() {
  if (base_ != nullptr && munmap(base_, bytes_) != 0) spdlog::error("host tier: munmap: {}", Errno());
  if (fd_ >= 0) close(fd_);
}

}  // namespace tidepool
