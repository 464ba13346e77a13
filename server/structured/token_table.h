#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tidepool {

class Tokenizer;

// TokenTable: a vocabulary as a trie over the bytes of its tokens, for finding all tokens that an automaton
// takes. Immutable, thread-safe; built once per model (some 100 ms and 10 to 20 MiB at 150k tokens). Special
// tokens are not in the trie: no byte matches them, only GrammarBuilder::SpecialToken.
class TokenTable {
 public:
  // `vocab_size`: ids that the model gives logits for, may be larger or smaller than the tokenizer's.
  // Errors: InvalidArgument (not one token with text).
  static absl::StatusOr<std::shared_ptr<const TokenTable>> Build(const Tokenizer& tokenizer,
                                                                 int32_t vocab_size);
  // From the bytes of each id; an empty one is never matched by bytes.
  static absl::StatusOr<std::shared_ptr<const TokenTable>> FromBytes(std::vector<std::string> tokens);

  ~TokenTable();
  TokenTable(const TokenTable&) = delete;
  TokenTable& operator=(const TokenTable&) = delete;

  int32_t vocab_size() const { return vocab_size_; }
  // 32-bit words of a mask: bit (id % 32) of word id / 32.
  size_t mask_words() const { return (static_cast<size_t>(vocab_size_) + 31) / 32; }
  // Empty for special and unused ids. `id` in [0, vocab_size).
  std::string_view TokenBytes(int32_t id) const {
    return std::string_view(bytes_).substr(
        begin_[static_cast<size_t>(id)],
        begin_[static_cast<size_t>(id) + 1] - begin_[static_cast<size_t>(id)]);
  }
  // Whether each byte is a token by itself: then a Matcher can always go on or end.
  bool covers_all_bytes() const { return covers_all_bytes_; }
  size_t memory_bytes() const;

  // The trie in depth-first order (the matcher's business). Node 0 is the root. The subtree of node n is
  // [n, end): its first child is n + 1, the next sibling of a child is that child's end.
  struct TrieNode {
    uint32_t end;     // one behind the subtree
    uint32_t tokens;  // tokens that end here: order()[tokens, tokens of node n + 1)
    uint8_t byte;
  };
  std::span<const TrieNode> trie() const { return trie_; }  // one sentinel at the end
  // The root's child for a byte, 0 if there is none.
  uint32_t root_child(uint8_t byte) const { return root_child_[byte]; }
  // Token ids in the order of the trie.
  std::span<const int32_t> order() const { return order_; }

  // A trie of this form over `sorted` keys (none empty), with a sentinel; keys come out in the same order.
  static std::vector<TrieNode> MakeTrie(std::span<const std::string_view> sorted);

 private:
  TokenTable() = default;

  int32_t vocab_size_ = 0;
  bool covers_all_bytes_ = false;
  std::string bytes_;
  std::vector<uint32_t> begin_;
  std::vector<TrieNode> trie_;
  std::array<uint32_t, 256> root_child_{};
  std::vector<int32_t> order_;
};

}  // namespace tidepool
