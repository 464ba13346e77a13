#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>

namespace tidepool {

// DeficitRing: deficit round robin between flows of messages of unequal sizes (Shreedhar and Varghese, 1995).
// Core. Over any time in which two flows always have something to send, what they were served differs by
// less than a quantum and a largest message each, however large either one's backlog is. Flows are few
// (requests under way): a step costs at most their number times ceil(largest message / quantum).
template <typename Key>
class DeficitRing {
 public:
  explicit DeficitRing(uint64_t quantum) : quantum_(quantum) {}

  // A flow of its own from now on; it comes last.
  void Add(const Key& key) {
    if (deficit_.emplace(key, 0).second) order_.push_back(key);
  }
  void Remove(const Key& key) {
    if (deficit_.erase(key) == 0) return;
    if (!order_.empty() && order_.front() == key) granted_ = false;
    std::erase(order_, key);
  }
  bool empty() const { return order_.empty(); }
  size_t size() const { return order_.size(); }

  // Whose turn it is. `need(key)` is the size of the flow's next message, nullopt if it has none that may go
  // now: such a flow loses its turn and what it had saved. The same until Charge, Add or Remove, as long as
  // the needs stay. nullopt: nobody has a message.
  template <typename Need>
  std::optional<Key> Next(Need need) {
    size_t idle = 0;  // flows in a row without a message
    while (idle < order_.size()) {
      const Key& key = order_.front();
      uint64_t& deficit = deficit_.at(key);
      const std::optional<uint64_t> bytes = need(key);
      if (!bytes.has_value()) {
        deficit = 0;
        ++idle;
        Rotate();
        continue;
      }
      idle = 0;
      if (!granted_) {
        deficit += quantum_;
        granted_ = true;
      }
      if (deficit >= *bytes) return key;
      Rotate();
    }
    return std::nullopt;
  }

  // The flow that Next named has sent `bytes`.
  void Charge(const Key& key, uint64_t bytes) {
    uint64_t& deficit = deficit_.at(key);
    deficit -= bytes < deficit ? bytes : deficit;
  }

 private:
  void Rotate() {
    order_.push_back(order_.front());
    order_.pop_front();
    granted_ = false;
  }

  const uint64_t quantum_;
  std::map<Key, uint64_t> deficit_;
  std::deque<Key> order_;  // whose turn it is, first
  bool granted_ = false;   // the first one has had its quantum in this turn
};

}  // namespace tidepool
