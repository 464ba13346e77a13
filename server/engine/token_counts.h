#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace tidepool {

// TokenCounts: the tokens that a sequence has seen, each once, for the penalties: a step costs what is in
// there, not what is in the vocabulary. Owned by one thread.
class TokenCounts {
 public:
  struct Entry {
    int32_t id;
    uint32_t outputs;  // times in the answer; 0: in the prompt only
  };

  // Room for `prompt` and `outputs_max` more tokens: AddOutput allocates nothing.
  TokenCounts(std::span<const int32_t> prompt, size_t outputs_max) {
    entries_.reserve(prompt.size() + outputs_max);
    places_.reserve(prompt.size() + outputs_max);
    for (int32_t id : prompt) Place(id);
  }

  void AddOutput(int32_t id) { ++Place(id).outputs; }
  // In the order of first appearance.
  std::span<const Entry> entries() const { return entries_; }

 private:
  Entry& Place(int32_t id) {
    const auto [it, added] = places_.try_emplace(id, static_cast<uint32_t>(entries_.size()));
    if (added) entries_.push_back({id, 0});
    return entries_[it->second];
  }

  std::vector<Entry> entries_;
  absl::flat_hash_map<int32_t, uint32_t> places_;  // index in entries_
};

}  // namespace tidepool
