// A process for arena_process_test: owner or reader of an arena, told what to do line by line, and killed.
//   arena_peer reader ADDRESS | owner
//   take REQ FIRST N   (reader) takes blocks in place, says "ok N" with how many of them read as they should
//   check              says "ok N": how many of all that are held still do
//   drop               lets go of everything
//   wait REQ FIRST N   takes without waiting for the answer
//   done REQ           its offers may go
//   offer REQ FIRST N  (owner)
//   held               (owner) says "ok N": how many blocks it holds for its readers
#include <cstdio>
#include <iostream>
#include <sstream>

#include "tests/kvstore/arena_test_util.h"

namespace tidepool {
namespace {

struct Blocks {
  BlockRun run;
  uint64_t seed;  // of the first
};

size_t Good(const Blocks& blocks) {
  size_t good = 0;
  for (size_t i = 0; i < blocks.run.size(); ++i) good += Holds(blocks.run.data(i), blocks.seed + i);
  return good;
}

void Read(const std::string& address) {
  MetricRegistry metrics;
  auto client = MakeArenaClient(&metrics);
  const ArenaClient::Peer peer{address, "boot"};
  std::vector<Blocks> held;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    std::string what, request;
    uint64_t first = 0;
    size_t n = 0;
    in >> what >> request >> first >> n;
    if (what == "take") {
      std::optional<ArenaClient::Taken> taken = client->TryTake(peer, request, TestKeys(first, n));
      if (!taken) taken = TakeNow(*client, peer, request, first, n);
      held.push_back({std::move(taken->blocks), first});
      std::cout << "ok " << Good(held.back()) << std::endl;
    } else if (what == "wait") {
      client->Take(peer, request, 1, TestKeys(first, n), Clock::Real().Now() + absl::Seconds(60),
                   [](ArenaClient::Taken) {});
      std::cout << "ok 0" << std::endl;
    } else if (what == "check") {
      size_t good = 0;
      for (const Blocks& blocks : held) good += Good(blocks);
      std::cout << "ok " << good << std::endl;
    } else if (what == "drop") {
      held.clear();
      std::cout << "ok 0" << std::endl;
    } else if (what == "done") {
      std::cout << "ok " << client->Done(peer, request) << std::endl;
    }
  }
}

void Own() {
  ArenaOwner owner;
  std::cout << owner.peer().arena << std::endl;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    std::string what, request;
    uint64_t first = 0;
    size_t n = 0;
    in >> what >> request >> first >> n;
    if (what == "offer") owner.Offer(request, first, n);
    if (what == "publish") owner.Publish(first, n);
    if (what == "grow") owner.Offer(request, first, n, 1);
    std::cout << "ok " << (what == "held" ? owner.server->held_blocks() : 0) << std::endl;
  }
}

}  // namespace
}  // namespace tidepool

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "reader") {
    tidepool::Read(argv[2]);
  } else {
    tidepool::Own();
  }
}
