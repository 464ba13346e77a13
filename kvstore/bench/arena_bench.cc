#include "kvstore/bench/arena_bench.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/status.h"
#include "kvstore/fetch_node.h"
#include "transport/inproc_transport.h"

namespace tidepool {
namespace {

constexpr size_t kCounts[] = {1, 10, 100, 1000};
constexpr BlockLayout kLayout{.layers = 4, .kv_heads = 2, .head_dim = 32, .block_tokens = 32};
// Longer than both nodes go on looking for work before they sleep.
constexpr absl::Duration kIdle = absl::Milliseconds(2);

absl::Time Now() { return Clock::Real().Now(); }
double MicrosSince(absl::Time start) { return absl::ToDoubleMicroseconds(Now() - start); }

// A node of one of the two processes; blocks travel by the shared arena or not at all.
struct Node {
  static absl::StatusOr<std::unique_ptr<Node>> Make(const char* name, uint32_t slots) {
    auto out = std::make_unique<Node>();
    TP_ASSIGN_OR_RETURN(out->pool,
                        BlockPool::Create({.layout = kLayout, .slots = slots, .metrics = &out->metrics}));
    TP_ASSIGN_OR_RETURN(out->node, FetchNode::Start({.worker_id = name,
                                                     .boot_id = name,
                                                     .fingerprint = "f",
                                                     .pool = out->pool.get(),
                                                     .transport = out->network.NewTransport(),
                                                     .metrics = &out->metrics}));
    return out;
  }
  MetricRegistry metrics;
  InprocNetwork network;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<FetchNode> node;
};

// Pipes to a forked process and back.
class Child {
 public:
  // `run(in, out)` is the child's life; what it returns is its exit code.
  static absl::StatusOr<std::unique_ptr<Child>> Fork(const std::function<int(int in, int out)>& run) {
    int there[2], back[2];
    if (pipe(there) != 0 || pipe(back) != 0) return absl::UnavailableError("no pipe to a second process");
    const pid_t pid = fork();
    if (pid < 0) return absl::UnavailableError("no second process");
    if (pid == 0) {
      close(there[1]);
      close(back[0]);
      _exit(run(there[0], back[1]));
    }
    close(there[0]);
    close(back[1]);
    return std::unique_ptr<Child>(new Child(pid, back[0], there[1]));
  }
  ~Child() {
    close(out_);
    close(in_);
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }

  absl::Status Read(void* p, size_t n) const {
    return read(in_, p, n) == static_cast<ssize_t>(n) ? absl::OkStatus()
                                                      : absl::UnavailableError("the second process is gone");
  }
  absl::Status Write(const void* p, size_t n) const {
    return write(out_, p, n) == static_cast<ssize_t>(n)
               ? absl::OkStatus()
               : absl::UnavailableError("the second process is gone");
  }

 private:
  Child(pid_t pid, int in, int out) : pid_(pid), in_(in), out_(out) {}
  const pid_t pid_;
  const int in_, out_;
};

std::string RequestName(size_t blocks, int round) { return absl::StrCat(blocks, "-", round); }

BlockKey KeyOf(size_t blocks, int round, size_t i) {
  BlockKey key;
  const uint64_t words[] = {blocks, static_cast<uint64_t>(round), i};
  std::memcpy(key.bytes.data(), words, sizeof words);
  return key;
}

// Offers the blocks of each round, then sleeps until the reader is done with them.
int Own(int rounds, int in, int out) {
  const auto node = Node::Make("owner", 16384);
  if (!node.ok()) return 1;
  Node& n = **node;
  char address[256] = {};
  n.node->arena_address().copy(address, sizeof address - 1);
  if (write(out, address, sizeof address) != sizeof address) return 1;
  for (int round = 0; round <= rounds; ++round) {
    for (const size_t blocks : kCounts) {
      auto slots = n.pool->Reserve(blocks);
      if (!slots.ok()) return 1;
      for (size_t i = 0; i < blocks; ++i)
        n.node->Offer(RequestName(blocks, round), KeyOf(blocks, round, i), std::move((*slots)[i]));
      char c = 'g';
      if (write(out, &c, 1) != 1 || read(in, &c, 1) != 1) return 1;
    }
  }
  return 0;
}

struct Took {
  double handoff_us, release_us;
};

absl::StatusOr<Took> Take(Node& n, const PeerAddress& owner, size_t blocks, int round,
                          absl::Duration timeout) {
  FetchSpec spec;
  spec.request_id = RequestName(blocks, round);
  spec.peer = owner;
  spec.in_place = true;
  spec.deadline = Now() + timeout;
  for (size_t i = 0; i < blocks; ++i) spec.keys.push_back(KeyOf(blocks, round, i));
  TP_ASSIGN_OR_RETURN(spec.slots, n.pool->Reserve(blocks));
  absl::SleepFor(kIdle);
  FetchResult got;
  double micros = 0;
  std::atomic<bool> done{false};
  const absl::Time start = Now();
  n.node->Fetch(std::move(spec), [&](FetchResult result) {
    micros = MicrosSince(start);
    got = std::move(result);
    done.store(true);
    done.notify_one();
  });
  done.wait(false);
  TP_RETURN_IF_ERROR(got.status);
  if (got.in_place.size() != blocks) return absl::InternalError("a block was not handed over in place");
  const absl::Time release = Now();
  got.in_place = BlockRun();
  n.node->SendRelease(owner, RequestName(blocks, round));
  return Took{micros, MicrosSince(release)};
}

absl::StatusOr<std::vector<double>> WakeUps(int rounds) {
  TP_ASSIGN_OR_RETURN(const auto child, Child::Fork([](int in, int out) {
                        char c;
                        while (read(in, &c, 1) == 1 && write(out, &c, 1) == 1) {
                        }
                        return 0;
                      }));
  std::vector<double> micros;
  for (int i = 0; i < rounds; ++i) {
    absl::SleepFor(kIdle);
    char c = 'x';
    const absl::Time start = Now();
    TP_RETURN_IF_ERROR(child->Write(&c, 1));
    TP_RETURN_IF_ERROR(child->Read(&c, 1));
    micros.push_back(MicrosSince(start));
  }
  return micros;
}

}  // namespace

absl::StatusOr<std::vector<BenchRow>> RunArenaBench(const ArenaBenchOptions& options) {
  TP_ASSIGN_OR_RETURN(const std::vector<double> wake, WakeUps(options.rounds));
  TP_ASSIGN_OR_RETURN(const auto owner,
                      Child::Fork([&](int in, int out) { return Own(options.rounds, in, out); }));
  char address[256] = {};
  TP_RETURN_IF_ERROR(owner->Read(address, sizeof address));
  const PeerAddress peer{.worker_id = "owner", .boot_id = "owner", .transport = "", .arena = address};
  TP_ASSIGN_OR_RETURN(const auto reader, Node::Make("reader", 4096));
  std::array<std::vector<double>, std::size(kCounts)> handoff, release;
  // By turns, as the machine is not the same from one second to the next.
  for (int round = 0; round <= options.rounds; ++round) {
    for (size_t k = 0; k < std::size(kCounts); ++k) {
      char c = 0;
      TP_RETURN_IF_ERROR(owner->Read(&c, 1));
      TP_ASSIGN_OR_RETURN(const Took took, Take(*reader, peer, kCounts[k], round, options.timeout));
      TP_RETURN_IF_ERROR(owner->Write(&c, 1));
      if (round == 0) continue;  // the first connects
      handoff[k].push_back(took.handoff_us);
      release[k].push_back(took.release_us);
    }
  }
  std::vector<BenchRow> rows;
  const double woken = MedianOf(wake);
  const auto add = [&](std::string name, const std::vector<double>& us) {
    const double median = MedianOf(us);
    rows.push_back(
        {std::move(name), median, "us", "waking a process and being woken", woken, median / woken});
  };
  for (size_t k = 0; k < std::size(kCounts); ++k)
    add(absl::StrCat("handoff of ", kCounts[k], " blocks in place"), handoff[k]);
  for (size_t k = 0; k < std::size(kCounts); ++k)
    add(absl::StrCat("letting go of ", kCounts[k], " blocks"), release[k]);
  return rows;
}

}  // namespace tidepool
