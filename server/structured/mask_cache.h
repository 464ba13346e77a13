#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace tidepool {

namespace structured {
struct TokenClass;  // token_class.h
}  // namespace structured

// MaskCache: what matchers of one worker computed and may need again: token masks by automaton state, and how
// the vocabulary falls into classes at a state of a finite automaton. Least recently used goes first;
// `bytes_max` bounds the memory of what it holds (an entry that is in use by a matcher lives until that lets
// go). Thread-safe. For one TokenTable only. Keys carry the matcher's scope, so that one tenant's grammars do
// not speed up another's.
class MaskCache {
 public:
  explicit MaskCache(size_t bytes_max);
  ~MaskCache();

  struct Stats {
    uint64_t hits = 0, misses = 0, evictions = 0;
    size_t bytes = 0, entries = 0;
  };
  Stats stats() const;

  // The matcher's business. Keys are 128-bit digests over (scope, what the value stands for).
  using Key = std::pair<uint64_t, uint64_t>;
  using Mask = std::shared_ptr<const std::vector<uint32_t>>;
  using Class = std::shared_ptr<const structured::TokenClass>;
  Mask FindMask(const Key& key);
  void PutMask(const Key& key, Mask mask);
  Class FindClass(const Key& key);
  void PutClass(const Key& key, Class value, size_t bytes);

 private:
  struct Entry {
    Key key;
    Mask mask;  // one of the two
    Class token_class;
    size_t bytes;
  };
  using List = std::list<Entry>;

  // Null where absent; else moved to the front.
  Entry* Find(const Key& key);
  void Put(Entry entry);

  const size_t bytes_max_;
  mutable std::mutex mu_;
  List entries_;  // the most recently used first
  absl::flat_hash_map<Key, List::iterator> index_;
  Stats stats_;
};

}  // namespace tidepool
