#pragma once

#include <cstdint>
#include <queue>
#include <vector>

#include "tools/simulate/workload.h"

namespace tidepool {

// Links: transfers between nodes that have one link each, full duplex. A transfer runs at the smaller of its
// sender's rate over what it sends and its receiver's over what it receives (so a share that another end
// cannot use is lost: a little slower than max-min fairness, and a change touches two nodes only). Core.
class Links {
 public:
  Links(size_t nodes, double bytes_per_second);

  // `id` comes out of Pop when the last byte has left; until then it is the caller's name of the transfer,
  // unique among those running.
  void Start(uint64_t id, uint32_t from, uint32_t to, double bytes, SimTime now);
  // Of all transfers from or to the node, which end unfinished. Appended to `ids`, in the order of starting.
  void Cut(uint32_t node, SimTime now, std::vector<uint64_t>& ids);

  static constexpr SimTime kNever = INT64_MAX;
  // When the next transfer ends.
  SimTime next();
  // The transfer that ends at next().
  uint64_t Pop();
  size_t running() const { return running_; }

 private:
  struct Flow {
    uint64_t id = 0;
    uint64_t serial = 0;
    uint32_t from = 0, to = 0;
    double left = 0, rate = 0;
    SimTime at = 0;  // `left` is of then
    uint32_t version = 0;
    bool used = false;
  };
  struct Ending {
    SimTime at;
    uint64_t serial;
    uint32_t slot, version;
    bool operator>(const Ending& o) const { return at != o.at ? at > o.at : serial > o.serial; }
  };

  void Detach(uint32_t slot);
  void Share(uint32_t from, uint32_t to, SimTime now);
  void Update(uint32_t slot, SimTime now);
  void DropStale();

  const double rate_;
  std::vector<Flow> flows_;
  std::vector<uint32_t> free_;
  std::vector<std::vector<uint32_t>> out_, in_;  // slots by node
  std::priority_queue<Ending, std::vector<Ending>, std::greater<>> endings_;
  uint64_t serials_ = 0;
  size_t running_ = 0;
};

}  // namespace tidepool
