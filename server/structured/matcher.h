#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "server/structured/compiled_grammar.h"
#include "server/structured/mask_cache.h"
#include "server/structured/token_table.h"

namespace tidepool {

// Matcher: where one sequence stands in its grammar (Core). Knows nothing of stop tokens: the engine allows
// them where CanEnd() and ends the sequence where MustEnd(). Single-threaded, may be handed from thread to
// thread; movable. Memory: kBytesMax of what it remembers plus the nesting of its position.
//
// After each accepted token one of these holds: MustEnd(); or FillMask gives at least one token, provided
// that the vocabulary can spell what comes next (TokenTable::covers_all_bytes is sufficient); no sequence of
// accepted tokens leads into a dead end.
class Matcher {
 public:
  static constexpr size_t kBytesMax = size_t{4} << 20;
  // Configurations looked at for one mask (or for the beginning): some tens of milliseconds. (A walk of the
  // whole vocabulary inside one pattern takes some 300,000 at 150k tokens.)
  static constexpr uint64_t kStepsMax = 1'000'000;
  // The same for one accepted token, which a whole batch waits for: a millisecond or two.
  static constexpr uint64_t kAcceptStepsMax = 50'000;

  // `cache` may be null; else it belongs to `table` and outlives this. `scope` separates what this matcher
  // puts into and takes from the cache: the tenant's salt.
  Matcher(std::shared_ptr<const CompiledGrammar> grammar, std::shared_ptr<const TokenTable> table,
          MaskCache* cache, std::string_view scope);
  ~Matcher();
  Matcher(Matcher&&) noexcept;
  Matcher& operator=(Matcher&&) noexcept;

  // ResourceExhausted where the grammar's beginning is too ambiguous already: FillMask and Accept give that,
  // too, and nothing else.
  absl::Status status() const;

  // Overwrites `bits` (table.mask_words() words): bit `id % 32` of word `id / 32` is set if and only if
  // Accept(id) would succeed (but for the limit of its own). All zero where MustEnd(). Errors:
  // ResourceExhausted where it takes more than kStepsMax steps; FailedPrecondition where the output cannot
  // end here and no token of the vocabulary can follow (`bits` is all zero then): the sequence cannot go on.
  absl::Status FillMask(std::span<uint32_t> bits);

  // Moves on by one token. Errors: InvalidArgument where the grammar does not allow it, ResourceExhausted
  // beyond kAcceptStepsMax; nothing changes then.
  absl::Status Accept(int32_t token);
  // Whether Accept would succeed; cheaper than a mask.
  bool Allows(int32_t token);

  // The same by bytes (tests; text that is not tokenised): all or nothing.
  absl::Status AcceptBytes(std::string_view bytes);

  // Whether what was accepted so far matches the grammar as a whole.
  bool CanEnd() const;
  // Whether it matches and nothing can follow.
  bool MustEnd() const;

  // Puts into the cache what all grammars with JSON strings need, so that no request waits for it (some
  // milliseconds). `cache` is `table`'s.
  static void Warm(const TokenTable& table, MaskCache& cache);

  // Back to the beginning.
  void Reset();

  // What FillMask did, for metrics and the benchmark.
  struct Stats {
    uint64_t masks = 0;
    uint64_t cached = 0;      // taken from the cache as a whole
    uint64_t trie_nodes = 0;  // looked at in all others
    uint64_t classes = 0;     // token classes computed (the expensive kind of cold state)
    uint64_t arena_resets = 0;
  };
  const Stats& stats() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidepool
