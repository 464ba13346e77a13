#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "scheduler/types.h"

namespace tidepool {

// RankTree: workers in order of a value that changes all the time: a tournament tree over their dense
// indices. A change costs log2(workers) comparisons and no allocation; the k first cost about k *
// log2(workers). Not thread-safe.
class RankTree {
 public:
  struct Key {
    double value = std::numeric_limits<double>::infinity();  // lower is better; infinite: not there
    uint64_t load = 0;                                       // breaks ties,
    uint64_t name = 0;                                       // and then this

    bool operator==(const Key&) const = default;
    bool operator<(const Key& o) const {
      if (value != o.value) return value < o.value;
      return load != o.load ? load < o.load : name < o.name;
    }
  };

  void Set(WorkerIndex i, const Key& key) {
    if (i >= leaves_) Grow(i);
    if (keys_[i] == key) return;
    keys_[i] = key;
    for (size_t node = (leaves_ + i) / 2; node >= 1; node /= 2) {
      const WorkerIndex a = Best(2 * node), b = Best(2 * node + 1);
      best_[node] = keys_[b] < keys_[a] ? b : a;
    }
  }
  void Remove(WorkerIndex i) {
    if (i < leaves_) Set(i, {});
  }

  // Calls visit(worker) for the best, the next best and so on until it returns false or none is left.
  template <typename Visit>
  void Walk(const Visit& visit) const {
    if (leaves_ == 0) return;
    absl::InlinedVector<size_t, 64> open = {1};  // subtrees whose best has not been visited
    while (!open.empty()) {
      size_t at = 0;
      for (size_t k = 1; k < open.size(); ++k) {
        if (keys_[Best(open[k])] < keys_[Best(open[at])]) at = k;
      }
      size_t node = open[at];
      open[at] = open.back();
      open.pop_back();
      const WorkerIndex best = Best(node);
      if (keys_[best].value == std::numeric_limits<double>::infinity() || !visit(best)) return;
      // What remains of that subtree: the siblings along the way down.
      while (node < leaves_) {
        const size_t down = Best(2 * node) == best ? 2 * node : 2 * node + 1;
        open.push_back(down ^ 1);
        node = down;
      }
    }
  }

 private:
  WorkerIndex Best(size_t node) const {
    return node >= leaves_ ? static_cast<WorkerIndex>(node - leaves_) : best_[node];
  }
  void Grow(WorkerIndex i) {
    std::vector<Key> keys = std::move(keys_);
    leaves_ = std::bit_ceil(std::max<size_t>(i + 1, 2));
    keys_.assign(leaves_, {});
    best_.assign(leaves_, 0);
    for (size_t node = leaves_ - 1; node >= 1; --node) best_[node] = Best(2 * node);
    for (size_t k = 0; k < keys.size(); ++k) {
      if (keys[k].value != std::numeric_limits<double>::infinity()) Set(static_cast<WorkerIndex>(k), keys[k]);
    }
  }

  size_t leaves_ = 0;  // a power of two; nodes 1 .. leaves_ - 1 are inner ones, the rest the workers
  std::vector<Key> keys_;
  std::vector<WorkerIndex> best_;
};

}  // namespace tidepool
