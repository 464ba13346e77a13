#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/structured/automaton.h"
#include "server/structured/token_table.h"

namespace tidepool::structured {

// TokenClass: how a vocabulary falls apart at one state of a terminal, whatever stands round the terminal.
// Immutable. A token is *inside* where the terminal takes all of its bytes, an *exit* where it takes a part
// that may end it and not the rest: whether that may follow is for the grammar to say, so exits are kept as a
// trie of their rests. All others are out.
struct TokenClass {
  // Tokens beyond this many rests of exits: not worth keeping; the matcher then walks the vocabulary.
  static constexpr size_t kExitsMax = 200'000;
  bool usable = true;

  // An *overlay* is told by how it differs from another state's class (`reference` in Terminal): the inside
  // is base's, less `clear`, and `set`; base's exits count except for tokens in `clear`.
  std::shared_ptr<const TokenClass> base;
  std::vector<int32_t> clear, set;

  std::vector<uint32_t> inside;  // bits by token id; empty for an overlay

  struct Exit {
    int32_t token;
    uint32_t units;  // of a counted terminal, before the rest
  };
  std::vector<TokenTable::TrieNode> exit_trie;  // over the rests; leaves in the order of `exits`
  std::vector<Exit> exits;

  // Counted terminals: the inside by how many units a token begins. few[k]: bits of those with at most k
  // units, for k < kFew; by_units: those with more, most units first. Tokens that end with the closing byte
  // are not in `inside` and the like, but here.
  static constexpr uint32_t kFew = 16;
  std::vector<std::vector<uint32_t>> few;
  std::vector<Exit> by_units;
  std::vector<Exit> closed;

  size_t MemoryBytes() const;
};

std::shared_ptr<const TokenClass> MakeTokenClass(const Terminal& terminal, uint32_t state,
                                                 const TokenTable& table);
// `base`: the class of terminal.reference[state], which is another state, and usable.
std::shared_ptr<const TokenClass> MakeOverlay(const Terminal& terminal, uint32_t state,
                                              const TokenTable& table,
                                              std::shared_ptr<const TokenClass> base);

}  // namespace tidepool::structured
