#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tidepool {

// ByteTrie: strings to values, for finding every one that a text begins with. Immutable once built. A node's
// children lie together, sorted by byte; the root's are found by table.
class ByteTrie {
 public:
  ByteTrie() { Build({}); }
  // Of two equal keys the last one counts.
  explicit ByteTrie(std::vector<std::pair<std::string, int32_t>> entries) { Build(std::move(entries)); }

  // Calls found(length, value) for every key that is a prefix of `text`, shortest first.
  template <typename Found>
  void Prefixes(std::string_view text, Found found) const {
    if (text.empty()) return;
    int32_t at = root_[static_cast<uint8_t>(text[0])];
    for (size_t length = 1; at >= 0; ++length) {
      const Node& node = nodes_[static_cast<size_t>(at)];
      if (node.value >= 0) found(length, node.value);
      if (length == text.size()) return;
      at = Child(node, static_cast<uint8_t>(text[length]));
    }
  }

 private:
  struct Node {
    uint32_t first = 0;  // its children's bytes begin here, and they are nodes_[first_child_ + i]
    uint32_t child = 0;
    uint16_t count = 0;
    int32_t value = -1;
  };
  void Build(std::vector<std::pair<std::string, int32_t>> entries);
  int32_t Child(const Node& node, uint8_t byte) const {
    const uint8_t* bytes = bytes_.data() + node.first;
    uint32_t low = 0, high = node.count;
    while (high - low > 8) {
      const uint32_t middle = (low + high) / 2;
      (bytes[middle] <= byte ? low : high) = middle;
    }
    for (; low < high; ++low) {
      if (bytes[low] == byte) return static_cast<int32_t>(node.child + low);
    }
    return -1;
  }

  std::vector<Node> nodes_;
  std::vector<uint8_t> bytes_;
  int32_t root_[256];
};

}  // namespace tidepool
