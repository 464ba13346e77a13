#include "server/model/text/byte_trie.h"

#include <algorithm>

namespace tidepool {

void ByteTrie::Build(std::vector<std::pair<std::string, int32_t>> entries) {
  std::stable_sort(entries.begin(), entries.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  // Breadth first: a node's children become neighbours, and no recursion follows a long key.
  struct Work {
    size_t begin, end, depth;
  };
  nodes_.assign(1, Node{});
  std::vector<Work> work{{0, entries.size(), 0}};
  for (size_t at = 0; at < work.size(); ++at) {
    auto [begin, end, depth] = work[at];
    for (; begin < end && entries[begin].first.size() == depth; ++begin) {
      if (depth > 0) nodes_[at].value = entries[begin].second;
    }
    nodes_[at].first = static_cast<uint32_t>(bytes_.size());
    nodes_[at].child = static_cast<uint32_t>(nodes_.size());
    while (begin < end) {
      const char byte = entries[begin].first[depth];
      size_t last = begin;
      while (last < end && entries[last].first[depth] == byte) ++last;
      bytes_.push_back(static_cast<uint8_t>(byte));
      ++nodes_[at].count;
      nodes_.emplace_back();
      work.push_back({begin, last, depth + 1});
      begin = last;
    }
  }
  std::fill(std::begin(root_), std::end(root_), -1);
  for (uint32_t i = 0; i < nodes_[0].count; ++i) {
    root_[bytes_[nodes_[0].first + i]] = static_cast<int32_t>(nodes_[0].child + i);
  }
}

}  // namespace tidepool
