#pragma once

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "base/status.h"

namespace tidepool {

// Rank: where an entry stands among candidates; the lowest goes first.
struct Rank {
  uint64_t major = 0;
  uint64_t minor = 0;
  auto operator<=>(const Rank&) const = default;
};

// Candidates: ids in several binary heaps ("lanes"), each id in at most one of them. Leaving a lane is O(1):
// the node stays behind and is dropped when it comes up (or when stale nodes outnumber the live ones).
class Candidates {
 public:
  explicit Candidates(uint32_t capacity) : places_(capacity) {}

  struct Top {
    uint32_t id;
    Rank rank;
  };

  bool contains(uint32_t id) const { return places_[id].lane != kNowhere; }
  uint32_t lane(uint32_t id) const { return places_[id].lane; }
  // How many lanes there are; one that was never used is empty.
  uint32_t lanes() const { return static_cast<uint32_t>(lanes_.size()); }

  void Set(uint32_t id, uint32_t lane, Rank rank) {
    Clear(id);
    if (lane >= lanes_.size()) lanes_.resize(lane + 1);
    places_[id].lane = lane;
    Lane& l = lanes_[lane];
    ++l.live;
    l.heap.push_back({rank, id, places_[id].version});
    std::push_heap(l.heap.begin(), l.heap.end(), Later);
  }

  void Clear(uint32_t id) {
    Place& place = places_[id];
    if (place.lane == kNowhere) return;
    Lane& l = lanes_[place.lane];
    place.lane = kNowhere;
    ++place.version;
    --l.live;
    if (l.heap.size() > 64 + 2 * l.live) {
      std::erase_if(l.heap, [&](const Node& n) { return Stale(n); });
      std::make_heap(l.heap.begin(), l.heap.end(), Later);
    }
  }

  // The lowest of a lane, with the rank it was set at.
  std::optional<Top> Lowest(uint32_t lane) {
    if (lane >= lanes_.size()) return std::nullopt;
    std::vector<Node>& heap = lanes_[lane].heap;
    while (!heap.empty() && Stale(heap.front())) {
      std::pop_heap(heap.begin(), heap.end(), Later);
      heap.pop_back();
    }
    if (heap.empty()) return std::nullopt;
    return Top{heap.front().id, heap.front().rank};
  }

 private:
  static constexpr uint32_t kNowhere = ~0u;
  struct Place {
    uint32_t lane = kNowhere;
    uint32_t version = 0;  // of its membership: a node with another one is stale
  };
  struct Node {
    Rank rank;
    uint32_t id;
    uint32_t version;
  };
  struct Lane {
    std::vector<Node> heap;
    size_t live = 0;
  };

  static bool Later(const Node& a, const Node& b) { return a.rank > b.rank; }
  bool Stale(const Node& n) const { return places_[n.id].version != n.version; }

  std::vector<Place> places_;
  std::vector<Lane> lanes_;
};

}  // namespace tidepool
