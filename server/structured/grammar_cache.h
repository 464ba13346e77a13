#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "server/structured/compiled_grammar.h"

namespace tidepool {

// GrammarCache: compiled grammars by key, least recently used first out; `bytes_max` bounds their memory (one
// that is in use lives until its user lets go). Thread-safe. The gateway keeps those that it compiled, a
// worker those that it parsed.
class GrammarCache {
 public:
  using Grammar = std::shared_ptr<const CompiledGrammar>;

  explicit GrammarCache(size_t bytes_max) : bytes_max_(bytes_max) {}

  // SHA-256 over the length-prefixed parts: the tenant's salt, so that no tenant learns from the time that a
  // compilation takes what others compiled; and everything that the grammar is made from (for a worker:
  // CompiledGrammar::bytes()).
  static std::string Key(std::string_view salt, std::string_view source);

  // Null: absent.
  Grammar Find(const std::string& key);
  // Larger than bytes_max: not kept.
  void Put(const std::string& key, Grammar grammar);
  // Find, else make() and Put. `make` runs without the lock: two threads may make the same one, and one wins.
  // Errors are make's, and are not kept.
  absl::StatusOr<Grammar> FindOrMake(const std::string& key,
                                     const std::function<absl::StatusOr<Grammar>()>& make);

  struct Stats {
    uint64_t hits = 0, misses = 0, evictions = 0;
    size_t bytes = 0, entries = 0;
  };
  Stats stats() const;

 private:
  struct Entry {
    std::string key;
    Grammar grammar;
    size_t bytes;
  };
  using List = std::list<Entry>;

  const size_t bytes_max_;
  mutable std::mutex mu_;
  List entries_;  // the most recently used first
  absl::flat_hash_map<std::string, List::iterator> index_;
  Stats stats_;
};

}  // namespace tidepool
